_base_ = [
    '../_base_/models/lvvit_cls.py',
    '../_base_/datasets/imagenet_224.py',
    '../_base_/schedules/imagenet_lvvit_300e.py',
    '../_base_/default_runtime.py',
]

# LV-ViT repeats no augmentation, and its crop at test is 0.9 of the shorter side.
test_pipeline = [*_base_.test_pipeline[:1], dict(_base_.test_pipeline[1], scale=248), *_base_.test_pipeline[2:]]
train_dataloader = dict(sampler=dict(type='DefaultSampler'))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
