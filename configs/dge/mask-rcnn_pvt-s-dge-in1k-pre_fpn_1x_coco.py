# Starts from the ImageNet checkpoint of pvt-small-dge: position embeddings and routers are taken over.
_base_ = './mask-rcnn_pvt-s-dge_fpn_1x_coco.py'

checkpoint = 'work_dirs/pvt-small-dge_8xb16_in1k-256px/epoch_300.pth'
model = dict(backbone=dict(init_cfg=dict(type='Pretrained', checkpoint=checkpoint, prefix='backbone.')))
