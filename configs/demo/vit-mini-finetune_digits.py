# Trains the plain model further: what cf-vit-mini_digits.py, which starts alike, is to be compared with.
_base_ = './vit-mini_digits.py'

load_from = 'work_dirs/demo/vit-mini_digits/epoch_15.pth'
max_epochs = 8
optim_wrapper = dict(optimizer=dict(lr=5e-4))
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-2, by_epoch=True, end=1, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', eta_min=1e-5, by_epoch=True, begin=1, end=max_epochs, convert_to_iter_based=True),
]
train_cfg = dict(max_epochs=max_epochs)
