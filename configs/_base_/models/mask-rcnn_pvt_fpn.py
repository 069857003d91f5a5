# Mask R-CNN with a PVT that starts from scratch. To start from a checkpoint of an ImageNet config:
#   --cfg-options model.backbone.init_cfg.type=Pretrained model.backbone.init_cfg.prefix=backbone.
#       model.backbone.init_cfg.checkpoint=work_dirs/pvt-small-dge_8xb16_in1k-256px/epoch_300.pth
_base_ = 'mmdet::_base_/models/mask-rcnn_r50_fpn.py'

model = dict(
    # As in the ImageNet configs, so that position embeddings load as they are; they are resized to each image anyway.
    backbone=dict(_delete_=True, type='mmdyn.PVT', arch='small', img_size=256, drop_path_rate=0.1),
    neck=dict(in_channels=[64, 128, 320, 512]),
)
