# Table 1 of the DGE paper: one decision for each image and layer.
_base_ = './pvt-small-dge_8xb16_in1k-256px.py'

model = dict(backbone=dict(dge=dict(routing='layer')))
