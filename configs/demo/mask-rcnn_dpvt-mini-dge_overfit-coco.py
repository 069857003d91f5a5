_base_ = './mask-rcnn_pvt-mini-dge_overfit-coco.py'

model = dict(
    backbone=dict(
        type='mmdyn.DPVT',
        arch=dict(
            _delete_=True,
            embed_dims=(32, 64, 128, 192),
            depths=(1, 2, 2, 1),
            num_heads=(1, 2, 4, 6),
            mlp_ratios=(4, 4, 4, 4),
            num_points=(4, 4, 4, 4))))
# With a smaller step regions stay undecided, and the query ratio in test, without noise, misses the one in training.
optim_wrapper = dict(paramwise_cfg=dict(custom_keys={'.router': dict(lr_mult=10.)}))
