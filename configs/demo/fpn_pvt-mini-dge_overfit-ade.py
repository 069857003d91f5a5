# Learns eight images of a data set in ADE20K's layout by heart, and is tested on them: a check of the whole pipeline.
_base_ = './fpn_pvt-mini_digits.py'

# The loss on 150 classes costs more than the network: at 128 pixels it takes minutes on a CPU.
side = (128, 128)
model = dict(
    data_preprocessor=dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375]),
    # The map of the last stage has 4 x 4 cells: a patch of 4 x 4 would leave nothing of it.
    backbone=dict(dge=dict(granularities=((1, 2, 4), (1, 2, 4), (1, 2, 4), (1, 2)))),
    decode_head=dict(num_classes=150),
)

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='Resize', scale=side),
    dict(type='PackSegInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=side),
    dict(type='LoadAnnotations'),  # after the resizing: the prediction is brought to the size of the original
    dict(type='PackSegInputs'),
]
dataset = dict(
    _delete_=True,
    type='mmdyn.ADE20KDataset',
    data_root='data/ade/ADEChallengeData2016',
    data_prefix=dict(img_path='images/training', seg_map_path='annotations/training'),
    indices=8,
)
train_dataloader = dict(batch_size=4, dataset=dict(pipeline=train_pipeline, **dataset))
val_dataloader = dict(batch_size=1, dataset=dict(pipeline=test_pipeline, **dataset))
test_dataloader = val_dataloader

max_iters = 500
# In so few iterations the routers grow confident only with a greater step, and hold the budget with a greater weight.
optim_wrapper = dict(paramwise_cfg=dict(custom_keys={'.router': dict(lr_mult=50.0, decay_mult=0.0)}))
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-2, by_epoch=False, end=50),
    dict(type='CosineAnnealingLR', eta_min=1e-5, by_epoch=False, begin=50, end=max_iters),
]
train_cfg = dict(max_iters=max_iters, val_interval=max_iters)
default_hooks = dict(checkpoint=dict(interval=max_iters))
custom_hooks = [dict(type='mmdyn.BudgetHook', budget=0.5, weight=10.0)]
