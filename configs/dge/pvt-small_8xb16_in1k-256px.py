_base_ = [
    '../_base_/models/pvt_cls.py',
    '../_base_/datasets/imagenet_256.py',
    '../_base_/schedules/imagenet_adamw_300e.py',
    '../_base_/default_runtime.py',
]

model = dict(backbone=dict(arch='small'))
