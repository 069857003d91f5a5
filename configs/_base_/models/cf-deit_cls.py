# CF-ViT classifier on DeiT, without distillation, as the CF-ViT paper trains it.
model = dict(
    type='mmdyn.CoarseToFineClassifier',
    backbone=dict(type='mmdyn.CFViT', arch='deit-small', coarse_size=7, img_size=224, drop_path_rate=0.1),
    head=dict(
        type='LinearClsHead',
        num_classes=1000,
        in_channels=384,
        init_cfg=dict(type='TruncNormal', layer='Linear', std=0.02),
        loss=dict(type='LabelSmoothLoss', label_smooth_val=0.1, mode='original'),
    ),
    train_cfg=dict(augments=[dict(type='Mixup', alpha=0.8), dict(type='CutMix', alpha=1.0)]),
    test_cfg=dict(threshold=0.5),
)
