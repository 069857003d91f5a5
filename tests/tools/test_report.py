import importlib.util
import json
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from chromium import PATH, Chromium
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.registry import MODELS
from torch import nn
from torch.utils.data import DataLoader

import mmdyn
from mmdyn.analysis.flops import build_model, pipeline_without_annotations
from mmdyn.analysis.model_report import Gallery, budget_report
from mmdyn.visualization import data_uri, report_page

ROOT = Path(mmdyn.__file__).parents[1]
spec = importlib.util.spec_from_file_location('report', ROOT / 'tools/analysis_tools/report.py')
report_tool = importlib.util.module_from_spec(spec)
spec.loader.exec_module(report_tool)

CONFIG = """
default_scope = 'mmpretrain'
model = dict(
    type={type!r}, data_preprocessor=dict(num_classes=3, mean=[127.5] * 3, std=[64.] * 3), backbone={backbone},
    head=dict(type='LinearClsHead', num_classes=3, in_channels=16))
test_dataloader = dict(
    batch_size=8, num_workers=0, sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(type='CustomDataset', data_root={root!r},
                 pipeline=[dict(type='LoadImageFromFile'), dict(type='PackInputs')]))
test_evaluator = [dict(type='Accuracy', topk=1), dict(type='mmdyn.DynamicFLOPs')]
test_cfg = dict()
"""
ARCH = dict(embed_dim=16, depth=2, num_heads=2, mlp_ratio=2)
BACKBONES = dict(
    dge=dict(type='mmdyn.DeiT', arch=ARCH, img_size=24, patch_size=4, dge=dict(granularities=(1, 2))),
    cf=dict(type='mmdyn.CFViT', arch=dict(family='deit', **ARCH), coarse_size=3, patch_size=4, ema_start=1),
)


@pytest.fixture
def example(tmp_path, randomise):
    """A config of random images and a checkpoint, by the kind of model."""

    def make(kind):
        rng = np.random.default_rng(0)
        for i in range(12):
            path = tmp_path / f'images/{"abc"[i % 3]}/{i}.png'
            path.parent.mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(path), rng.integers(0, rng.integers(20, 256, (24, 24, 1)), (24, 24, 3), np.uint8))
        model_type = dict(dge='ImageClassifier', cf='mmdyn.CoarseToFineClassifier')[kind]
        content = CONFIG.format(type=model_type, backbone=BACKBONES[kind], root=str(tmp_path / 'images'))
        (tmp_path / f'{kind}.py').write_text(content)
        model = randomise(MODELS.build(Config.fromfile(tmp_path / f'{kind}.py').model), 0.4)
        for module in model.modules():
            if hasattr(module, 'router'):
                nn.init.normal_(module.router.weight, std=1.0)
        torch.save(dict(state_dict=model.state_dict()), tmp_path / f'{kind}.pth')
        return tmp_path / f'{kind}.py', tmp_path / f'{kind}.pth'

    return make


@pytest.fixture
def report(example, tmp_path, monkeypatch, capsys):
    """Run the tool on an example; returns what it prints, and report.json."""

    def run(kind, *args):
        config, checkpoint = example(kind)
        command = ['report.py', str(config), str(checkpoint), '--out', str(tmp_path / 'out'), '--num', '2', *args]
        monkeypatch.setattr(sys, 'argv', command)
        report_tool.main()
        return capsys.readouterr(), json.loads((tmp_path / 'out/report.json').read_text())

    return run


@pytest.fixture
def browser(tmp_path):
    """A browser of a width and a colour scheme."""
    if PATH is None:
        pytest.skip('there is no Chromium')
    opened = []

    def start(**options):
        opened.append(Chromium(tmp_path / f'browser{len(opened)}', **options))
        return opened[-1]

    yield start
    for one in opened:
        one.close()


# What the page shows: the label, the tiles, and of the first image its text, and the colour in the middle of a panel.
STATE = """(() => {
    const canvas = document.querySelector('canvas'), middle = [canvas.width / 8 | 0, canvas.height / 8 | 0];
    const now = [...document.querySelectorAll('.now')];
    return {
        label: document.getElementById('label').textContent,
        tiles: [...document.querySelectorAll('.tile b')].map(tile => tile.textContent),
        text: document.querySelector('.picture p').textContent,
        pixel: [...canvas.getContext('2d').getImageData(...middle, 1, 1).data],
        bars: [...document.querySelectorAll('.bars i')].map(bar => parseFloat(bar.style.width)),
        now: now.map(circle => [+circle.getAttribute('cx'), +circle.getAttribute('cy')]),
        dots: [...document.querySelectorAll('svg')].map(
            svg => [...svg.querySelectorAll('.dot')].map(dot => [+dot.getAttribute('cx'), +dot.getAttribute('cy')])),
        here: [...document.querySelectorAll('tr')].findIndex(row => row.className === 'here') - 1,
    };
})()"""
MOVE = "(() => {{ slider.value = {}; slider.dispatchEvent(new Event('input')); }})()"
LOADED = 'Promise.all([...document.images].map(image => image.decode())).then(() => new Promise(requestAnimationFrame))'


def test_report_on_dge_in_a_browser(report, browser, tmp_path):
    (printed, _), content = report('dge', '--budgets', '0.5', '0.9', '--title', 'Tiny <b>')
    assert 'report.html' in printed and content['title'] == 'Tiny <b>'
    assert [point['label'] for point in content['points'] if point['label'] != 'trained'] == ['0.5', '0.9']
    page, url = browser(), (tmp_path / 'out/report.html').as_uri()
    page.open(url)
    page.run(LOADED)
    assert page.run("document.querySelector('h1').textContent") == 'Tiny <b>'
    assert page.run("document.querySelectorAll('.picture').length") == 4
    picture, seen = content['pictures'][0], []
    image = cv2.imread(next(str(p) for p in (tmp_path / 'images').rglob(picture['name'])))[..., ::-1]
    for index, point in enumerate(content['points']):
        page.run(MOVE.format(index))
        state = page.run(STATE)
        seen.append(state)
        assert state['label'] == ('As trained' if point['budget'] is None else f'Budget {point["label"]}')
        assert float(state['tiles'][0]) == pytest.approx(point['accuracy/top1'], rel=1e-3)
        assert float(state['tiles'][3]) == pytest.approx(point['query_ratio'], abs=2e-3)
        assert state['text'].startswith(picture['views'][index]['text']) and state['here'] == index
        assert state['bars'] == pytest.approx([100 * ratio for ratio in point['layers'].values()], rel=1e-4)
        assert state['now'] == [dots[index] for dots in state['dots']]
        # A region of 2 x 2 cells is 8 of 24 pixels; the middle of the first is laid over with 45 % of its colour.
        colour = [(230, 60, 60), (60, 200, 80)][int(picture['views'][index]['grids'][0][0])]
        expected = 0.55 * image[24 // 8, 24 // 8] + 0.45 * np.array(colour)
        assert np.abs(np.array(state['pixel'][:3]) - expected).max() <= 2
    assert len({json.dumps(state['now']) for state in seen}) == 3

    page.events.clear()
    page.open(f'{url}?again#0.9')
    assert page.run(STATE)['label'] == 'Budget 0.9'
    events = [event for event in page.events if event.get('method') in ('Runtime.exceptionThrown', 'Log.entryAdded')]
    requests = [e['params']['request']['url'] for e in page.events if e.get('method') == 'Network.requestWillBeSent']
    assert events == [] and {name.partition(':')[0] for name in requests} <= {'file', 'data'}


def test_report_on_cfvit_in_a_browser(report, browser, tmp_path):
    _, content = report('cf', '--thresholds', '0', '1')
    assert [point['label'] for point in content['points']] == ['0', '0.5', '1']
    page = browser(width=390, height=800, scheme='dark')
    page.open((tmp_path / 'out/report.html').as_uri())
    page.run(LOADED)
    assert page.run(STATE)['label'] == 'Threshold 0.5, as set'
    assert page.run('document.documentElement.scrollWidth <= 390')
    assert page.run('getComputedStyle(document.body).backgroundColor') == 'rgb(18, 20, 23)'
    states = []
    for index in (0, 2):
        page.run(MOVE.format(index))
        states.append(page.run(STATE))
    assert states[0]['text'].startswith('coarse: ') and states[1]['text'].startswith('fine: ')
    assert (states[0]['bars'], states[1]['bars']) == ([100, 0], [0, 100])


@pytest.mark.parametrize('scheme, background', [('light', 'rgb(246, 247, 249)'), ('dark', 'rgb(18, 20, 23)')])
def test_schemes_and_widths(scheme, background, browser, tmp_path):
    """A page of long names fits a phone, in each scheme with text that stands out."""
    view = dict(text='x' * 60, right=True, gflops=1.0, dense=2.0, grids=['00'])
    panel = dict(title='y' * 40, rows=1, columns=2, granularities=[0, 1, 2, 4], step=[1, 0.5])
    empty = data_uri(np.zeros((1, 1, 3), np.uint8))
    picture = dict(name='z' * 80, group='most', truth='t' * 50, image=empty, width=1, height=1, panels=[panel] * 20)
    point = dict(
        label='trained', budget=None, gflops=1.0, milliseconds=1.0, query_ratio=0.5, m=None, layers=dict(a=0.5)
    )
    content = dict(
        title='w' * 100, subtitle='', kind='budget', metric='m', points=[point], start=0, gflops_dense=2.0, notes=['n'],
        pictures=[dict(picture, views=[view])],
    )  # fmt: skip
    (tmp_path / 'page.html').write_text(report_page(content))
    page = browser(width=360, height=700, scheme=scheme)
    page.open((tmp_path / 'page.html').as_uri())
    assert page.run('document.documentElement.scrollWidth <= 360')
    assert page.run('getComputedStyle(document.body).backgroundColor') == background
    assert page.run("document.querySelector('.tile b').textContent") == '\u2013'  # no number
    numbers = page.run('[number(1.396), number(33.4, 4), number(1112), number(9.996), number(0.0998), number(0)]')
    assert numbers == ['1.40', '33.40', '1110', '10.0', '0.0998', '0.00']


@pytest.mark.parametrize('config', ['mask-rcnn_pvt-mini-dge_digits', 'fpn_pvt-mini-dge_digits'])
def test_pictures_of_dense_prediction(config, tmp_path, request):
    """What detectors and segmentors find is drawn by their frameworks at each budget, beside the gates."""
    if 'rcnn' in config:
        request.getfixturevalue('mmcv_operators')
    cfg = Config.fromfile(ROOT / f'configs/demo/{config}.py')
    model = build_model(cfg)
    image = np.random.default_rng(0).integers(0, 255, (128, 128, 3), np.uint8)
    cv2.imwrite(str(tmp_path / 'a.png'), image)

    class Evaluator:
        process = staticmethod(lambda data_samples, data_batch: None)
        evaluate = staticmethod(lambda size: dict(mAP=0.5))

    meta = dict(classes=[str(i) for i in range(11)], palette=[(i, i, i) for i in range(11)])
    sample = pipeline_without_annotations(cfg)(dict(img_path=str(tmp_path / 'a.png'), img_id=0))
    loader = DataLoader([sample], collate_fn=pseudo_collate)
    gallery = Gallery([tmp_path / 'a.png'], {}, meta, 1, score_thr=0.0)
    found = budget_report(cfg, model, loader, Evaluator, gallery, [1.0], say=lambda text: None)
    (picture,) = found['pictures']
    assert len(picture['views']) == 2 and len(picture['panels']) == 6 and picture['truth'] is None
    assert all(view['picture'].startswith('data:image/') and view['right'] is None for view in picture['views'])
    assert picture['views'][0]['text'].endswith('of score 0 or more' if 'rcnn' in config else ('class', 'classes'))


@pytest.mark.parametrize(
    'kind, args, message',
    [
        ('dge', ['--thresholds', '0.5'], 'has none; it takes --budgets'),
        ('cf', ['--budgets', '0.5'], 'has none; it takes --thresholds'),
        ('dge', ['--calibrate', '0'], '--calibrate 0: give the number of images, at least 1'),
        ('dge', ['--cfg-options', 'test_evaluator=None'], 'the config has no test_evaluator'),
        ('dge', ['--cfg-options', 'model.backbone.dge=None'], 'The model has 0 backbones with DGE'),
        ('dge', ['--images', 'nowhere'], 'There is no folder of images nowhere'),
        ('dge', ['--budgets', '0.5', '--metric', 'mIoU'], 'has no metric mIoU'),
    ],
)
def test_mistakes(kind, args, message, report, capsys):
    with pytest.raises(SystemExit) as end:
        report(kind, *args)
    assert end.value.code == 2 and message in capsys.readouterr().err
