# Table 1 of the DGE paper: four granularities.
_base_ = './pvt-small-dge_8xb16_in1k-256px.py'

model = dict(backbone=dict(dge=dict(granularities=(1, 2, 4, 8))))
