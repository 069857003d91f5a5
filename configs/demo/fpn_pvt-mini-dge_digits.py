# Makes the dense model dynamic, as pvt-mini-dge_digits.py does.
_base_ = './fpn_pvt-mini-finetune_digits.py'

# The map of the last stage has 4 x 4 cells: a patch of 4 x 4 would leave nothing of it.
model = dict(backbone=dict(dge=dict(granularities=((1, 2, 4), (1, 2, 4), (1, 2, 4), (1, 2)))))
# In so few iterations the routers grow confident only with a greater step, and hold the budget with a greater weight.
optim_wrapper = dict(paramwise_cfg=dict(custom_keys={'.router': dict(lr_mult=50.0, decay_mult=0.0)}))
custom_hooks = [dict(type='mmdyn.BudgetHook', budget=0.5, weight=10.0, schedule='cosine')]
