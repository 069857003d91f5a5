# Trains the dense model further: what fpn_pvt-mini-dge_digits.py, which starts alike, is to be compared with.
_base_ = './fpn_pvt-mini_digits.py'

load_from = 'work_dirs/demo/fpn_pvt-mini_digits/iter_1400.pth'
max_iters = 700
optim_wrapper = dict(optimizer=dict(lr=1.2e-4))
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-2, by_epoch=False, end=100),
    dict(type='CosineAnnealingLR', eta_min=1e-5, by_epoch=False, begin=100, end=max_iters),
]
train_cfg = dict(max_iters=max_iters, val_interval=max_iters)
default_hooks = dict(checkpoint=dict(interval=max_iters))
