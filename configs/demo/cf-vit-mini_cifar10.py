_base_ = './vit-mini_cifar10.py'

model = dict(
    type='mmdyn.CoarseToFineClassifier',
    backbone=dict(
        _delete_=True,
        type='mmdyn.CFViT',
        arch=dict(family='deit', embed_dim=64, depth=6, num_heads=4, mlp_ratio=2),
        coarse_size=4,
        img_size=32,
        patch_size=4,
        init_cfg=_base_.model.backbone.init_cfg,
    ),
    test_cfg=dict(threshold=0.75),
)
optim_wrapper = dict(paramwise_cfg=dict(custom_keys={'.coarse_pos_embed': dict(decay_mult=0.0)}))
custom_hooks = [dict(type='mmdyn.FineSelectionHook', begin=12)]
val_evaluator = [
    dict(type='Accuracy', topk=1),
    dict(type='mmdyn.CoarseToFineMetric', topk=1),
    dict(type='mmdyn.DynamicFLOPs'),
]
test_evaluator = val_evaluator
