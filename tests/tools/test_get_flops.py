import json
import runpy
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from fvcore.nn import parameter_count
from mmengine.config import Config

import mmdyn
from mmdyn.analysis.flops import build_model, count_macs, report

ROOT = Path(mmdyn.__file__).parents[1]
DGE = ROOT / 'configs/demo/pvt-mini-dge_digits.py'
DENSE = ROOT / 'configs/demo/pvt-mini_digits.py'


def get_flops(*args):
    return subprocess.run(
        [sys.executable, ROOT / 'tools/analysis_tools/get_flops.py', *map(str, args)], capture_output=True, text=True
    )


@pytest.mark.parametrize(
    'config', ['demo/pvt-mini_digits.py', 'dge/deit-tiny_8xb16_in1k-256px.py', 'dge/pvt-tiny_8xb16_in1k-256px.py']
)
def test_dense_count_is_that_of_fvcore_without_norms(config, count_by_fvcore):
    cfg = Config.fromfile(ROOT / 'configs' / config)
    model = build_model(cfg)
    side = cfg.model.backbone.img_size
    ours = report(cfg, (side, side))
    theirs = count_by_fvcore(model, torch.zeros(1, 3, side, side))
    norms = theirs.pop('layer_norm')
    assert ours['flops_dense'] == ours['flops'] == sum(theirs.values())
    assert norms < 0.02 * ours['flops_dense']
    assert ours['params'] == parameter_count(model)['']


def test_backbone_account_and_counter_agree_exactly_but_for_the_head():
    cfg = Config.fromfile(DENSE)
    model = build_model(cfg)
    assert count_macs(model, (64, 96)) == model.backbone.cost.dense + 192 * 10


PYRAMID = dict(embed_dims=(16, 32, 48, 64), depths=(1, 1, 1, 1), num_heads=(1, 2, 3, 4), mlp_ratios=(2, 2, 2, 2))


def test_sampled_points_are_counted():
    cfg = Config(
        dict(
            default_scope='mmpretrain',
            model=dict(
                type='ImageClassifier',
                head=dict(type='LinearClsHead', num_classes=10, in_channels=64),
                backbone=dict(type='mmdyn.DPVT', arch=dict(PYRAMID, num_points=(4, 4, 4, 4)), out_type='avg_featmap'),
            ),
        )
    )
    model = build_model(cfg)
    assert count_macs(model, (64, 96)) == model.backbone.cost.dense + 64 * 10


def test_a_whole_model_of_another_library():
    """timm's classifier by mmpretrain, which has no backbone: the head's products come on top."""
    cfg = Config.fromfile(ROOT / 'configs/results/timm-vit_tiny-imagenet-50.py')
    cfg.model.dge = dict(granularities=(1, 2))
    found = report(cfg, (64, 64), 0.5)
    dense = build_model(cfg, dense=True)
    with torch.no_grad():
        dense(torch.zeros(1, 3, 64, 64))
    assert found['flops_dense'] == mmdyn.cost(dense).dense + 64 * 50
    assert found['params'] - found['params_dense'] == 6 * 2 * (64 + 1)
    shape_of = runpy.run_path(str(ROOT / 'tools/analysis_tools/get_flops.py'))['default_shape']
    assert shape_of(cfg) == (64, 64)


@pytest.fixture(scope='module')
def detector():
    cfg = Config.fromstring('_base_ = "mmdet::_base_/models/mask-rcnn_r50_fpn.py"', '.py')
    backbone = dict(type='mmdyn.PVT', arch=dict(PYRAMID, sr_ratios=(8, 4, 2, 1)), dge=dict())
    cfg.merge_from_dict(
        dict(
            default_scope='mmdet',
            model=dict(backbone=dict(backbone, _delete_=True), neck=dict(in_channels=[16, 32, 48, 64])),
        )
    )
    return cfg


def test_detector_by_hand(detector):
    model = build_model(detector, dense=True)
    height, width = 128, 192
    cells = [height // side * (width // side) for side in (4, 8, 16, 32, 64)]
    laterals = sum(num * dim * 256 for num, dim in zip(cells, PYRAMID['embed_dims']))
    outputs = sum(cells[:4]) * 256 * 256 * 9
    rpn = sum(cells) * (256 * 256 * 9 + 256 * 3 + 256 * 3 * 4)
    box = 7 * 7 * 256 * 1024 + 1024 * 1024 + 1024 * 81 + 1024 * 80 * 4
    mask = 14 * 14 * (4 * 256 * 256 * 9 + 256 * 256 * 4) + 28 * 28 * 256 * 80
    total = count_macs(model, (height, width), proposals=30, detections=7)
    assert total == model.backbone.cost.dense + laterals + outputs + rpn + 30 * box + 7 * mask
    assert count_macs(model, (height, width)) == total + 970 * box - 7 * mask


def test_detections_in_the_report(detector):
    none, some = report(detector, (128, 128), 0.5), report(detector, (128, 128), 0.5, detections=2)
    assert none['flops_dense'] < some['flops_dense']
    assert none['flops_dense'] - none['flops'] == pytest.approx(some['flops_dense'] - some['flops'])
    assert none['params'] - none['params_dense'] == sum(3 * (dim + 1) for dim in PYRAMID['embed_dims'])


def test_what_queries_cost():
    for layer in report(Config.fromfile(DGE), (64, 64), 0.25)['layers']:
        # Three quarters of the queries' cost are saved, less what the router costs.
        router = 0.75 * layer['flops_queries'] - (layer['flops_dense'] - layer['flops'])
        assert 0 < router < 0.01 * layer['flops_dense'] and layer['flops_queries'] < layer['flops_dense']


def test_images_are_normalised_as_the_config_says():
    """mmpretrain's base configs have the data preprocessor beside the model."""
    cfg = Config.fromfile(ROOT / 'configs/dge/pvt-tiny-dge_8xb16_in1k-256px.py')
    preprocessor = build_model(cfg).data_preprocessor
    assert preprocessor.mean.flatten().tolist() == pytest.approx(cfg.data_preprocessor.mean)
    bgr = torch.arange(3, dtype=torch.uint8)[:, None, None].expand(-1, 4, 4)
    seen = preprocessor(dict(inputs=[bgr]))['inputs'][0, :, 0, 0]
    expected = [
        (value - mean) / std
        for value, mean, std in zip((2, 1, 0), cfg.data_preprocessor.mean, cfg.data_preprocessor.std)
    ]
    assert seen.tolist() == pytest.approx(expected)


def test_json_at_a_ratio():
    result = json.loads(get_flops(DGE, '--query-ratio', 0.3, '--json', '--shape', 64, 64).stdout)
    assert set(result) == {'params', 'params_dense', 'flops_dense', 'flops', 'query_ratio', 'layers'}
    assert result['query_ratio'] == 0.3 and len(result['layers']) == 6
    dense = json.loads(get_flops(DENSE, '--json').stdout)
    assert result['flops_dense'] == dense['flops_dense'] == dense['flops']
    saved = sum(layer['flops_dense'] - layer['flops'] for layer in result['layers'])
    assert result['flops_dense'] - result['flops'] == pytest.approx(saved)
    assert 0.3 < result['flops'] / result['flops_dense'] < 1


def test_text_uses_the_budget_of_the_config():
    text = get_flops(DGE, '--layers').stdout
    assert 'at query ratio 0.5000' in text and 'stages.3.blocks.0' in text


def test_coarse_to_fine_without_img_size(tmp_path):
    cfg = Config.fromfile(ROOT / 'configs/demo/cf-vit-mini_digits.py')
    del cfg.model.backbone.img_size
    cfg.dump(tmp_path / 'cf.py')
    assert ' at 64 x 64\n' in get_flops(tmp_path / 'cf.py').stdout


def test_images(tmp_path):
    for i, size in enumerate([(64, 64), (32, 64)]):
        cv2.imwrite(str(tmp_path / f'{i}.png'), np.random.default_rng(i).integers(0, 255, (*size, 3), np.uint8))
    cfg = Config.fromfile(DGE)
    result = report(cfg, (64, 64), images=str(tmp_path))
    alone = [report(cfg, size)['flops_dense'] for size in [(64, 64), (32, 64)]]
    assert result['flops_dense'] == pytest.approx(sum(alone) / 2)
    # Fresh routers choose the finest granularity everywhere, so that only they come on top.
    assert (
        result['query_ratio'] == pytest.approx(1)
        and result['flops_dense'] < result['flops'] < 1.01 * result['flops_dense']
    )


@pytest.mark.parametrize(
    'args, message',
    [
        (['--query-ratio', '1.5'], 'query_ratio=1.5: give a number in (0, 1]'),
        (['--images', 'nowhere'], 'There is no folder of images nowhere'),
    ],
)
def test_errors(args, message):
    result = get_flops(DGE, *args)
    assert result.returncode == 2 and message in result.stderr and 'Traceback' not in result.stderr
