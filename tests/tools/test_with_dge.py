"""The tools on a model whose backbone is another library's, in ``mmdyn.WithDGE``."""

import importlib.util
import json
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from torch import nn

import mmdyn
from mmdyn.analysis.flops import build_model, count_macs, report
from mmdyn.analysis.synthetic import force_routing
from mmdyn.models.adapters.apply import applied_to

ROOT = Path(mmdyn.__file__).parents[1]
CONFIG = """
default_scope = 'mmpretrain'
model = dict(
    type='ImageClassifier', data_preprocessor=dict(num_classes=3, mean=[127.5] * 3, std=[64.] * 3),
    backbone=dict(
        type='mmdyn.WithDGE', dge=dict(granularities=(1, 2)),
        backbone=dict(
            type='VisionTransformer', img_size=32, patch_size=4,
            init_cfg=dict(type='Pretrained', checkpoint='none.pth'),
            arch=dict(embed_dims=16, num_layers=2, num_heads=2, feedforward_channels=32))),
    head=dict(type='LinearClsHead', num_classes=3, in_channels=16))
test_dataloader = dict(
    batch_size=4, num_workers=0, sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(type='CustomDataset', data_root={root!r},
                 pipeline=[dict(type='LoadImageFromFile'), dict(type='PackInputs')]))
test_evaluator = [dict(type='Accuracy', topk=1), dict(type='mmdyn.DynamicFLOPs')]
test_cfg = dict()
"""


@pytest.fixture
def example(tmp_path, randomise):
    """A config of random images, and a checkpoint whose routers choose by the image."""
    rng = np.random.default_rng(0)
    for i in range(8):
        path = tmp_path / f'images/{i % 3}/{i}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), rng.integers(0, rng.integers(20, 256, (32, 32, 1)), (32, 32, 3), np.uint8))
    (tmp_path / 'vit.py').write_text(CONFIG.format(root=str(tmp_path / 'images')))
    model = randomise(build_model(Config.fromfile(tmp_path / 'vit.py')))
    for router in [module.router for module in model.modules() if hasattr(module, 'router')]:
        nn.init.normal_(router.weight, std=3.0)
        nn.init.zeros_(router.bias)
    torch.save(dict(state_dict=model.state_dict()), tmp_path / 'vit.pth')
    return tmp_path


@pytest.fixture
def run(example, monkeypatch, capsys):
    """Run a tool on the example; returns what it prints."""

    def main(tool, *args):
        spec = importlib.util.spec_from_file_location(Path(tool).stem, ROOT / 'tools' / tool)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        monkeypatch.setattr(sys, 'argv', [tool, *map(str, args)])
        module.main()
        return capsys.readouterr().out

    return main


def test_get_flops(example, run):
    told = json.loads(run('analysis_tools/get_flops.py', example / 'vit.py', '--query-ratio', '0.5', '--json'))
    model = build_model(Config.fromfile(example / 'vit.py'), dense=True)
    assert told['flops_dense'] == count_macs(model, (32, 32)) == mmdyn.cost(model).dense + 16 * 3
    assert told['params'] - told['params_dense'] == 2 * 2 * (16 + 1)
    queries = sum(layer['flops_queries'] for layer in told['layers'])
    assert told['flops_dense'] - told['flops'] == 0.5 * queries - 2 * 16 * 16 * 2  # 16 regions, 2 options, 2 routers
    cfg = Config.fromfile(example / 'vit.py')
    images = report(cfg, (32, 32), images=str(example / 'images'), checkpoint=str(example / 'vit.pth'))
    assert 0.25 < images['query_ratio'] < 1


def test_draw_gates(example, run):
    options = ['--images', example / 'images', '--out', example / 'out']
    printed = run('visualizations/draw_gates.py', example / 'vit.py', example / 'vit.pth', *options)
    assert '8 pictures' in printed
    assert cv2.imread(str(next((example / 'out').glob('*.png')))).shape[1] == 3 * (160 + 4)


def test_sweep_budget(example, run):
    options = ['--budgets', '0.5', '--out', example / 'out', '--images', '4']
    run('analysis_tools/sweep_budget.py', example / 'vit.py', example / 'vit.pth', *options)
    rows = json.loads((example / 'out/sweep.json').read_text())['rows']
    assert [row['mode'] for row in rows] == ['router', 'average', 'exact', 'equal']
    assert all(0.4 < row['query_ratio'] <= 0.5 + 1e-6 for row in rows[2:])


def test_forced_routing(example):
    model = build_model(Config.fromfile(example / 'vit.py'))
    force_routing(applied_to(model)[0], (32, 32), 0.5, 'clustered')
    with torch.no_grad():
        model(torch.zeros(1, 3, 32, 32))
    assert mmdyn.cost(model).query_ratio.item() == pytest.approx(0.5, abs=0.05)
