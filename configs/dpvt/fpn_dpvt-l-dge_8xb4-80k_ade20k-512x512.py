_base_ = './fpn_dpvt-l_8xb4-80k_ade20k-512x512.py'

model = dict(backbone=dict(dge=dict(granularities=(1, 2, 4))))
custom_hooks = [dict(type='mmdyn.BudgetHook', budget=0.5, weight=1.0)]
