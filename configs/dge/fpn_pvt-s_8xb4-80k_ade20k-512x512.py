_base_ = [
    '../_base_/models/fpn_pvt.py',
    '../_base_/datasets/ade20k_512.py',
    '../_base_/schedules/ade20k_adamw_80k.py',
    'mmseg::_base_/default_runtime.py',
]

model = dict(backbone=dict(arch='small'))
