_base_ = '../dge/mask-rcnn_pvt-l_fpn_1x_coco.py'

model = dict(backbone=dict(type='mmdyn.DPVT'))
