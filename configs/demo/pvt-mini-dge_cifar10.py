_base_ = './pvt-mini_cifar10.py'

model = dict(backbone=dict(dge=dict(granularities=(1, 2, 4))))
# In a few thousand iterations the routers grow confident only with a greater step, and hold the budget with a greater
# weight.
optim_wrapper = dict(paramwise_cfg=dict(custom_keys={'.router': dict(lr_mult=10.0, decay_mult=0.0)}))
custom_hooks = [dict(type='mmdyn.BudgetHook', budget=0.5, weight=10.0)]
