_base_ = [
    '../_base_/models/mask-rcnn_pvt_fpn.py',
    '../_base_/datasets/coco_instance_768.py',
    '../_base_/schedules/coco_adamw_1x.py',
    '../_base_/det_runtime.py',
]

model = dict(backbone=dict(arch='small'))
