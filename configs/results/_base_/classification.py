# What the classifications of configs/results share: loaders, schedule, and what is measured.
_base_ = ['../../_base_/default_runtime.py', '../../_base_/models/pvt_mini.py', './recipe.py']

dataset = dict(type='mmdyn.CustomDataset')
train_dataloader = dict(
    batch_size=32, num_workers=0, dataset=dataset, sampler=dict(type='DefaultSampler', shuffle=True), drop_last=True
)
val_dataloader = dict(
    batch_size=100, num_workers=0, dataset=dataset, sampler=dict(type='DefaultSampler', shuffle=False)
)
test_dataloader = val_dataloader
val_evaluator = [dict(type='Accuracy', topk=1), dict(type='mmdyn.DynamicFLOPs')]
test_evaluator = val_evaluator
val_cfg = dict()
test_cfg = dict()

optim_wrapper = dict(
    optimizer=dict(type='AdamW', lr=1e-3, weight_decay=0.05),
    paramwise_cfg=dict(
        norm_decay_mult=0.0,
        bias_decay_mult=0.0,
        custom_keys={'.cls_token': dict(decay_mult=0.0), '.pos_embed': dict(decay_mult=0.0)},
    ),
    clip_grad=dict(max_norm=5.0),
)
# Both end with the training, however long it is.
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-2, by_epoch=False, end=300),
    dict(type='CosineAnnealingLR', eta_min=1e-5, by_epoch=False, begin=300),
]
default_hooks = dict(logger=dict(interval=50), checkpoint=dict(max_keep_ckpts=2, save_best=None))
randomness = dict(seed=0)

# From plain to CF-ViT.
cf_metrics = [
    dict(type='Accuracy', topk=1),
    dict(type='mmdyn.CoarseToFineMetric', topk=1),
    dict(type='mmdyn.DynamicFLOPs'),
]
