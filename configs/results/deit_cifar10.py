_base_ = './pvt_cifar10.py'

model = dict(
    backbone=dict(
        _delete_=True,
        type='mmdyn.DeiT',
        arch=dict(embed_dim=64, depth=6, num_heads=4, mlp_ratio=4),
        img_size=32,
        patch_size=4,
        # With weights as small as those of a wide model, so narrow a one learns nothing for many epochs.
        init_cfg=dict(type='Xavier', layer='Linear', distribution='uniform'),
    ),
    head=dict(in_channels=64),
)
dge = dict(_delete_=True, model=dict(backbone=dict(dge=dict(granularities=(1, 2, 4)))))
