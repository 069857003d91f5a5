# A PVT and a DPVT that train in minutes on a CPU, for the demo's configs.
mini = dict(embed_dims=(32, 64, 128, 192), depths=(1, 2, 2, 1), num_heads=(1, 2, 4, 6), mlp_ratios=(4, 4, 4, 4))
pvt_mini = dict(sr_ratios=(4, 2, 1, 1), **mini)
dpvt_mini = dict(num_points=(4, 4, 4, 4), **mini)
