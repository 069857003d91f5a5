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
from torch import nn

import mmdyn

ROOT = Path(mmdyn.__file__).parents[1]
spec = importlib.util.spec_from_file_location('sweep_budget', ROOT / 'tools/analysis_tools/sweep_budget.py')
sweep_budget = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sweep_budget)

CONFIG = """
default_scope = 'mmpretrain'
model = dict(
    type='ImageClassifier', data_preprocessor=dict(num_classes=3, mean=[127.5] * 3, std=[64.] * 3),
    backbone=dict(
        type='mmdyn.PVT', img_size=32, out_type='cls_token', dge={dge},
        arch=dict(embed_dims=(16, 24), depths=(2, 1), num_heads=(2, 3), mlp_ratios=(2, 3), sr_ratios=(2, 1))),
    head=dict(type='LinearClsHead', num_classes=3, in_channels=24))
test_dataloader = dict(
    batch_size=8, num_workers=0, sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(type='CustomDataset', data_root={root!r},
                 pipeline=[dict(type='LoadImageFromFile'), dict(type='PackInputs')]))
test_evaluator = [dict(type='Accuracy', topk=(1, 2)), dict(type='mmdyn.DynamicFLOPs')]
test_cfg = dict()
"""


@pytest.fixture
def example(tmp_path, randomise):
    """A config of random images, and two checkpoints whose routers choose by the image."""
    rng = np.random.default_rng(0)
    for i in range(20):
        path = tmp_path / f'images/{i % 3}/{i}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), rng.integers(0, rng.integers(20, 256, (32, 32, 1)), (32, 32, 3), np.uint8))
    (tmp_path / 'pvt.py').write_text(CONFIG.format(root=str(tmp_path / 'images'), dge=dict(granularities=(1, 2, 4))))
    for name in ('first', 'second'):
        model = randomise(MODELS.build(Config.fromfile(tmp_path / 'pvt.py').model))
        for encoder in encoders_of(model):
            nn.init.normal_(encoder.router.weight, std=1.0)
        torch.save(dict(state_dict=model.state_dict()), tmp_path / f'{name}.pth')
    return tmp_path


def encoders_of(model):
    return [module for module in model.modules() if hasattr(module, 'router')]


@pytest.fixture
def sweep(example, monkeypatch, capsys):
    """Run the tool; returns what it prints and the rows that it writes."""

    def run(*args, checkpoints=('first',)):
        monkeypatch.setattr(
            sys,
            'argv',
            [
                'sweep_budget.py',
                str(example / 'pvt.py'),
                *(str(example / f'{name}.pth') for name in checkpoints),
                '--out',
                str(example / 'out'),
                *args,
            ],
        )
        sweep_budget.main()
        return capsys.readouterr().out, json.loads((example / 'out/sweep.json').read_text())['rows']

    return run


@torch.no_grad()
def measured_alone(folder, checkpoint='first', images=slice(None), **budget):
    """Top-1, mean query ratio and 1e9 multiply-adds of images, one after the other."""
    model = MODELS.build(Config.fromfile(folder / 'pvt.py').model).eval()
    model.load_state_dict(torch.load(folder / f'{checkpoint}.pth')['state_dict'])
    model.backbone.set_budget(**budget)
    right, ratios, macs, files = 0, [], [], sorted((folder / 'images').rglob('*.png'))[images]
    for file in files:
        (sample,) = model.test_step(dict(inputs=[torch.from_numpy(cv2.imread(str(file))).permute(2, 0, 1)]))
        right += sample.pred_label.item() == int(file.parent.name)
        ratios.append(model.backbone.cost.query_ratio.item()), macs.append(model.backbone.cost.spent.item() / 1e9)
    return 100 * right / len(files), sum(ratios) / len(files), sum(macs) / len(files)


def test_each_row_is_a_test_at_its_budget(sweep, example):
    """With the prices that were written, as a config would use them."""
    out, rows = sweep('--budgets', '0.35', '0.6')
    file = str(example / 'out/prices.json')
    assert [(row['mode'], row['budget']) for row in rows] == [
        ('router', None),
        *((mode, budget) for mode in ('average', 'exact', 'equal') for budget in (0.35, 0.6)),
    ]
    for row in rows:
        options = dict(router={}, average=dict(mode='average', prices=file), exact=dict(prices=file), equal={})[
            row['mode']
        ]
        top1, ratio, gflops = measured_alone(example, budget=row['budget'], **options)
        assert row['accuracy/top1'] == pytest.approx(top1) and row['query_ratio'] == pytest.approx(ratio, abs=1e-5)
        assert row['gflops'] == pytest.approx(gflops) and row['milliseconds'] > 0
        if row['mode'] == 'average':
            assert row['query_ratio'] == pytest.approx(row['budget'], abs=0.03)
        assert f'{row["query_ratio"]:9.3f}' in out
    assert out.splitlines()[0].split() == ['checkpoint', 'mode', 'budget', 'queries', 'G', 'ms', 'accuracy/top1']
    with open(example / 'out/sweep.csv') as lines:
        assert [row['mode'] for row in csv.DictReader(lines)] == [row['mode'] for row in rows]
    assert cv2.imread(str(example / 'out/sweep.png')).shape[1] == 1500
    assert json.loads((example / 'out/prices.json').read_text())['checkpoint'] == 'first.pth'


def test_prices_are_measured_on_images_of_all_classes(sweep, example):
    """Data are sorted by class, and the first images of the first."""
    rng = np.random.default_rng(0)
    for file in (example / 'images').rglob('*.png'):  # regions that are told apart
        cv2.imwrite(str(file), rng.integers(0, 256, (4, 4, 3), np.uint8).repeat(8, 0).repeat(8, 1))
    sweep('--budgets', '0.5', '--modes', 'average', '--images', '10')
    prices = json.loads((example / 'out/prices.json').read_text())
    (as_trained,) = (ratio for price, ratio in zip(prices['price'], prices['query_ratio']) if price == 0)
    every_second, first = slice(None, None, 2), slice(10)
    assert as_trained == pytest.approx(measured_alone(example, images=every_second, budget=None)[1])
    assert as_trained != pytest.approx(measured_alone(example, images=first, budget=None)[1])


def test_routers_have_the_colour_of_their_checkpoint(monkeypatch, tmp_path):
    """A star of its own, whatever the order of modes is."""
    figures, row = [], dict(gflops=0.5, milliseconds=1.0, m=1.0)
    monkeypatch.setattr(sweep_budget.Figure, 'savefig', lambda figure, path, dpi: figures.append(figure))
    modes = [('a', 'router'), ('a', 'average'), ('a', 'exact'), ('b', 'router'), ('b', 'average'), ('c', 'router')]
    sweep_budget.draw([dict(row, checkpoint=name, mode=mode) for name, mode in modes], 'm', tmp_path / 'x.png')
    for axes in figures[0].axes:
        colour = {line.get_label(): line.get_color() for line in axes.get_lines()}
        assert list(colour) == [f'{name}, {mode}' for name, mode in modes]
        assert colour['a, router'] == colour['a, average'] and colour['b, router'] == colour['b, average']
        assert len(set(colour.values())) == 4
    assert figures[0].axes[0].get_xlabel() == 'multiply-adds of the backbone (M)'


def test_checkpoints_together(sweep, example):
    _, rows = sweep('--budgets', '0.5', '--modes', 'equal', '--images', '5', checkpoints=('first', 'second'))
    assert [(row['checkpoint'], row['mode']) for row in rows] == [
        (name, mode) for name in ('first', 'second') for mode in ('router', 'equal')
    ]
    for row in rows:
        assert row['accuracy/top1'] == pytest.approx(
            measured_alone(example, row['checkpoint'], budget=row['budget'])[0]
        )
    assert {path.name for path in (example / 'out').glob('prices*')} == {'prices_0_first.json', 'prices_1_second.json'}


def test_budgets_that_the_granularities_reach_are_the_default(sweep):
    _, rows = sweep('--modes', 'equal', '--metric', 'accuracy/top2', '--images', '4')
    assert [row['budget'] for row in rows] == [None, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]


def test_routing_by_layer_has_no_exact_budget(sweep, example, capsys):
    (example / 'pvt.py').write_text(
        CONFIG.format(root=str(example / 'images'), dge=dict(granularities=(1, 2, 4), routing='layer'))
    )
    _, rows = sweep('--budgets', '0.5', '--images', '4')
    assert {row['mode'] for row in rows} == {'router', 'average'}
    with pytest.raises(SystemExit) as end:
        sweep('--budgets', '0.5', '--modes', 'exact')
    assert end.value.code == 2 and "routing='layer' makes one decision" in capsys.readouterr().err


@pytest.mark.parametrize(
    'args, checkpoints, message',
    [
        (['--budgets', '0.01'], ['first'], 'budget=0.01 cannot be reached: on images of img_size the granularities'),
        (['--images', '0'], ['first'], '--images 0: give the number of images'),
        (
            ['--metric', 'mIoU', '--budgets', '0.5', '--modes', 'equal'],
            ['first'],
            r"no metric mIoU: choose from ['accuracy/top1",
        ),
        ([], ['third'], 'There is no checkpoint'),
        (['--cfg-options', 'test_evaluator=None'], ['first'], 'the config has no test_evaluator'),
        (['--cfg-options', 'model.backbone.dge=None'], ['first'], 'The model has 0 backbones with DGE'),
    ],
)
def test_mistakes(args, checkpoints, message, sweep, capsys):
    with pytest.raises(SystemExit) as end:
        sweep(*args, checkpoints=checkpoints)
    assert end.value.code == 2 and message in capsys.readouterr().err
