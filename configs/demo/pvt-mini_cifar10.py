# The small PVT for images of 32 pixels, on CIFAR-10 in ImageNet's layout: data/cifar10/{train,val}/<class>/*.
_base_ = './pvt-mini_digits.py'

model = dict(
    data_preprocessor=dict(mean=[125.3, 123.0, 113.9], std=[63.0, 62.1, 66.7]), backbone=dict(img_size=32, patch_size=2)
)

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='RandomCrop', crop_size=32, padding=4),
    dict(type='RandomFlip', prob=0.5, direction='horizontal'),
    dict(type='PackInputs'),
]
train_dataloader = dict(dataset=dict(data_root='data/cifar10', pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(data_root='data/cifar10'))
test_dataloader = val_dataloader

max_epochs = 25
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-2, by_epoch=True, end=2, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', eta_min=1e-5, by_epoch=True, begin=2, end=max_epochs, convert_to_iter_based=True),
]
train_cfg = dict(max_epochs=max_epochs, val_interval=5)
