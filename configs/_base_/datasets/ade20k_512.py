# Section 4.2.2 of the DGE paper: scaled by 0.5 to 2, cropped to 512 x 512 and flipped; 4 images on each of 8 GPUs.
_base_ = 'mmseg::_base_/datasets/ade20k.py'

train_dataloader = dict(dataset=dict(type='mmdyn.ADE20KDataset'))
val_dataloader = dict(dataset=dict(type='mmdyn.ADE20KDataset'))
test_dataloader = val_dataloader

val_evaluator = [_base_.val_evaluator, dict(type='mmdyn.DynamicFLOPs')]
test_evaluator = val_evaluator
