# Makes the dense segmentor dynamic in a third of its schedule; imagenet_dense_pre_30e.py explains the steps.
_base_ = './fpn_pvt-s-dge_8xb4-80k_ade20k-512x512.py'

load_from = 'work_dirs/fpn_pvt-s_8xb4-80k_ade20k-512x512/iter_80000.pth'
optim_wrapper = dict(
    optimizer=dict(lr=1e-5), paramwise_cfg=dict(custom_keys={'.router': dict(lr_mult=50.0, decay_mult=0.0)})
)
param_scheduler = [dict(type='PolyLR', eta_min=0.0, power=0.9, begin=0, end=27000, by_epoch=False)]
train_cfg = dict(max_iters=27000, val_interval=9000)
default_hooks = dict(checkpoint=dict(interval=9000))
custom_hooks = [
    dict(type='mmdyn.BudgetHook', budget=0.5, weight=2.0, schedule='cosine'),
    dict(type='mmdyn.GateNoiseHook'),
    dict(type='mmdyn.DenseTeacherHook'),
]
