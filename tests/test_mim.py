"""The commands of the README, from another folder, on a handful of images."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmengine.runner import CheckpointLoader

import mmdyn

ROOT = Path(mmdyn.__file__).parents[1]
MIM = Path(sys.executable).with_name('mim')
CONFIG = 'pvt-mini-dge_digits.py'
BUDGET = "custom_hooks = [dict(type='mmdyn.BudgetHook', budget=0.25, weight=2.)]"
DETECTOR = f"""
_base_ = '{ROOT}/configs/demo/mask-rcnn_pvt-mini-dge_digits.py'
load_from = None
model = dict(test_cfg=dict(rcnn=dict(score_thr=0.)))
# All images are one batch, of which there is none without the empty one.
train_dataloader = dict(batch_size=5, drop_last=True, dataset=dict(filter_cfg=dict(filter_empty_gt=False)))
train_cfg = dict(max_epochs=1, val_interval=1)
default_hooks = dict(logger=dict(interval=1), checkpoint=dict(interval=1))
{BUDGET}
tta_model = dict(type='mmdyn.MaskTTAModel', tta_cfg=dict(nms=dict(type='nms', iou_threshold=0.5), max_per_img=20))
flips = [dict(type='RandomFlip', prob=1.), dict(type='RandomFlip', prob=0.)]
keys = ('img_id', 'ori_shape', 'img_shape', 'scale_factor', 'flip', 'flip_direction')
pack = dict(type='PackDetInputs', meta_keys=keys)
tta_pipeline = [*_base_.test_pipeline[:2], dict(type='TestTimeAug', transforms=[flips, [pack]])]
"""
SEGMENTOR = f"""
_base_ = '{ROOT}/configs/demo/fpn_pvt-mini-dge_digits.py'
load_from = None
train_dataloader = dict(batch_size=2)
train_cfg = dict(max_iters=2, val_interval=2)
default_hooks = dict(logger=dict(interval=1), checkpoint=dict(interval=2))
{BUDGET}
"""


def with_dge(kind, side, **options):
    return dict(
        _delete_=True,
        type='mmdyn.WithDGE',
        backbone=dict(type=kind, **options),
        dge=dict(granularities=(1, 2)),
        img_size=side,
    )


# Models of other libraries, small: the demo's config, and what of its model is another.
DETECTOR_OF, SEGMENTOR_OF, CLASSIFIER_OF = 'mask-rcnn_pvt-mini_digits', 'fpn_pvt-mini_digits', 'pvt-mini_digits'
MM_PYRAMID = dict(embed_dims=32, num_layers=[1, 1, 1, 1], num_heads=[1, 2, 4, 6])
MM_SWIN = dict(embed_dims=32, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8), window_size=4)
MM_VIT = dict(
    img_size=64,
    patch_size=8,
    out_type='cls_token',
    arch=dict(embed_dims=64, num_layers=2, num_heads=4, feedforward_channels=128),
)
CLS_SWIN = dict(img_size=64, window_size=2, arch=dict(embed_dims=32, depths=[1, 1, 1, 1], num_heads=[1, 2, 4, 8]))
TIMM_VIT = dict(
    model_name='vit_tiny_patch16_224',
    img_size=64,
    patch_size=8,
    embed_dim=64,
    depth=2,
    num_heads=4,
    num_classes=10,
    weight_init='jax',
)
OF_SWIN = dict(neck=dict(in_channels=[32, 64, 128, 256]))
FAMILIES = {
    'mmdet-pvt': (
        DETECTOR_OF,
        dict(backbone=with_dge('mmdet.PyramidVisionTransformer', 128, pretrain_img_size=128, **MM_PYRAMID)),
    ),
    'mmdet-pvtv2': (DETECTOR_OF, dict(backbone=with_dge('mmdet.PyramidVisionTransformerV2', 128, **MM_PYRAMID))),
    'mmdet-swin': (DETECTOR_OF, dict(OF_SWIN, backbone=with_dge('mmdet.SwinTransformer', 128, **MM_SWIN))),
    'mmseg-mit': (SEGMENTOR_OF, dict(backbone=with_dge('mmseg.MixVisionTransformer', 128, **MM_PYRAMID))),
    'mmseg-swin': (SEGMENTOR_OF, dict(OF_SWIN, backbone=with_dge('mmseg.SwinTransformer', 128, **MM_SWIN))),
    'mmpretrain-vit': (
        CLASSIFIER_OF,
        dict(backbone=with_dge('mmpretrain.VisionTransformer', 64, **MM_VIT), head=dict(in_channels=64)),
    ),
    'mmpretrain-deit3': (
        CLASSIFIER_OF,
        dict(backbone=with_dge('mmpretrain.DeiT3', 64, **MM_VIT), head=dict(in_channels=64)),
    ),
    'mmpretrain-swin': (
        CLASSIFIER_OF,
        dict(
            backbone=with_dge('mmpretrain.SwinTransformer', 64, **CLS_SWIN),
            neck=dict(type='GlobalAveragePooling'),
            head=dict(in_channels=256),
        ),
    ),
    'timm-vit': (
        CLASSIFIER_OF,
        dict(
            with_dge('mmpretrain.TimmClassifier', 64, **TIMM_VIT),
            data_preprocessor=dict(mean=[127.5] * 3, std=[64.0] * 3),
        ),
    ),
}
FRAMEWORKS = {DETECTOR_OF: 'mmdet', SEGMENTOR_OF: 'mmseg', CLASSIFIER_OF: 'mmpretrain'}
IN_40_ITERATIONS = """
train_dataloader = dict(batch_size=4, sampler=dict(type='InfiniteSampler'))
train_cfg = dict(_delete_=True, by_epoch=False, max_iters=40, val_interval=40)
param_scheduler = None
# So few iterations move a router only with steps and a weight as large as these.
optim_wrapper = dict(paramwise_cfg=dict(custom_keys={'.router': dict(lr_mult=100.0)}))
custom_hooks = [dict(type='mmdyn.BudgetHook', budget=0.5, weight=10.0)]
default_hooks = dict(
    logger=dict(interval=1, log_metric_by_epoch=False), checkpoint=dict(interval=20, by_epoch=False, save_best=None)
)
log_processor = dict(by_epoch=False, window_size=1)
"""


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A folder that holds the demo data, with two images of each class, and small configs of dense prediction."""
    folder = tmp_path_factory.mktemp('user')
    subprocess.run(
        [
            sys.executable,
            ROOT / 'tools/dataset_tools/make_demo_dataset.py',
            '--cls-train',
            '20',
            '--cls-val',
            '20',
            '--dense-train',
            '4',
            '--dense-val',
            '2',
        ],
        cwd=folder,
        check=True,
    )
    # One more image for the detector: of another size, and without an object.
    coco = folder / 'data/demo/coco'
    cv2.imwrite(str(coco / 'train2017/empty.png'), np.full((60, 100, 3), 90, np.uint8))
    annotations = json.loads((coco / 'annotations/instances_train2017.json').read_text())
    annotations['images'].append(dict(id=5, file_name='empty.png', height=60, width=100))
    (coco / 'annotations/instances_train2017.json').write_text(json.dumps(annotations))
    (folder / 'detector.py').write_text(DETECTOR)
    (folder / 'segmentor.py').write_text(SEGMENTOR)
    return folder


def mim(folder, *args):
    result = subprocess.run(
        [str(MIM), *map(str, args)],
        cwd=folder,
        capture_output=True,
        text=True,
        env={**os.environ, 'OMP_NUM_THREADS': '1'},
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result.stdout + result.stderr


def distribution(module):
    """What pip and mim call a framework: forks have names of their own."""
    return packages_distributions()[module][0]


def trainer(module):
    """The package whose tools train: the fork's of mmseg find none of its configs that others inherit from."""
    package = distribution(module)
    return 'mmdyn' if module == 'mmseg' and package.startswith('onedl') else package


def classification(epochs=1):
    return [
        '--cfg-options',
        f'train_cfg.max_epochs={epochs}',
        'train_cfg.val_interval=1',
        'train_dataloader.batch_size=4',
        'default_hooks.logger.interval=1',
    ]


def logged(work_dir):
    """What a training logged: of each iteration, and of the validation."""
    (path,) = Path(work_dir).glob('*/vis_data/scalars.json')
    *iterations, validation = map(json.loads, path.read_text().splitlines())
    return iterations, validation


def metrics(work_dir):
    newest = max(Path(work_dir).glob('*/*.json'), key=lambda path: path.stat().st_mtime)
    return json.loads(newest.read_text().splitlines()[-1])


@pytest.fixture(scope='module')
def trained(folder):
    """Trained for one epoch by `mim train mmdyn` with the config's bare name."""
    log = mim(folder, 'train', 'mmdyn', CONFIG, '--work-dir', 'run', *classification(), 'load_from=None')
    assert 'loss_budget' in log and 'query_ratio' in log
    return folder / 'run/epoch_1.pth'


@pytest.mark.parametrize('package', ['mmdyn', 'mmpretrain'])
def test_mim_test_reads_the_checkpoint(folder, trained, package):
    config = CONFIG if package == 'mmdyn' else ROOT / 'configs/demo' / CONFIG
    known_as = package if package == 'mmdyn' else distribution(package)
    mim(folder, 'test', known_as, config, '--checkpoint', trained, '--work-dir', package, *classification())
    result = metrics(folder / package)
    assert 0 <= result['accuracy/top1'] <= 100
    assert 0 < result['flops/gflops'] <= result['flops/gflops_dense'] * 1.01


def test_mim_train_resumes(folder, trained):
    shutil.copytree(trained.parent, folder / 'resumed')
    log = mim(
        folder,
        'train',
        distribution('mmpretrain'),
        ROOT / 'configs/demo' / CONFIG,
        '--work-dir',
        'resumed',
        '--resume',
        'auto',
        *classification(epochs=2),
    )
    steps = re.findall(r'Epoch\(train\) +\[(\d)\]\[ *(\d)/5\]', log)
    assert [step for step in steps if step[0] == '2'] == steps[-5:] == [('2', str(i)) for i in range(1, 6)]
    assert 'resumed epoch: 1, iter: 5' in log
    assert torch.load(folder / 'resumed/epoch_2.pth')['meta']['iter'] == 10


def assert_budget_logged(log, iterations):
    assert 'loss_budget' in log and 'query_ratio' in log
    # Of later iterations, the log has means.
    ratio, loss = (iterations[0][name] for name in ('query_ratio', 'loss_budget'))
    assert 0 < ratio <= 1 and math.isclose(loss, 2 * (ratio - 0.25) ** 2, rel_tol=1e-4)


def assert_measured(result, quality):
    for name in quality:
        assert 0 <= result[name] <= 100
    assert 0 < result['flops/query_ratio'] <= 1
    assert 0 < result['flops/gflops'] <= result['flops/gflops_dense'] * 1.01


def test_mim_trains_and_tests_a_detector(folder):
    pytest.importorskip('mmdet')
    log = mim(folder, 'train', distribution('mmdet'), 'detector.py', '--work-dir', 'detector')
    iterations, validation = logged(folder / 'detector')
    assert len(iterations) == 1
    assert_budget_logged(log, iterations)
    assert_measured(validation, ['coco/bbox_mAP', 'coco/segm_mAP'])
    mim(folder, 'test', 'mmdyn', 'detector.py', '--checkpoint', 'detector/epoch_1.pth', '--work-dir', 'tta', '--tta')
    flipped_too = metrics(folder / 'tta')
    assert_measured(flipped_too, ['coco/bbox_mAP', 'coco/segm_mAP'])
    # Each image passes twice: flipped and not.
    assert math.isclose(flipped_too['flops/gflops_dense'], 2 * validation['flops/gflops_dense'])


def test_mim_trains_and_tests_a_segmentor(folder):
    pytest.importorskip('mmseg')
    log = mim(folder, 'train', trainer('mmseg'), 'segmentor.py', '--work-dir', 'segmentor')
    iterations, validation = logged(folder / 'segmentor')
    assert len(iterations) == 2
    assert_budget_logged(log, iterations)
    assert_measured(validation, ['mIoU'])
    mim(
        folder,
        'test',
        'mmdyn',
        'segmentor.py',
        '--checkpoint',
        'segmentor/iter_2.pth',
        '--work-dir',
        'slide',
        '--cfg-options',
        'model.test_cfg.mode=slide',
        'model.test_cfg.crop_size=(96,96)',
        'model.test_cfg.stride=(32,32)',
    )
    windows = metrics(folder / 'slide')
    assert_measured(windows, ['mIoU'])
    # Four windows of 96 x 96 pixels, which cost less than their share of an image of 128 x 128: fewer keys.
    assert 1.5 < windows['flops/gflops_dense'] / validation['flops/gflops_dense'] < 4 * 96**2 / 128**2


@pytest.mark.skipif('MMDYN_MIM_FAMILIES' not in os.environ, reason='takes minutes: MMDYN_MIM_FAMILIES=1 runs it')
@pytest.mark.parametrize('name', FAMILIES)
def test_mim_trains_models_of_other_libraries(folder, name):
    """To the budget, with a checkpoint from which it goes on."""
    base, model = FAMILIES[name]
    pytest.importorskip(FRAMEWORKS[base])
    text = f"_base_ = '{ROOT}/configs/demo/{base}.py'\nmodel = {model}\n{IN_40_ITERATIONS}"
    (folder / f'{name}.py').write_text(text)
    package, run = trainer(FRAMEWORKS[base]), folder / name
    mim(folder, 'train', package, f'{name}.py', '--work-dir', name)
    iterations, validation = logged(run)
    assert [line['step'] for line in iterations] == list(range(1, 41))
    assert all(math.isfinite(line['loss']) and line['loss_budget'] >= 0 for line in iterations)
    last = [line['query_ratio'] for line in iterations[-10:]]  # of four images each
    assert iterations[0]['query_ratio'] > 0.9 and abs(sum(last) / len(last) - 0.5) < 0.1
    assert_measured(validation, [])
    (run / 'iter_40.pth').unlink()
    (run / 'last_checkpoint').write_text(str(run / 'iter_20.pth'))
    log = mim(folder, 'train', package, f'{name}.py', '--work-dir', name, '--resume')
    assert 'resumed epoch: 0, iter: 20' in log and (run / 'iter_40.pth').is_file()


def test_the_safe_loader_stays_on(trained, tmp_path):
    checkpoint = torch.load(trained, weights_only=True)
    assert checkpoint['message_hub']['log_scalars']['train/loss'].current() > 0

    class Evil:
        def __reduce__(self):
            return os.system, ('true',)

    torch.save(dict(state_dict=Evil()), tmp_path / 'evil.pth')
    for load in (torch.load, CheckpointLoader.load_checkpoint):
        with pytest.raises(Exception, match='Weights only load failed'):
            load(str(tmp_path / 'evil.pth'))
