# LV-ViT classifier; the patches' labels are the image's unless the data have maps of labels.
model = dict(
    type='ImageClassifier',
    backbone=dict(type='mmdyn.LVViT', arch='small', img_size=224, drop_path_rate=0.1),
    head=dict(
        type='mmdyn.LVViTHead',
        num_classes=1000,
        in_channels=384,
        init_cfg=dict(type='TruncNormal', layer='Linear', std=0.02),
        loss=dict(type='LabelSmoothLoss', label_smooth_val=0.1, mode='original'),
    ),
)
