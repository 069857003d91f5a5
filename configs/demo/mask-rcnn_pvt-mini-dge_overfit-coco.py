# A check of the whole way: Mask R-CNN on a small PVT+DGE learns 8 images of COCO by heart and is tested on them.
_base_ = [
    'mmdet::_base_/models/mask-rcnn_r50_fpn.py',
    'mmdet::_base_/default_runtime.py',
    '../_base_/models/pvt_mini.py',
]

norm_cfg = dict(type='BN')
model = dict(
    backbone=dict(
        _delete_=True,
        type='mmdyn.PVT',
        arch=dict(_base_.pvt_mini, sr_ratios=(8, 4, 2, 1)),
        img_size=256,
        dge=dict(granularities=(1, 2, 4)),
    ),
    neck=dict(in_channels=[32, 64, 128, 192], out_channels=64, norm_cfg=norm_cfg),
    # The images are a third of COCO's usual size, and so are the anchors and the sides that choose a region's map.
    rpn_head=dict(in_channels=64, feat_channels=64, anchor_generator=dict(scales=[4])),
    roi_head=dict(
        bbox_roi_extractor=dict(roi_layer=dict(sampling_ratio=1), out_channels=64, finest_scale=20),
        bbox_head=dict(in_channels=64, fc_out_channels=256, reg_class_agnostic=True, norm_cfg=norm_cfg),
        mask_roi_extractor=dict(roi_layer=dict(sampling_ratio=1), out_channels=64, finest_scale=20),
        mask_head=dict(num_convs=2, in_channels=64, conv_out_channels=64, class_agnostic=True, norm_cfg=norm_cfg),
    ),
    train_cfg=dict(
        rpn=dict(sampler=dict(num=128)),
        rpn_proposal=dict(nms_pre=300, max_per_img=100),
        rcnn=dict(sampler=dict(num=64)),
    ),
    test_cfg=dict(rpn=dict(nms_pre=300, max_per_img=100)),
)

dataset = dict(
    type='mmdyn.CocoDataset',
    data_root='data/coco/',
    ann_file='annotations/instances_train2017.json',
    data_prefix=dict(img='train2017/'),
    indices=8,
)
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='Resize', scale=(256, 256), keep_ratio=True),
    dict(type='PackDetInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(256, 256), keep_ratio=True),
    # The metric reads the annotations off the samples: those of a file would be of more images than these.
    dict(type='PackDetInputs', meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor', 'instances')),
]
train_dataloader = dict(
    batch_size=2,
    num_workers=1,
    persistent_workers=True,
    dataset=dict(pipeline=train_pipeline, **dataset),
    sampler=dict(type='InfiniteSampler', shuffle=True),
)
val_dataloader = dict(
    # As in training: the less a batch pads the images, the larger is the share of queries that they choose.
    batch_size=2,
    num_workers=1,
    persistent_workers=True,
    dataset=dict(pipeline=test_pipeline, test_mode=True, **dataset),
    sampler=dict(type='DefaultSampler', shuffle=False),
)
test_dataloader = val_dataloader
val_evaluator = [dict(type='CocoMetric', metric=['bbox', 'segm']), dict(type='mmdyn.DynamicFLOPs')]
test_evaluator = val_evaluator

max_iters = 500
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=1e-3, weight_decay=0.01),
    # In a few hundred iterations the routers grow confident only with a greater step, but not before the features do.
    paramwise_cfg=dict(
        norm_decay_mult=0.0,
        bias_decay_mult=0.0,
        custom_keys={'.pos_embed': dict(decay_mult=0.0), '.router': dict(lr_mult=2.0, decay_mult=0.0)},
    ),
    clip_grad=dict(max_norm=5.0),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-2, by_epoch=False, end=50),
    dict(type='CosineAnnealingLR', eta_min=1e-5, by_epoch=False, begin=50, end=max_iters),
]
train_cfg = dict(type='IterBasedTrainLoop', max_iters=max_iters, val_interval=100)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
default_hooks = dict(
    logger=dict(interval=10),
    checkpoint=dict(by_epoch=False, interval=max_iters // 2, max_keep_ckpts=2),
    # Stops at the first loss that is NaN or infinite and names the images.
    loss_guard=dict(type='mmdyn.LossGuardHook'),
    # A training that was killed and resumed goes on as if it had not been.
    random_state=dict(type='mmdyn.RandomStateHook'),
)
log_processor = dict(by_epoch=False)
custom_hooks = [dict(type='mmdyn.BudgetHook', budget=0.5, weight=10.0)]
randomness = dict(seed=0)
