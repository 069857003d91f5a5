# Table 1 of the DGE paper: regions of one cell that are skipped or not.
_base_ = './pvt-small-dge_8xb16_in1k-256px.py'

model = dict(backbone=dict(dge=dict(granularities=(0, 1))))
