_base_ = './_base_/cifar10.py'

model = dict(
    type='ImageClassifier',
    data_preprocessor=_base_.data_preprocessor,
    backbone=dict(type='mmdyn.PVT', arch=_base_.pvt_mini, img_size=32, patch_size=2, out_type='cls_token'),
    head=dict(
        type='LinearClsHead',
        num_classes=10,
        in_channels=192,
        init_cfg=dict(type='TruncNormal', layer='Linear', std=0.02),
        loss=dict(type='CrossEntropyLoss'),
    ),
)
# As for pvt_tiny-imagenet-50.py.
dge = dict(model=dict(backbone=dict(dge=dict(granularities=((1, 2, 4), (1, 2, 4), (1, 2), (1, 2))))))
