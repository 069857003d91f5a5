# As coco_detection_768.py, with masks.
_base_ = './coco_detection_768.py'

load_annotations = dict(type='LoadAnnotations', with_bbox=True, with_mask=True)
train_pipeline = [_base_.train_pipeline[0], load_annotations, *_base_.train_pipeline[2:]]
test_pipeline = [*_base_.test_pipeline[:2], load_annotations, _base_.test_pipeline[3]]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader

val_evaluator = [dict(_base_.val_evaluator[0], metric=['bbox', 'segm']), _base_.val_evaluator[1]]
test_evaluator = val_evaluator

tta_model = dict(type='mmdyn.MaskTTAModel')  # mmdet's own merges no masks
