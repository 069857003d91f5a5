_base_ = './pvt-mini_digits.py'

# The maps of the last stages have 4 x 4 and 2 x 2 cells: a patch of 4 x 4 would leave nothing of them.
model = dict(backbone=dict(dge=dict(granularities=((1, 2, 4), (1, 2, 4), (1, 2), (1, 2)))))
# In a few thousand iterations the routers grow confident only with a greater step, and hold the budget with a greater
# weight.
optim_wrapper = dict(paramwise_cfg=dict(custom_keys={'.router': dict(lr_mult=10., decay_mult=0.)}))
custom_hooks = [dict(type='mmdyn.BudgetHook', budget=0.5, weight=10.)]
