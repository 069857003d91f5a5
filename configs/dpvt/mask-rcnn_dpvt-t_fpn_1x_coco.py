_base_ = '../dge/mask-rcnn_pvt-t_fpn_1x_coco.py'

model = dict(backbone=dict(type='mmdyn.DPVT'))
