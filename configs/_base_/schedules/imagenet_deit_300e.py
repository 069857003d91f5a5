# DeiT's recipe, which the DGE paper's follows: learning rate 5e-4 for 512 images, 5 epochs of warm-up, cosine to 1e-5.
_base_ = './imagenet_adamw_300e.py'

optim_wrapper = dict(paramwise_cfg=dict(custom_keys={'.coarse_pos_embed': dict(decay_mult=0.0)}))
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, by_epoch=True, end=5, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', eta_min=1e-5, by_epoch=True, begin=5),
]

auto_scale_lr = dict(base_batch_size=1024)
