# A small DeiT for images of 64 pixels, on the digits of tools/dataset_tools/make_demo_dataset.py.
_base_ = './pvt-mini_digits.py'

model = dict(
    data_preprocessor=dict(std=[32.0] * 3),
    backbone=dict(
        _delete_=True,
        type='mmdyn.DeiT',
        arch=dict(embed_dim=64, depth=4, num_heads=4, mlp_ratio=2),
        img_size=64,
        patch_size=8,
        # With weights as small as those of a wide model, so narrow a one learns nothing for many epochs.
        init_cfg=dict(type='Xavier', layer='Linear', distribution='uniform'),
    ),
    head=dict(in_channels=64),
)

max_epochs = 15
# Digits lie anywhere: little is learnt before the positions are told apart.
optim_wrapper = dict(optimizer=dict(lr=2e-3), paramwise_cfg=dict(custom_keys={'.pos_embed': dict(lr_mult=10.0)}))
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-2, by_epoch=True, end=1, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', eta_min=1e-5, by_epoch=True, begin=1, end=max_epochs, convert_to_iter_based=True),
]
train_cfg = dict(max_epochs=max_epochs)
