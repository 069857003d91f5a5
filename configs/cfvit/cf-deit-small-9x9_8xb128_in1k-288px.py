_base_ = './cf-deit-small-7x7_8xb128_in1k-224px.py'

model = dict(backbone=dict(coarse_size=9, img_size=288))

train_pipeline = [*_base_.train_pipeline[:1], dict(_base_.train_pipeline[1], scale=288), *_base_.train_pipeline[2:]]
test_pipeline = [
    _base_.test_pipeline[0],
    dict(_base_.test_pipeline[1], scale=329),
    dict(_base_.test_pipeline[2], crop_size=288),
    _base_.test_pipeline[3],
]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
