# Makes the dense model dynamic, as pvt-mini-dge_digits.py does.
_base_ = './mask-rcnn_pvt-mini-finetune_digits.py'

# The map of the last stage has 4 x 4 cells: a patch of 4 x 4 would leave nothing of it.
model = dict(backbone=dict(dge=dict(granularities=((1, 2, 4), (1, 2, 4), (1, 2, 4), (1, 2)))))
# In a few hundred iterations the routers grow confident only with a greater step and a greater weight of the budget.
optim_wrapper = dict(paramwise_cfg=dict(custom_keys={'.router': dict(lr_mult=30.0, decay_mult=0.0)}))
custom_hooks = [dict(type='mmdyn.BudgetHook', budget=0.5, weight=10.0, schedule='cosine')]
