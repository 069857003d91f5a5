_base_ = './_base_/camvid.py'

# SegFormer with a MiT of the sizes of the other backbones. Nothing of it is trained before, hence for longer.
model = dict(
    backbone=dict(
        _delete_=True,
        type='mmdyn.WithDGE',
        backbone=dict(
            type='mmseg.MixVisionTransformer', embed_dims=32, num_layers=[1, 2, 2, 1], num_heads=[1, 2, 4, 6]
        ),
        img_size=256,
    ),
    neck=None,
    decode_head=dict(
        _delete_=True,
        type='SegformerHead',
        in_channels=[32, 64, 128, 192],
        in_index=[0, 1, 2, 3],
        channels=64,
        num_classes=11,
        norm_cfg=dict(type='BN', requires_grad=True),
        dropout_ratio=0.0,
        align_corners=False,
        loss_decode=dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0),
    ),
)
train_cfg = dict(max_iters=1500, val_interval=1500)
