# Makes the dense detector dynamic in a third of its schedule; imagenet_dense_pre_30e.py explains the steps.
_base_ = './mask-rcnn_pvt-s-dge_fpn_1x_coco.py'

load_from = 'work_dirs/mask-rcnn_pvt-s_fpn_1x_coco/epoch_12.pth'
optim_wrapper = dict(
    optimizer=dict(lr=1e-5), paramwise_cfg=dict(custom_keys={'.router': dict(lr_mult=50.0, decay_mult=0.0)})
)
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, by_epoch=False, end=500),
    dict(type='MultiStepLR', by_epoch=True, end=4, milestones=[3], gamma=0.1),
]
train_cfg = dict(max_epochs=4)
custom_hooks = [
    dict(type='mmdyn.BudgetHook', budget=0.5, weight=2.0, schedule='cosine'),
    dict(type='mmdyn.GateNoiseHook'),
    dict(type='mmdyn.DenseTeacherHook'),
]
