# ImageNet-1k at 224x224 with the augmentations of DeiT: RandAugment, random erasing, repeated augmentation.
_base_ = 'mmpretrain::_base_/datasets/imagenet_bs64_swin_224.py'

train_dataloader = dict(
    batch_size=128,
    persistent_workers=True,
    dataset=dict(type='mmdyn.ImageNet'),
    sampler=dict(type='RepeatAugSampler', shuffle=True),
)
val_dataloader = dict(persistent_workers=True, dataset=dict(type='mmdyn.ImageNet'))
test_dataloader = val_dataloader

val_evaluator = [dict(type='Accuracy', topk=(1, 5)), dict(type='mmdyn.DynamicFLOPs')]
test_evaluator = val_evaluator
