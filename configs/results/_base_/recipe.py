# How a dense model is made dynamic in all of configs/results. What is to be tried or changed is changed here: a row of
# rows.py names these parts, and they are merged into its config.
BUDGET = dict(type='mmdyn.BudgetHook', budget=0.5, weight=10.0)
# Most logits stay near each other in so few iterations: without noise at last, the test spends what the training did.
NOISE = dict(type='mmdyn.GateNoiseHook')
# In so few iterations routers grow confident only with a greater step, and hold the budget with a greater weight.
ROUTERS = dict(paramwise_cfg=dict(custom_keys={'.router': dict(lr_mult=10.0, decay_mult=0.0)}))

# From a dense model: the target of the query ratio falls from 1 in the first 40 % of the iterations.
finetune = dict(
    model=dict(backbone=dict(dge=dict(train_mode='dense'))),
    optim_wrapper=ROUTERS,
    custom_hooks=[dict(BUDGET, schedule='cosine'), NOISE],
)
# The same with noise to the end.
noise = dict(custom_hooks=[dict(BUDGET, schedule='cosine')])
# From scratch: all branches run in training, or only those that were drawn.
scratch = dict(
    model=dict(backbone=dict(dge=dict(train_mode='dense'))), optim_wrapper=ROUTERS, custom_hooks=[dict(BUDGET)]
)
sparse = dict(
    model=dict(backbone=dict(dge=dict(train_mode='sparse'))), optim_wrapper=ROUTERS, custom_hooks=[dict(BUDGET)]
)
# Other budgets of the fine-tuned model.
budget_25 = dict(custom_hooks=[dict(BUDGET, schedule='cosine', budget=0.25), NOISE])
budget_75 = dict(custom_hooks=[dict(BUDGET, schedule='cosine', budget=0.75), NOISE])
budget_100 = dict(custom_hooks=[dict(BUDGET, budget=1.0), NOISE])
# Each layer has a share of the budget, too, so that layers choose by region and not as a whole.
layers = dict(custom_hooks=[dict(BUDGET, schedule='cosine', layer_weight=1.5), NOISE])
# The paper's table 1.
layerwise = dict(model=dict(backbone=dict(dge=dict(routing='layer'))))
g01 = dict(model=dict(backbone=dict(dge=dict(granularities=(0, 1)))))
g12 = dict(model=dict(backbone=dict(dge=dict(granularities=(1, 2)))))
