from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.registry import MODELS
from torch import nn
from torch.utils.data import DataLoader

from mmdyn.analysis.model_report import (
    budget_report,
    encode_grid,
    extremes,
    gallery_of,
    measure_times,
    shown,
    threshold_report,
)

PIPELINE = [dict(type='LoadImageFromFile'), dict(type='PackInputs')]
CLASSES = ('ant', 'bee', 'cat')


class Images:
    """A test set of random images of 32 x 32 pixels, in batches of 4."""

    metainfo = dict(classes=CLASSES)

    def __init__(self, folder, side=32, num=10):
        rng = np.random.default_rng(0)
        self.files = [folder / f'{i}.png' for i in range(num)]
        for file in self.files:
            cv2.imwrite(str(file), rng.integers(0, rng.integers(20, 256), (side, side, 3), np.uint8))

    def __len__(self):
        return len(self.files)

    def get_data_info(self, index):
        return dict(img_path=str(self.files[index]), gt_label=index % 3)

    def __getitem__(self, index):
        from mmpretrain.structures import DataSample

        image = torch.from_numpy(cv2.imread(str(self.files[index]))).permute(2, 0, 1)
        return dict(inputs=image, data_samples=DataSample().set_gt_label(index % 3))

    def loader(self):
        return DataLoader(self, batch_size=4, collate_fn=pseudo_collate)


class Top1:
    """An evaluator of accuracy in per cent."""

    def __init__(self):
        self.right = []

    def process(self, data_samples, data_batch):
        self.right += [sample.pred_label.item() == sample.gt_label.item() for sample in data_samples]

    def evaluate(self, size):
        assert len(self.right) == size
        right, self.right = self.right, []
        return dict(top1=100 * sum(right) / size)


def config(model):
    return Config(dict(default_scope='mmpretrain', model=model, test_dataloader=dict(dataset=dict(pipeline=PIPELINE))))


def classify(model, file):
    (sample,) = model.test_step(dict(inputs=[torch.from_numpy(cv2.imread(str(file))).permute(2, 0, 1)]))
    return sample


@pytest.fixture
def gallery(tmp_path):
    images = Images(tmp_path)
    return images, gallery_of(images, None, None, num=2)


def test_report_on_budgets(gallery, backbone_config, randomise, encoders):
    images, gallery = gallery
    backbone = backbone_config('pvt', out_type='avg_featmap', dge=dict(granularities=(1, 2, 4)))
    cfg = config(
        dict(
            type='ImageClassifier',
            data_preprocessor=dict(type='ClsDataPreprocessor', mean=[127.5] * 3, std=[64.0] * 3),
            backbone=backbone,
            head=dict(type='LinearClsHead', num_classes=3, in_channels=24),
        )
    )
    model = randomise(MODELS.build(cfg.model)).eval()
    for encoder in encoders(model):
        nn.init.normal_(encoder.router.weight, std=1.0)
    said = []
    report = budget_report(cfg, model, images.loader(), Top1(), gallery, [0.4, 0.7], images=10, say=said.append)

    assert [point['budget'] for point in report['points']][report['start']] is None
    assert sorted(point['label'] for point in report['points']) == ['0.4', '0.7', 'trained']
    assert [p['gflops'] for p in report['points']] == sorted(p['gflops'] for p in report['points'])
    assert report['metric'] == 'top1' and said[1].startswith('as trained: top1 ')
    for point in report['points']:
        if point['budget']:
            assert point['query_ratio'] == pytest.approx(point['budget'], abs=0.03)
        assert point['milliseconds'] > 0

    # By the model alone, as the routers decide; the report has left no budget behind.
    costs, view_of = {}, {}
    for file in images.files:
        sample = classify(model, file)
        costs[file.name] = model.backbone.cost.spent.item()
        layers = [encoder.decision.choice[0].flatten().tolist() for encoder in encoders(model)]
        label = sample.pred_label.item()
        text = f'{CLASSES[label]} {sample.pred_score[label]:.2f}'
        view_of[file.name] = text, [''.join(map(str, layer)) for layer in layers if len(layer) > 1]
    order = sorted(costs, key=costs.get)
    found = {group: [p for p in report['pictures'] if p['group'] == group] for group in ('most', 'least')}
    assert {costs[p['name']] for p in found['most']} == {costs[name] for name in order[-2:]}
    assert {costs[p['name']] for p in found['least']} == {costs[name] for name in order[:2]}
    for picture in report['pictures']:
        view, index = picture['views'][report['start']], int(Path(picture['name']).stem)
        assert (view['text'], view['grids']) == view_of[picture['name']]
        assert view['gflops'] * 1e9 == pytest.approx(costs[picture['name']])
        assert view['right'] == view['text'].startswith(CLASSES[index % 3]) and picture['truth'] == CLASSES[index % 3]
        # Maps of 8 x 8 and 4 x 4 cells; the second is one region.
        assert [(panel['rows'], panel['columns'], panel['step']) for panel in picture['panels']] == [
            (2, 2, [0.5, 0.5])
        ] * 2
        gflops = [view['gflops'] for view in picture['views']]
        assert gflops[0] < gflops[2]
    assert report['gflops_dense'] == pytest.approx(model.backbone.cost.dense / 1e9)


def test_report_on_thresholds(gallery, backbone_config, randomise, tmp_path):
    (tmp_path / 'own').mkdir()
    images = Images(tmp_path / 'own', side=24)
    gallery = gallery_of(images, None, None, num=2)
    cfg = config(
        dict(
            type='mmdyn.CoarseToFineClassifier',
            data_preprocessor=dict(type='ClsDataPreprocessor', mean=[127.5] * 3, std=[64.0] * 3),
            backbone=backbone_config('cfvit'),
            head=dict(type='LinearClsHead', num_classes=3, in_channels=16),
            test_cfg=dict(threshold=0.55),
        )
    )
    model = randomise(MODELS.build(cfg.model), 0.5).eval()
    report = threshold_report(cfg, model, images.loader(), Top1(), gallery, [0.0, 0.7, 1.0], say=lambda text: None)
    assert [point['label'] for point in report['points']] == ['0', '0.55', '0.7', '1'] and report['start'] == 1
    assert model.test_cfg == dict(threshold=0.55, every_stage=False)
    confidence = {}
    for index, point in enumerate(report['points']):
        model.test_cfg['threshold'] = point['threshold']
        samples = {file.name: classify(model, file) for file in images.files}
        confidence = {name: sample.coarse_score.max().item() for name, sample in samples.items()}
        right = [sample.pred_label.item() == int(name[0]) % 3 for name, sample in samples.items()]
        stops = [sample.exit_stage == 0 for sample in samples.values()]
        assert point['top1'] == pytest.approx(10 * sum(right)) and point['exit_share'] == sum(stops) / 10
        assert point['gflops'] * 1e9 == pytest.approx(sum(sample.macs for sample in samples.values()) / 10)
        assert (point['coarse_right'], point['fine_right']) == (
            sum(r and s for r, s in zip(right, stops)),
            sum(r and not s for r, s in zip(right, stops)),
        )
        for picture in report['pictures']:
            view, sample = picture['views'][index], samples[picture['name']]
            label = sample.pred_label.item()
            stage = ('coarse', 'fine')[sample.exit_stage]
            assert view['text'] == f'{stage}: {CLASSES[label]} {sample.pred_score[label]:.2f}'
            assert view['gflops'] * 1e9 == pytest.approx(sample.macs)
            split = sample.regions.tolist() if 'regions' in sample else []
            assert [i for i, bit in enumerate(view['grids'][0]) if bit == '1'] == split
    order = sorted(confidence, key=confidence.get)
    assert [p['name'] for p in report['pictures']] == [*order[:2], *order[:-3:-1]]
    assert len(report['curve']) == 101 and report['curve'][-1][1] == report['points'][-1]['top1']


def test_images_of_a_folder(tmp_path):
    images = Images(tmp_path)
    gallery = gallery_of(images, str(tmp_path), dict(classes=('x', 'y', 'z')), num=3, most=4)
    assert [file.name for file in gallery.files] == ['0.png', '3.png', '6.png', '9.png']
    assert gallery.meta['classes'] == ('x', 'y', 'z') and gallery.labels[images.files[4].resolve()] == 1


def test_several_labels_are_no_label(tmp_path):
    images = Images(tmp_path, num=1)
    images.get_data_info = lambda index: dict(img_path='a.png', gt_label=[0, 1])
    assert gallery_of(images, None, None, num=1).labels == {}


def test_mistakes(gallery, backbone_config):
    images, gallery = gallery
    with pytest.raises(ValueError, match='--num 0: give the number of images to show of each kind, at least 1'):
        gallery_of(images, None, None, num=0)
    model = nn.ModuleDict(dict(backbone=MODELS.build(backbone_config('pvt', dge=dict(granularities=(1, 2))))))
    with pytest.raises(ValueError, match=r'budget=0.1 cannot be reached: on images of img_size'):
        budget_report(Config(), model, [], None, gallery, [0.1])
    model = nn.ModuleDict(dict(backbone=MODELS.build(backbone_config('cfvit'))))
    model.test_cfg = dict(threshold=0.5)
    with pytest.raises(ValueError, match=r'thresholds from 0.5 to 1.5: a confidence is in \[0, 1\]'):
        threshold_report(Config(), model, [], None, gallery, [1.5])


def test_extremes():
    costs = {Path(name): cost for name, cost in dict(a=3, b=1, c=3, d=2, e=0).items()}
    assert {str(path): group for path, group in extremes(costs, 2).items()} == dict(
        a='most', c='most', e='least', b='least'
    )
    assert list(map(str, extremes(costs, 9))) == ['a', 'c', 'd', 'e', 'b']
    assert extremes({Path('a'): 1}, 5) == {Path('a'): 'most'}


def test_grids_and_sizes():
    assert encode_grid(np.array([[1, 4], [2, 1]]), (1, 2, 4)) == '0210'
    assert shown(np.zeros((100, 50, 3), np.uint8)).shape == (100, 50, 3)
    assert shown(np.zeros((800, 400, 3), np.uint8)).shape == (384, 192, 3)


def test_times_are_of_the_same_batches_in_turns():
    calls = []
    model = nn.Linear(1, 1)
    model.test_step = lambda batch: calls.append(batch) or [0] * batch
    points = [{}, {}]
    measure_times(model, [1, 2, 3, 4], lambda index: calls.append(f'point {index}'), points, rounds=2, most=2)
    # One run to warm up, then two that count; batches 1 and 3 of four.
    assert calls == ['point 0', 1, 3, 'point 1', 1, 3] * 3
    assert all(point['milliseconds'] > 0 for point in points)
