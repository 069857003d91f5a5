_base_ = './_base_/tiny-imagenet-50.py'

model = dict(
    type='ImageClassifier',
    data_preprocessor=_base_.data_preprocessor,
    backbone=dict(type='mmdyn.PVT', arch=_base_.pvt_mini, img_size=64, out_type='cls_token'),
    head=dict(
        type='LinearClsHead',
        num_classes=50,
        in_channels=192,
        init_cfg=dict(type='TruncNormal', layer='Linear', std=0.02),
        loss=dict(type='CrossEntropyLoss'),
    ),
)
# The maps have 16, 8, 4 and 2 cells a side: a patch of 4 x 4 would leave nothing of the last two.
dge = dict(model=dict(backbone=dict(dge=dict(granularities=((1, 2, 4), (1, 2, 4), (1, 2), (1, 2))))))
g1248 = dict(model=dict(backbone=dict(dge=dict(granularities=((1, 2, 4, 8), (1, 2, 4, 8), (1, 2, 4), (1, 2))))))
