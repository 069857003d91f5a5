# Figure 5(b) of the DGE paper: a budget of 1.0.
_base_ = './pvt-small-dge_8xb16_in1k-256px.py'

custom_hooks = [dict(type='mmdyn.BudgetHook', budget=1.0, weight=1.0)]
