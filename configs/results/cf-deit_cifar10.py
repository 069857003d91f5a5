_base_ = './deit_cifar10.py'

model = dict(
    type='mmdyn.CoarseToFineClassifier',
    backbone=dict(
        _delete_=True,
        type='mmdyn.CFViT',
        arch=dict(family='deit', **_base_.model.backbone.arch),
        coarse_size=4,
        img_size=32,
        patch_size=4,
        init_cfg=_base_.model.backbone.init_cfg,
    ),
    test_cfg=dict(threshold=1.0),
)
optim_wrapper = dict(paramwise_cfg=dict(custom_keys={'.coarse_pos_embed': dict(decay_mult=0.0)}))
test_evaluator = _base_.cf_metrics
# All patches are split in the first half, if it starts from scratch.
cf_on = dict(custom_hooks=[dict(type='mmdyn.FineSelectionHook', begin=0)])
cf_whole = dict(custom_hooks=[dict(type='mmdyn.FineSelectionHook', begin=2)])
