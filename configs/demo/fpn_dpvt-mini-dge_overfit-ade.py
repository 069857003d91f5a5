_base_ = './fpn_pvt-mini-dge_overfit-ade.py'

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
