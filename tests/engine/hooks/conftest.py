"""Small models with DGE of each framework, as configs."""

import pytest

ARCH = dict(embed_dims=(16, 32), depths=(1, 1), num_heads=(1, 2), mlp_ratios=(2, 2), sr_ratios=(2, 1))
BACKBONE = dict(type='mmdyn.PVT', arch=ARCH, img_size=64, dge=dict(granularities=(1, 2, 4)))
NECK = dict(type='FPN', in_channels=[16, 32], out_channels=16, num_outs=2)


@pytest.fixture
def classifier_config():
    """Images have 32 x 32 pixels."""
    backbone = dict(BACKBONE, img_size=32, out_type='avg_featmap')
    return dict(
        type='ImageClassifier', backbone=backbone, head=dict(type='LinearClsHead', num_classes=3, in_channels=32)
    )


@pytest.fixture
def detector_config():
    """RetinaNet."""
    pytest.importorskip('mmdet')
    anchors = dict(type='AnchorGenerator', octave_base_scale=4, scales_per_octave=1, ratios=[1.0], strides=[4, 8])
    head = dict(
        type='RetinaHead',
        num_classes=4,
        in_channels=16,
        stacked_convs=1,
        feat_channels=16,
        anchor_generator=anchors,
        bbox_coder=dict(type='DeltaXYWHBBoxCoder'),
        loss_cls=dict(type='FocalLoss', use_sigmoid=True),
        loss_bbox=dict(type='L1Loss'),
    )
    assigner = dict(type='MaxIoUAssigner', pos_iou_thr=0.5, neg_iou_thr=0.4, min_pos_iou=0)
    return dict(
        type='RetinaNet',
        data_preprocessor=dict(type='DetDataPreprocessor', pad_size_divisor=8),
        backbone=BACKBONE,
        neck=NECK,
        bbox_head=head,
        train_cfg=dict(assigner=assigner, allowed_border=-1, pos_weight=-1, debug=False),
    )


@pytest.fixture
def segmentor_config():
    """Semantic FPN."""
    pytest.importorskip('mmseg')
    head = dict(
        type='FPNHead',
        in_channels=[16, 16],
        in_index=[0, 1],
        feature_strides=[4, 8],
        channels=8,
        num_classes=4,
        norm_cfg=dict(type='BN'),
        dropout_ratio=0.0,
    )
    return dict(
        type='EncoderDecoder',
        backbone=BACKBONE,
        neck=NECK,
        decode_head=head,
        train_cfg=dict(),
        test_cfg=dict(mode='whole'),
    )
