"""The frameworks' inferencers run with our configs, on arrays, paths, folders and batches."""

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmdet.apis import DetInferencer
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmpretrain import FeatureExtractor, ImageClassificationInferencer
from mmseg.apis import MMSegInferencer

import mmdyn

ROOT = Path(mmdyn.__file__).parents[1]
CONFIGS = [  # one of each pipeline; test_configs.py looks at the names in all of them
    'cfvit/cf-deit-small-7x7_8xb128_in1k-224px.py',
    'cfvit/cf-lvvit-small-9x9-tokenlabel_8xb128_in1k-288px.py',
    'cfvit/lvvit-small_8xb128_in1k-224px.py',
    'dge/pvt-small-dge_8xb16_in1k-256px.py',
    'dge/mask-rcnn_pvt-s-dge_fpn_1x_coco.py',
    'dge/retinanet_pvt-s-dge_fpn_1x_coco.py',
    'dge/fpn_pvt-s-dge_8xb4-80k_ade20k-512x512.py',
    'demo/mask-rcnn_pvt-mini-dge_overfit-coco.py',
    'demo/fpn_pvt-mini-dge_overfit-ade.py',
    'demo/pvt-mini_cifar10.py',
]
INFERENCERS = dict(mmpretrain=ImageClassificationInferencer, mmdet=DetInferencer, mmseg=MMSegInferencer)


def load(name):
    cfg = Config.fromfile(ROOT / 'configs' / name)
    init_default_scope(cfg.default_scope)
    return cfg


@pytest.fixture
def images(tmp_path):
    """A folder of two images, their paths, and themselves."""
    rng = np.random.default_rng(0)
    arrays = [rng.integers(0, 255, (64, 64, 3), np.uint8) for _ in range(2)]
    paths = [str(tmp_path / f'{i}.png') for i in range(2)]
    for path, array in zip(paths, arrays, strict=True):
        cv2.imwrite(path, array)
    return str(tmp_path), paths, arrays


@pytest.mark.parametrize('name', CONFIGS)
def test_configs_have_a_pipeline_for_them(name, images):
    cfg = load(name)
    inferencer = INFERENCERS[cfg.default_scope].__new__(INFERENCERS[cfg.default_scope])
    pipeline = inferencer._init_pipeline(cfg)
    given = dict(img=images[2][0], img_shape=(64, 64), ori_shape=(64, 64))
    packed = pipeline(given if cfg.default_scope == 'mmpretrain' else images[1][0])
    assert packed['inputs'].shape[0] == 3 and 'data_samples' in packed


@pytest.mark.parametrize('name', ['pvt-mini-dge_digits', 'vit-mini_digits', 'cf-vit-mini_digits'])
def test_classification(name, images):
    folder, paths, arrays = images
    classify = ImageClassificationInferencer(load(f'demo/{name}.py'), pretrained=False, device='cpu')
    one, both = classify(arrays[0]), classify(arrays, batch_size=2)
    assert len(one) == 1 and [len(result['pred_scores']) for result in both] == [10, 10]
    alone = [one[0], *classify(paths[1])]
    for results in (alone, classify(paths, batch_size=2)):
        for result, expected in zip(results, both, strict=True):
            assert np.allclose(result['pred_scores'], expected['pred_scores'], atol=1e-4)
    assert len(classify(folder)) == 2


@pytest.mark.parametrize('name, widths', [('pvt-mini-dge_digits', [192]), ('cf-vit-mini_digits', [64, 64])])
def test_features(name, widths, images):
    folder, paths, arrays = images
    extract = FeatureExtractor(load(f'demo/{name}.py'), pretrained=False, device='cpu')
    both = extract(arrays, batch_size=2)
    assert [[out.shape[-1] for out in outs] for outs in both] == [widths] * 2
    for inputs in (paths, folder):
        assert len(extract(inputs)) == 2
    assert all(torch.allclose(one, other, atol=1e-4) for one, other in zip(extract(paths[0])[0], both[0], strict=True))


def test_detection(images):
    folder, paths, arrays = images
    cfg = load('demo/mask-rcnn_pvt-mini-dge_digits.py')
    cfg.model.test_cfg.rcnn.score_thr = 0.0
    detect = DetInferencer(cfg, device='cpu', show_progress=False)
    one, both = detect(arrays[0])['predictions'], detect(arrays, batch_size=2)['predictions']
    assert len(one) == 1 and len(both) == 2 and set(one[0]) == {'bboxes', 'labels', 'masks', 'scores'}
    assert len(one[0]['scores']) == cfg.model.test_cfg.rcnn.max_per_img
    for inputs in (paths, folder):
        results = detect(inputs, batch_size=2)['predictions']
        assert sorted(len(result['scores']) for result in results) == sorted(len(result['scores']) for result in both)


def test_segmentation(images):
    folder, paths, arrays = images
    segment = MMSegInferencer(load('demo/fpn_pvt-mini-dge_digits.py'), device='cpu', dataset_name='ade20k')
    both = segment(arrays, batch_size=2)['predictions']
    assert segment(arrays[0])['predictions'].shape == (64, 64) and np.shape(both) == (2, 64, 64)
    assert np.array_equal(segment(paths, batch_size=2)['predictions'], both)
    assert np.shape(segment(folder)['predictions']) == (2, 64, 64)
