_base_ = './pvt-mini_cifar10.py'

model = dict(backbone=dict(dge=dict(granularities=(1, 2, 4))))
custom_hooks = [dict(type='mmdyn.BudgetHook', budget=0.5, weight=10.)]
