# LV-ViT's whole recipe: mixed patches, and a label for each from data/imagenet_token_labels/<class folder>/<image>.pt.
_base_ = './cf-lvvit-small-9x9_8xb128_in1k-288px.py'

data_preprocessor = dict(type='mmdyn.MixTokenPreprocessor', patch_size=32)  # whole coarse patches

train_pipeline = [
    _base_.train_pipeline[0],
    dict(type='mmdyn.LoadTokenLabels', root='data/imagenet_token_labels'),
    dict(_base_.train_pipeline[1], type='mmdyn.TokenLabelCrop'),
    dict(_base_.train_pipeline[2], type='mmdyn.TokenLabelFlip'),
    *_base_.train_pipeline[3:-1],
    dict(_base_.train_pipeline[-1], algorithm_keys=['gt_token_score']),
]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
