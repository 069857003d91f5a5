# Makes a dense model dynamic in 30 epochs; load_from names its checkpoint. Not from a paper on DGE: the loss of the
# teacher and the few epochs are DynamicViT's.
# - The model is the dense one where routers choose the finest granularity, as they do in the beginning. The target of
#   the query ratio falls in the first 12 epochs, while the dense model teaches.
# - Then the noise of the gates falls, and from epoch 24 on they are those of inference.
# - Blocks move from good weights by small steps, routers begin anew and need greater ones.
_base_ = './imagenet_adamw_300e.py'

optim_wrapper = dict(
    optimizer=dict(lr=1e-5), paramwise_cfg=dict(custom_keys={'.router': dict(lr_mult=50.0, decay_mult=0.0)})
)
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-2, by_epoch=True, end=1, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', eta_min=1e-7, by_epoch=True, begin=1, convert_to_iter_based=True),
]
train_cfg = dict(max_epochs=30)
custom_hooks = [
    dict(type='mmdyn.BudgetHook', budget=0.5, weight=2.0, schedule='cosine'),
    dict(type='mmdyn.GateNoiseHook'),
    dict(type='mmdyn.DenseTeacherHook'),
]
