# A PVT that trains in minutes on a CPU, for the demo's configs.
pvt_mini = dict(
    embed_dims=(32, 64, 128, 192),
    depths=(1, 2, 2, 1),
    num_heads=(1, 2, 4, 6),
    mlp_ratios=(4, 4, 4, 4),
    sr_ratios=(4, 2, 1, 1))
