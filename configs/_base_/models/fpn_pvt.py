# Semantic FPN with a PVT that starts from scratch; mask-rcnn_pvt_fpn.py tells how to start from a checkpoint.
_base_ = 'mmseg::_base_/models/fpn_r50.py'

# A side that the stride of 32 does not divide would lose its last pixels.
data_preprocessor = dict(size=(512, 512), test_cfg=dict(size_divisor=32))
model = dict(
    data_preprocessor=data_preprocessor,
    pretrained=None,
    # As in the ImageNet configs, so that position embeddings load as they are; they are resized to each image anyway.
    backbone=dict(_delete_=True, type='mmdyn.PVT', arch='small', img_size=256, drop_path_rate=0.1),
    neck=dict(in_channels=[64, 128, 320, 512]),
    decode_head=dict(num_classes=150),
)
