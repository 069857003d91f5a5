_base_ = './mask-rcnn_pvt-s_fpn_1x_coco.py'

model = dict(backbone=dict(dge=dict(granularities=(1, 2, 4))))
custom_hooks = [dict(type='mmdyn.BudgetHook', budget=0.5, weight=1.0)]
