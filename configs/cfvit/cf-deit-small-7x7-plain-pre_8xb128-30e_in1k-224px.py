# Starts from the plain DeiT: both stages are it, with a position embedding that is resized for the coarse one.
_base_ = './cf-deit-small-7x7_8xb128_in1k-224px.py'

load_from = 'work_dirs/deit-small_8xb128_in1k-224px/epoch_300.pth'
optim_wrapper = dict(optimizer=dict(lr=1e-4))
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, by_epoch=True, end=1, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', eta_min=1e-6, by_epoch=True, begin=1),
]
train_cfg = dict(max_epochs=30)
custom_hooks = [dict(type='mmdyn.FineSelectionHook', begin=10)]
