# BCCD, blood cells on images of 640 x 480 pixels, here at half their sides: docs/data.md tells how to get it.
_base_ = [
    'mmdet::_base_/models/faster-rcnn_r50_fpn.py',
    '../../_base_/det_runtime.py',
    '../../_base_/models/pvt_mini.py',
    './recipe.py',
]

norm_cfg = dict(type='BN')
model = dict(
    backbone=dict(_delete_=True, type='mmdyn.PVT', arch=_base_.pvt_mini, img_size=256),
    neck=dict(in_channels=[32, 64, 128, 192], out_channels=64, num_outs=4, norm_cfg=norm_cfg),
    # Cells are 20 to 120 pixels large.
    rpn_head=dict(in_channels=64, feat_channels=64, anchor_generator=dict(scales=[4], strides=[4, 8, 16, 32])),
    roi_head=dict(
        bbox_roi_extractor=dict(roi_layer=dict(sampling_ratio=1), out_channels=64, finest_scale=28),
        bbox_head=dict(in_channels=64, fc_out_channels=256, num_classes=3, reg_class_agnostic=True, norm_cfg=norm_cfg),
    ),
    train_cfg=dict(
        rpn=dict(sampler=dict(num=128)),
        rpn_proposal=dict(nms_pre=300, max_per_img=100),
        rcnn=dict(sampler=dict(num=64)),
    ),
    test_cfg=dict(rpn=dict(nms_pre=300, max_per_img=100)),
)

# What brings the data, said where they are missing.
data_source = 'unpack bccd.tar.gz in data/, or run convert_dataset.py bccd (docs/data.md)'
dataset = dict(
    type='mmdyn.CocoDataset',
    data_root='data/bccd/',
    metainfo=dict(classes=('RBC', 'WBC', 'Platelets'), palette=[(230, 25, 75), (60, 180, 75), (0, 130, 200)]),
)
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='RandomResize', scale=(320, 240), ratio_range=(0.8, 1.25), keep_ratio=True),
    dict(type='RandomCrop', crop_size=(240, 320), allow_negative_crop=True),
    dict(type='RandomFlip', prob=0.5, direction=['horizontal', 'vertical']),
    dict(type='PackDetInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(320, 240), keep_ratio=True),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='PackDetInputs', meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')),
]
train_dataloader = dict(
    batch_size=4,
    num_workers=0,
    dataset=dict(
        ann_file='annotations/instances_train.json', data_prefix=dict(img='train/'), pipeline=train_pipeline, **dataset
    ),
    sampler=dict(type='DefaultSampler', shuffle=True),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=0,
    dataset=dict(
        ann_file='annotations/instances_val.json',
        data_prefix=dict(img='val/'),
        test_mode=True,
        pipeline=test_pipeline,
        **dataset,
    ),
    sampler=dict(type='DefaultSampler', shuffle=False),
)
test_dataloader = val_dataloader
val_evaluator = [
    dict(type='CocoMetric', ann_file='data/bccd/annotations/instances_val.json', metric='bbox'),
    dict(type='mmdyn.DynamicFLOPs'),
]
test_evaluator = val_evaluator
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')

optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=5e-4, weight_decay=0.05),
    # Neck and heads are new, and learn sooner.
    paramwise_cfg=dict(
        norm_decay_mult=0.0,
        bias_decay_mult=0.0,
        custom_keys={'.pos_embed': dict(decay_mult=0.0), 'neck': dict(lr_mult=2.0), 'head': dict(lr_mult=2.0)},
    ),
    clip_grad=dict(max_norm=5.0),
)
# Both end with the training, however long it is.
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-2, by_epoch=False, end=50),
    dict(type='CosineAnnealingLR', eta_min=1e-5, by_epoch=False, begin=50),
]
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=12, val_interval=12)
on = dict(train_cfg=dict(max_epochs=6), optim_wrapper=dict(optimizer=dict(lr=1.5e-4)))
whole = dict(train_cfg=dict(max_epochs=18))
default_hooks = dict(checkpoint=dict(interval=3, max_keep_ckpts=2))
randomness = dict(seed=0)
dge = dict(model=dict(backbone=dict(dge=dict(granularities=(1, 2, 4)))))
