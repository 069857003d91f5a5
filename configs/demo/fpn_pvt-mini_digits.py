# Semantic FPN on a small PVT, for the digits of tools/dataset_tools/make_demo_dataset.py on images of 128 pixels.
_base_ = [
    'mmseg::_base_/models/fpn_r50.py',
    'mmseg::_base_/default_runtime.py',
    'mmseg::_base_/schedules/schedule_20k.py',
    '../_base_/models/pvt_mini.py',
]

# From scratch, norms let the neck learn in minutes.
norm_cfg = dict(type='BN', requires_grad=True)
model = dict(
    data_preprocessor=dict(size=(128, 128), mean=[127.5] * 3, std=[64.0] * 3),
    pretrained=None,
    backbone=dict(_delete_=True, type='mmdyn.PVT', arch=_base_.pvt_mini, img_size=128),
    neck=dict(in_channels=[32, 64, 128, 192], out_channels=64, norm_cfg=norm_cfg),
    decode_head=dict(in_channels=[64] * 4, channels=64, num_classes=11, norm_cfg=norm_cfg, dropout_ratio=0.0),
)

dataset = dict(
    type='mmdyn.BaseSegDataset',
    data_root='data/demo/ade',
    img_suffix='.png',
    reduce_zero_label=True,
    metainfo=dict(
        classes=('0', '1', '2', '3', '4', '5', '6', '7', '8', '9', 'background'),
        palette=[
            [230, 25, 75],
            [60, 180, 75],
            [255, 225, 25],
            [0, 130, 200],
            [245, 130, 48],
            [145, 30, 180],
            [70, 240, 240],
            [240, 50, 230],
            [210, 245, 60],
            [250, 190, 212],
            [64, 64, 64],
        ],
    ),
)
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='RandomResize', scale=(128, 128), ratio_range=(0.8, 1.25), keep_ratio=True),
    dict(type='RandomCrop', crop_size=(128, 128)),
    dict(type='PackSegInputs'),
]
test_pipeline = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations'), dict(type='PackSegInputs')]
train_dataloader = dict(
    batch_size=8,
    num_workers=1,
    persistent_workers=True,
    dataset=dict(
        data_prefix=dict(img_path='images/training', seg_map_path='annotations/training'),
        pipeline=train_pipeline,
        **dataset,
    ),
    sampler=dict(type='InfiniteSampler', shuffle=True),
)
val_dataloader = dict(
    batch_size=20,
    num_workers=1,
    persistent_workers=True,
    dataset=dict(
        data_prefix=dict(img_path='images/validation', seg_map_path='annotations/validation'),
        pipeline=test_pipeline,
        **dataset,
    ),
    sampler=dict(type='DefaultSampler', shuffle=False),
)
test_dataloader = val_dataloader
val_evaluator = [dict(type='IoUMetric', iou_metrics=['mIoU']), dict(type='mmdyn.DynamicFLOPs')]
test_evaluator = val_evaluator

max_iters = 1400
optim_wrapper = dict(
    _delete_=True,
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=4e-4, weight_decay=0.05),
    # Neck and head learn sooner on features that change slowly.
    paramwise_cfg=dict(
        norm_decay_mult=0.0,
        bias_decay_mult=0.0,
        custom_keys={'.pos_embed': dict(decay_mult=0.0), 'neck': dict(lr_mult=5.0), 'decode_head': dict(lr_mult=5.0)},
    ),
    clip_grad=dict(max_norm=5.0),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-2, by_epoch=False, end=100),
    dict(type='CosineAnnealingLR', eta_min=1e-5, by_epoch=False, begin=100, end=max_iters),
]
train_cfg = dict(max_iters=max_iters, val_interval=max_iters // 2)
default_hooks = dict(
    checkpoint=dict(interval=max_iters // 2, max_keep_ckpts=2),
    # Stops at the first loss that is NaN or infinite and names the images.
    loss_guard=dict(type='mmdyn.LossGuardHook'),
    # A training that was killed and resumed goes on as if it had not been.
    random_state=dict(type='mmdyn.RandomStateHook'),
)
randomness = dict(seed=0)
