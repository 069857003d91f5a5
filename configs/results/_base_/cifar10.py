# CIFAR-10, 32 x 32 pixels: docs/data.md tells how to get it.
_base_ = './classification.py'

data_preprocessor = dict(num_classes=10, mean=[125.3, 123.0, 113.9], std=[63.0, 62.1, 66.7], to_rgb=True)
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='RandomCrop', crop_size=32, padding=4),
    dict(type='RandomFlip', prob=0.5, direction='horizontal'),
    dict(type='PackInputs'),
]
test_pipeline = [dict(type='LoadImageFromFile'), dict(type='PackInputs')]
# What brings the data, said where they are missing.
data_source = (
    'unpack cifar10-full.tar.gz in data/ and add a val, or let convert_dataset.py cifar10 make it (docs/data.md)'
)
data_root = 'data/cifar10-full'
train_dataloader = dict(dataset=dict(data_root=data_root, data_prefix='train', pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(data_root=data_root, data_prefix='val', pipeline=test_pipeline))
test_dataloader = val_dataloader

train_cfg = dict(by_epoch=True, max_epochs=3, val_interval=1)
# As for tiny-imagenet-50.py, but a third as long.
on = dict(train_cfg=dict(max_epochs=1), optim_wrapper=dict(optimizer=dict(lr=3e-4)))
whole = dict(train_cfg=dict(max_epochs=4))
