# Gives the plain DeiT its coarse stage: it starts from its checkpoint, and splits all patches in four of eight
# epochs. What its patches of twice the side look like is new to it, which takes a greater step than to train on.
_base_ = './vit-mini-finetune_digits.py'

model = dict(
    type='mmdyn.CoarseToFineClassifier',
    backbone=dict(
        _delete_=True,
        type='mmdyn.CFViT',
        arch=dict(family='deit', embed_dim=64, depth=4, num_heads=4, mlp_ratio=2),
        coarse_size=4,
        ema_start=2,
        img_size=64,
        patch_size=8,
        init_cfg=_base_.model.backbone.init_cfg,
    ),
    test_cfg=dict(threshold=0.75),
)
optim_wrapper = dict(
    optimizer=dict(lr=2e-3), paramwise_cfg=dict(custom_keys={'.coarse_pos_embed': dict(lr_mult=10.0, decay_mult=0.0)})
)
custom_hooks = [dict(type='mmdyn.FineSelectionHook', begin=4)]
val_evaluator = [
    dict(type='Accuracy', topk=1),
    dict(type='mmdyn.CoarseToFineMetric', topk=1),
    dict(type='mmdyn.DynamicFLOPs'),
]
test_evaluator = val_evaluator
