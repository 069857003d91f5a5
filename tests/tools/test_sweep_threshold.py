import csv
import importlib.util
import json
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS

import mmdyn

ROOT = Path(mmdyn.__file__).parents[1]
spec = importlib.util.spec_from_file_location('sweep_threshold', ROOT / 'tools/analysis_tools/sweep_threshold.py')
sweep_threshold = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sweep_threshold)

CONFIG = """
default_scope = 'mmpretrain'
data_preprocessor = dict(mean=[127.5] * 3, std=[64.] * 3, to_rgb=True)
model = dict(
    type='mmdyn.CoarseToFineClassifier',
    backbone=dict(
        type='mmdyn.CFViT', coarse_size=2, patch_size=4, ema_start=1,
        arch=dict(family='deit', embed_dim=16, depth=2, num_heads=2, mlp_ratio=2)),
    head=dict(type='LinearClsHead', num_classes=3, in_channels=16),
    test_cfg=dict(threshold=0.3))
test_dataloader = dict(
    batch_size=8, num_workers=0, sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(type='CustomDataset', data_root={root!r}, with_label={labels},
                 pipeline=[dict(type='mmdyn.LoadImageFromFile'), dict(type='PackInputs')]))
test_evaluator = dict(type='Accuracy')
test_cfg = dict()
"""


@pytest.fixture
def example(tmp_path, randomise):
    """A config of random images, and a checkpoint."""
    rng = np.random.default_rng(0)
    for i in range(30):
        path = tmp_path / f'images/{i % 3}/{i}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        colour = rng.integers(0, 128, 3)
        cv2.imwrite(str(path), rng.integers(colour, colour + 128, (16, 16, 3), np.uint8))
    (tmp_path / 'cfvit.py').write_text(CONFIG.format(root=str(tmp_path / 'images'), labels=True))
    model = randomise(MODELS.build(Config.fromfile(tmp_path / 'cfvit.py').model), 0.6)
    torch.save(dict(state_dict=model.state_dict()), tmp_path / 'model.pth')
    return tmp_path


@pytest.fixture
def sweep(example, monkeypatch, capsys):
    """Run the tool; returns what it prints and what it writes."""

    def run(*args):
        monkeypatch.setattr(
            sys,
            'argv',
            [
                'sweep_threshold.py',
                str(example / 'cfvit.py'),
                str(example / 'model.pth'),
                '--out',
                str(example / 'out'),
                *args,
            ],
        )
        sweep_threshold.main()
        return capsys.readouterr().out, json.loads((example / 'out/curve.json').read_text())

    return run


@torch.no_grad()
def classify(folder, threshold):
    """(share that stops, per cent right, multiply-adds) of a classifier with this threshold."""
    cfg = Config.fromfile(folder / 'cfvit.py')
    model = MODELS.build(
        dict(
            cfg.model,
            data_preprocessor=dict(cfg.data_preprocessor, type='ClsDataPreprocessor'),
            test_cfg=dict(threshold=threshold),
        )
    ).eval()
    model.load_state_dict(torch.load(folder / 'model.pth')['state_dict'])
    stopped, right, macs, files = 0, 0, 0, sorted((folder / 'images').rglob('*.png'))
    for file in files:
        image = torch.from_numpy(cv2.imread(str(file))).permute(2, 0, 1)
        (sample,) = model.test_step(dict(inputs=[image]))
        stopped += sample.exit_stage == 0
        right += sample.pred_label.item() == int(file.parent.name)
        macs += sample.macs
    return stopped / len(files), 100 * right / len(files), macs / len(files)


def test_curve_is_what_the_classifier_does(sweep, example):
    printed, result = sweep()
    curve = result['curve']
    assert result['images'] == 30 and len(curve['threshold']) == 1001
    assert len(set(curve['exit_share'])) > 10 and len(set(curve['top1'])) > 1
    for index in (0, 400, 500, 650, 800, 900, 1000):
        assert curve['threshold'][index] == index / 1000
        wanted = classify(example, index / 1000)
        assert [curve[name][index] for name in ('exit_share', 'top1', 'macs')] == pytest.approx(wanted), index
    assert (curve['exit_share'][0], curve['exit_share'][-1]) == (1, 0)
    assert curve['macs'][-1] - curve['macs'][0] == result['fine_macs']

    rows = list(csv.DictReader((example / 'out/curve.csv').read_text().splitlines()))
    assert {name: [float(row[name]) for row in rows] for name in rows[0]} == curve
    table = [line.split() for line in printed.split('multiply-adds, G\n')[1].splitlines()[:11]]
    assert [float(row[0]) for row in table] == [i / 10 for i in range(11)]
    assert [float(row[2]) for row in table] == pytest.approx(curve['top1'][::100], abs=0.005)
    assert cv2.imread(str(example / 'out/curve.png')).std() > 0


def test_budget_and_accuracy(sweep, example):
    _, result = sweep()
    first, last = result['coarse_macs'], result['coarse_macs'] + result['fine_macs']
    best = max(result['curve']['top1'])
    printed, result = sweep('--flops', f'{(first + last) / 2e3}K', '--top1', str(best - 1e-9))
    curve, chosen = result['curve'], result['chosen']
    points = list(zip(curve['top1'], curve['macs']))
    assert chosen['flops']['macs'] <= (first + last) / 2 < last
    assert chosen['flops']['top1'] >= max(top1 for top1, macs in points if macs <= (first + last) / 2)
    assert chosen['top1']['top1'] >= best - 1e-9
    assert chosen['top1']['macs'] <= min(macs for top1, macs in points if top1 >= best - 1e-9)
    for name, point in chosen.items():
        wanted = classify(example, point['threshold'])
        assert (point['exit_share'], point['top1'], point['macs']) == pytest.approx(wanted)
        assert f'--{name} is met by' in printed


@pytest.mark.parametrize(
    'args, message',
    [
        (
            ('--flops', '1K'),
            r'--flops: No threshold brings the multiply-adds down to 1e-06 G: they range from [\d.e-]+ G',
        ),
        (
            ('--top1', '100.5'),
            r'--top1: No threshold reaches 100.5 % top-1: the accuracy ranges from [\d.]+ to [\d.]+ %',
        ),
        (('--cfg-options', 'model.type=ImageClassifier'), 'the model is a ImageClassifier: give the config of'),
        (('--cfg-options', 'test_dataloader=None'), 'no test_dataloader'),
    ],
)
def test_what_cannot_be_done(sweep, args, message):
    with pytest.raises(SystemExit, match=message):
        sweep(*args)


def test_images_without_labels(sweep, example):
    (example / 'cfvit.py').write_text(CONFIG.format(root=str(example / 'images'), labels=False))
    with pytest.raises(SystemExit, match='have no labels'):
        sweep()


@pytest.mark.parametrize('text', ['2.0', 'G', '', 'muchG'])
def test_budget_without_unit(sweep, text, capsys):
    with pytest.raises(SystemExit):
        sweep('--flops', text)
    assert 'give a number and K, M or G, e.g. 2.0G' in capsys.readouterr().err
