# Section 4.2.2 of the DGE paper: scaled by 0.5 to 2, cropped to 512 x 512 and flipped; 4 images on each of 8 GPUs.
_base_ = 'mmseg::_base_/datasets/ade20k.py'

train_pipeline = [dict(type='mmdyn.LoadImageFromFile'), *_base_.train_pipeline[1:]]
test_pipeline = [dict(type='mmdyn.LoadImageFromFile'), *_base_.test_pipeline[1:]]
tta_pipeline = [dict(type='mmdyn.LoadImageFromFile'), *_base_.tta_pipeline[1:]]
train_dataloader = dict(dataset=dict(type='mmdyn.ADE20KDataset', pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(type='mmdyn.ADE20KDataset', pipeline=test_pipeline))
test_dataloader = val_dataloader

val_evaluator = [_base_.val_evaluator, dict(type='mmdyn.DynamicFLOPs')]
test_evaluator = val_evaluator
