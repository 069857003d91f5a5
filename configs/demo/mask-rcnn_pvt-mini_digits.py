# Mask R-CNN on a small PVT, for the digits of tools/dataset_tools/make_demo_dataset.py on images of 128 pixels.
_base_ = [
    'mmdet::_base_/models/mask-rcnn_r50_fpn.py',
    'mmdet::_base_/default_runtime.py',
    '../_base_/models/pvt_mini.py',
]

# From scratch, norms let the heads learn in minutes.
norm_cfg = dict(type='BN')
model = dict(
    data_preprocessor=dict(mean=[127.5] * 3, std=[64.0] * 3),
    backbone=dict(_delete_=True, type='mmdyn.PVT', arch=_base_.pvt_mini, img_size=128),
    neck=dict(in_channels=[32, 64, 128, 192], out_channels=64, num_outs=4, norm_cfg=norm_cfg),
    # Digits are 15 to 57 pixels large and half as high again as wide: one anchor for each cell is enough.
    rpn_head=dict(
        in_channels=64,
        feat_channels=64,
        anchor_generator=dict(scales=[1], ratios=[1.5], base_sizes=[18, 26, 37, 52], strides=[4, 8, 16, 32]),
    ),
    # All regions are pooled from the finest map: the digits are small.
    roi_head=dict(
        bbox_roi_extractor=dict(roi_layer=dict(sampling_ratio=1), out_channels=64, featmap_strides=[4]),
        bbox_head=dict(in_channels=64, fc_out_channels=256, num_classes=10, reg_class_agnostic=True, norm_cfg=norm_cfg),
        mask_roi_extractor=dict(roi_layer=dict(sampling_ratio=1), out_channels=64, featmap_strides=[4]),
        mask_head=dict(
            num_convs=2, in_channels=64, conv_out_channels=64, num_classes=10, class_agnostic=True, norm_cfg=norm_cfg
        ),
    ),
    train_cfg=dict(
        rpn=dict(sampler=dict(num=64)), rpn_proposal=dict(nms_pre=100, max_per_img=32), rcnn=dict(sampler=dict(num=32))
    ),
    test_cfg=dict(rpn=dict(nms_pre=100, max_per_img=32), rcnn=dict(max_per_img=20)),
)

dataset = dict(
    type='mmdyn.CocoDataset',
    data_root='data/demo/coco/',
    metainfo=dict(
        classes=('0', '1', '2', '3', '4', '5', '6', '7', '8', '9'),
        palette=[
            (230, 25, 75),
            (60, 180, 75),
            (255, 225, 25),
            (0, 130, 200),
            (245, 130, 48),
            (145, 30, 180),
            (70, 240, 240),
            (240, 50, 230),
            (210, 245, 60),
            (250, 190, 212),
        ],
    ),
)
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='RandomResize', scale=(128, 128), ratio_range=(0.8, 1.25), keep_ratio=True),
    dict(type='RandomCrop', crop_size=(128, 128), allow_negative_crop=True),
    dict(type='PackDetInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(128, 128), keep_ratio=True),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='PackDetInputs'),
]
train_dataloader = dict(
    batch_size=8,
    num_workers=1,
    persistent_workers=True,
    dataset=dict(
        ann_file='annotations/instances_train2017.json',
        data_prefix=dict(img='train2017/'),
        pipeline=train_pipeline,
        **dataset,
    ),
    sampler=dict(type='DefaultSampler', shuffle=True),
)
val_dataloader = dict(
    batch_size=20,
    num_workers=1,
    persistent_workers=True,
    dataset=dict(
        ann_file='annotations/instances_val2017.json',
        data_prefix=dict(img='val2017/'),
        test_mode=True,
        pipeline=test_pipeline,
        **dataset,
    ),
    sampler=dict(type='DefaultSampler', shuffle=False),
)
test_dataloader = val_dataloader
val_evaluator = [
    dict(type='CocoMetric', ann_file='data/demo/coco/annotations/instances_val2017.json', metric=['bbox', 'segm']),
    dict(type='mmdyn.DynamicFLOPs'),
]
test_evaluator = val_evaluator

max_epochs = 10
optim_wrapper = dict(
    optimizer=dict(type='AdamW', lr=1e-3, weight_decay=0.05),
    paramwise_cfg=dict(norm_decay_mult=0.0, bias_decay_mult=0.0, custom_keys={'.pos_embed': dict(decay_mult=0.0)}),
    clip_grad=dict(max_norm=5.0),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-2, by_epoch=True, end=2, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', eta_min=1e-5, by_epoch=True, begin=2, end=max_epochs, convert_to_iter_based=True),
]
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=max_epochs, val_interval=max_epochs)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
default_hooks = dict(
    checkpoint=dict(interval=max_epochs, max_keep_ckpts=2),
    # Stops at the first loss that is NaN or infinite and names the images.
    loss_guard=dict(type='mmdyn.LossGuardHook'),
    # A training that was killed and resumed goes on as if it had not been.
    random_state=dict(type='mmdyn.RandomStateHook'),
)
visualizer = dict(line_width=2)
randomness = dict(seed=0)
