# Figure 5(b) of the DGE paper: a budget of 0.25.
_base_ = './pvt-small-dge_8xb16_in1k-256px.py'

custom_hooks = [dict(type='mmdyn.BudgetHook', budget=0.25, weight=1.0)]
