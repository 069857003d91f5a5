_base_ = '../dge/mask-rcnn_pvt-s_fpn_1x_coco.py'

model = dict(backbone=dict(type='mmdyn.DPVT'))
