_base_ = [
    '../_base_/models/cf-deit_cls.py',
    '../_base_/datasets/imagenet_224.py',
    '../_base_/schedules/imagenet_deit_300e.py',
    '../_base_/default_runtime.py',
]

custom_hooks = [dict(type='mmdyn.FineSelectionHook', begin=200)]
val_evaluator = [
    dict(type='Accuracy', topk=(1, 5)),
    dict(type='mmdyn.CoarseToFineMetric'),
    dict(type='mmdyn.DynamicFLOPs'),
]
test_evaluator = val_evaluator
