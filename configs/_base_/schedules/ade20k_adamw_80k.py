# Section 4.2.2 of the DGE paper: AdamW, learning rate 1e-4 for 32 images, to 0 by a polynomial in 80k iterations. The
# weight decay is that of PVT's own recipe.
_base_ = 'mmseg::_base_/schedules/schedule_80k.py'

optimizer = dict(_delete_=True, type='AdamW', lr=1e-4, weight_decay=1e-4)
optim_wrapper = dict(
    optimizer=optimizer,
    paramwise_cfg=dict(norm_decay_mult=0.0, bias_decay_mult=0.0, custom_keys={'.pos_embed': dict(decay_mult=0.0)}),
)
param_scheduler = [dict(type='PolyLR', eta_min=0.0, power=0.9, begin=0, end=80000, by_epoch=False)]

default_hooks = dict(
    checkpoint=dict(max_keep_ckpts=3, save_best='mIoU'),
    # Stops at the first loss that is NaN or infinite and names the images.
    loss_guard=dict(type='mmdyn.LossGuardHook'),
    # A training that was killed and resumed goes on as if it had not been.
    random_state=dict(type='mmdyn.RandomStateHook'),
)

auto_scale_lr = dict(base_batch_size=32)
