_base_ = './dpvt-tiny_8xb16_in1k-256px.py'

model = dict(backbone=dict(dge=dict(granularities=(1, 2, 4))))
custom_hooks = [dict(type='mmdyn.BudgetHook', budget=0.5, weight=1.0)]
