# Section 4.2.1 of the DGE paper: AdamW, learning rate 1e-4 for 16 images; the weight decay is that of mmdet's PVT.
# The paper trains 90k iterations and drops the rate at 60k and 80k. mmdet's 1x has 12 epochs of 7330 iterations (117266
# images with boxes), 88k in all, and drops after epochs 8 (59k) and 11 (81k).
_base_ = 'mmdet::_base_/schedules/schedule_1x.py'

optim_wrapper = dict(
    optimizer=dict(_delete_=True, type='AdamW', lr=1e-4, weight_decay=1e-4),
    paramwise_cfg=dict(norm_decay_mult=0.0, bias_decay_mult=0.0, custom_keys={'.pos_embed': dict(decay_mult=0.0)}),
)
