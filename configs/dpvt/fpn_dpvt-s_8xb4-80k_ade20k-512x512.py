_base_ = '../dge/fpn_pvt-s_8xb4-80k_ade20k-512x512.py'

model = dict(backbone=dict(type='mmdyn.DPVT'))
