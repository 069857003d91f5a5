# Makes the dense model dynamic: it starts from its checkpoint, and the target of the query ratio falls from 1 to 0.5 in
# the first two of five epochs. Then the noise of the gates falls, and in the last epoch they are those of inference.
_base_ = './pvt-mini-finetune_digits.py'

# The maps of the last stages have 4 x 4 and 2 x 2 cells: a patch of 4 x 4 would leave nothing of them.
model = dict(backbone=dict(dge=dict(granularities=((1, 2, 4), (1, 2, 4), (1, 2), (1, 2)))))
# In so few iterations the routers grow confident only with a greater step, and hold the budget with a greater weight.
optim_wrapper = dict(paramwise_cfg=dict(custom_keys={'.router': dict(lr_mult=10.0, decay_mult=0.0)}))
custom_hooks = [
    dict(type='mmdyn.BudgetHook', budget=0.5, weight=10.0, schedule='cosine'),
    dict(type='mmdyn.GateNoiseHook'),
]
