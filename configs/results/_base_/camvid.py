# CamVid, 480 x 360 pixels: docs/data.md tells how to get it.
_base_ = [
    'mmseg::_base_/models/fpn_r50.py',
    'mmseg::_base_/default_runtime.py',
    'mmseg::_base_/schedules/schedule_20k.py',
    '../../_base_/models/pvt_mini.py',
    './recipe.py',
]

norm_cfg = dict(type='BN', requires_grad=True)
side = (256, 256)
model = dict(
    data_preprocessor=dict(size=side, test_cfg=dict(size_divisor=32)),
    pretrained=None,
    backbone=dict(_delete_=True, type='mmdyn.PVT', arch=_base_.pvt_mini, img_size=256),
    neck=dict(in_channels=[32, 64, 128, 192], out_channels=64, norm_cfg=norm_cfg),
    decode_head=dict(in_channels=[64] * 4, channels=64, num_classes=11, norm_cfg=norm_cfg, dropout_ratio=0.0),
)

# What brings the data, said where they are missing.
data_source = 'unpack camvid.tar.gz in data/, or run convert_dataset.py camvid (docs/data.md)'
dataset = dict(
    type='mmdyn.BaseSegDataset',
    data_root='data/camvid',
    metainfo=dict(
        classes=(
            'sky',
            'building',
            'pole',
            'road',
            'pavement',
            'tree',
            'sign',
            'fence',
            'car',
            'pedestrian',
            'bicyclist',
        ),
        palette=[
            [128, 128, 128],
            [128, 0, 0],
            [192, 192, 128],
            [128, 64, 128],
            [0, 0, 192],
            [128, 128, 0],
            [192, 128, 128],
            [64, 64, 128],
            [64, 0, 128],
            [64, 64, 0],
            [0, 128, 192],
        ],
    ),
)
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='RandomResize', scale=(480, 360), ratio_range=(0.75, 1.5), keep_ratio=True),
    dict(type='RandomCrop', crop_size=side, cat_max_ratio=0.75),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackSegInputs'),
]
test_pipeline = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations'), dict(type='PackSegInputs')]
train_dataloader = dict(
    batch_size=4,
    num_workers=0,
    dataset=dict(
        data_prefix=dict(img_path='images/train', seg_map_path='annotations/train'), pipeline=train_pipeline, **dataset
    ),
    sampler=dict(type='InfiniteSampler', shuffle=True),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=0,
    dataset=dict(
        data_prefix=dict(img_path='images/val', seg_map_path='annotations/val'), pipeline=test_pipeline, **dataset
    ),
    sampler=dict(type='DefaultSampler', shuffle=False),
)
test_dataloader = val_dataloader
val_evaluator = [dict(type='IoUMetric', iou_metrics=['mIoU']), dict(type='mmdyn.DynamicFLOPs')]
test_evaluator = val_evaluator

optim_wrapper = dict(
    _delete_=True,
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=5e-4, weight_decay=0.05),
    # Neck and head are new, and learn sooner.
    paramwise_cfg=dict(
        norm_decay_mult=0.0,
        bias_decay_mult=0.0,
        custom_keys={'.pos_embed': dict(decay_mult=0.0), 'neck': dict(lr_mult=3.0), 'decode_head': dict(lr_mult=3.0)},
    ),
    clip_grad=dict(max_norm=5.0),
)
# Both end with the training, however long it is.
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-2, by_epoch=False, end=50),
    dict(type='CosineAnnealingLR', eta_min=1e-5, by_epoch=False, begin=50),
]
train_cfg = dict(max_iters=1000, val_interval=1000)
on = dict(train_cfg=dict(max_iters=500), optim_wrapper=dict(optimizer=dict(lr=1.5e-4)))
whole = dict(train_cfg=dict(max_iters=1500))
default_hooks = dict(
    checkpoint=dict(interval=250, max_keep_ckpts=2),
    # Stops at the first loss that is NaN or infinite and names the images.
    loss_guard=dict(type='mmdyn.LossGuardHook'),
    # A training that was killed and resumed goes on as if it had not been.
    random_state=dict(type='mmdyn.RandomStateHook'),
)
randomness = dict(seed=0)
# The last map has 8 x 8 cells in training.
dge = dict(model=dict(backbone=dict(dge=dict(granularities=(1, 2, 4)))))
