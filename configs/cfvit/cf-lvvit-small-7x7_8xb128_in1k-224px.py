_base_ = './lvvit-small_8xb128_in1k-224px.py'

model = dict(
    type='mmdyn.CoarseToFineClassifier',
    backbone=dict(
        _delete_=True, type='mmdyn.CFViT', arch='lvvit-small', coarse_size=7, img_size=224, drop_path_rate=0.1
    ),
    test_cfg=dict(threshold=0.5),
)
custom_hooks = [dict(type='mmdyn.FineSelectionHook', begin=200)]
val_evaluator = [
    dict(type='Accuracy', topk=(1, 5)),
    dict(type='mmdyn.CoarseToFineMetric'),
    dict(type='mmdyn.DynamicFLOPs'),
]
test_evaluator = val_evaluator
