_base_ = [
    '../_base_/models/deit_cls.py',
    '../_base_/datasets/imagenet_224.py',
    '../_base_/schedules/imagenet_deit_300e.py',
    '../_base_/default_runtime.py',
]

model = dict(backbone=dict(img_size=224))
