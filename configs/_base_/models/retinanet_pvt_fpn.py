# RetinaNet with a PVT that starts from scratch; mask-rcnn_pvt_fpn.py tells how to start from a checkpoint.
_base_ = 'mmdet::_base_/models/retinanet_r50_fpn.py'

model = dict(
    # As in the ImageNet configs, so that position embeddings load as they are; they are resized to each image anyway.
    backbone=dict(_delete_=True, type='mmdyn.PVT', arch='small', img_size=256, drop_path_rate=0.1),
    neck=dict(in_channels=[64, 128, 320, 512]),
)
