# 50 classes of Tiny-ImageNet, 64 x 64 pixels: docs/data.md tells how to get them.
_base_ = './classification.py'

data_preprocessor = dict(num_classes=50, mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], to_rgb=True)
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='RandomCrop', crop_size=64, padding=6),
    dict(type='RandomFlip', prob=0.5, direction='horizontal'),
    dict(type='PackInputs'),
]
test_pipeline = [dict(type='LoadImageFromFile'), dict(type='PackInputs')]
# What brings the data, said where they are missing.
data_source = (
    'unpack tiny-imagenet-50.tar.gz in data/, or let convert_dataset.py tiny-imagenet-50 make it (docs/data.md)'
)
data_root = 'data/tiny-imagenet-50'
train_dataloader = dict(dataset=dict(data_root=data_root, data_prefix='train', pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(data_root=data_root, data_prefix='val', pipeline=test_pipeline))
test_dataloader = val_dataloader

train_cfg = dict(by_epoch=True, max_epochs=8, val_interval=4)
# What is trained on, dense or dynamic, trains half as long again; what starts from scratch as long as both.
on = dict(train_cfg=dict(max_epochs=4), optim_wrapper=dict(optimizer=dict(lr=3e-4)))
whole = dict(train_cfg=dict(max_epochs=12))
