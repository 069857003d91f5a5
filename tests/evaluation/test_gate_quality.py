import gc
import json

import cv2
import numpy as np
import pytest
import torch
from mmengine.registry import METRICS, MODELS
from sklearn.metrics import jaccard_score
from torch import nn
from torch.nn.modules import module as torch_module

import mmdyn
from mmdyn.evaluation import GateQuality
from mmdyn.evaluation.gate_quality import ForegroundMasks, as_seen, compare, finest_score, summarise

MEANS = dict(type='ClsDataPreprocessor', mean=[127.5] * 3, std=[64.0] * 3)


def test_compare_by_hand():
    """Mean 0.5: the two right pixels are foreground; one pixel of three known foreground ones is missed."""
    counts = compare(np.array([[0.0, 0.75], [0.25, 1.0]]), np.array([[0, 1], [1, 1]], np.uint8))
    assert (counts.right, counts.pixels, counts.common, counts.either) == (3, 4, (1, 2), (2, 3))
    # Scores of both classes, one after the other: 2 of 2 right at 1, 3 of 4 down to 0.75, 4 of 6 down to 0.25.
    assert counts.precision == pytest.approx(2 / 2 * 2 / 4 + 3 / 4 * 1 / 4 + 4 / 6 * 1 / 4)
    assert summarise([counts]) == dict(
        accuracy=75.0, mAP=100 * counts.precision, mIoU=pytest.approx(100 * (1 / 2 + 2 / 3) / 2)
    )


def test_pixels_that_nobody_knows_do_not_count():
    score, mask = np.array([[0.0, 1.0, 0.9]]), np.array([[0, 1, 255]], np.uint8)
    counts = compare(score, mask)
    assert (counts.right, counts.pixels, counts.common, counts.either) == (
        2,
        2,
        (1, 1),
        (1, 1),
    ) and counts.precision == 1


def test_summary_of_images_is_that_of_their_pixels():
    rng = np.random.default_rng(0)
    images = [(rng.random((5, n)), rng.integers(0, 2, (5, n), np.uint8)) for n in (4, 9, 2)]
    found = summarise([compare(score, mask) for score, mask in images])
    predicted = np.concatenate([(score > score.mean()).ravel() for score, _ in images])
    truth = np.concatenate([mask.ravel() for _, mask in images])
    assert found['accuracy'] == pytest.approx(100 * (predicted == truth).mean())
    assert found['mIoU'] == pytest.approx(100 * jaccard_score(truth, predicted, average='macro'))


def test_random_scores_are_the_papers():
    """Accuracy and mAP 50 whatever the masks are; mIoU 31.9 where 28.7 % of the pixels are foreground."""
    rng = np.random.default_rng(0)
    mask = (rng.random((300, 300)) < 0.287).astype(np.uint8)
    found = summarise([compare(rng.random(mask.shape), mask)])
    assert found == dict(
        accuracy=pytest.approx(50, abs=0.5), mAP=pytest.approx(50, abs=0.5), mIoU=pytest.approx(31.9, abs=0.5)
    )


def test_score_that_is_the_same_everywhere():
    counts = compare(np.ones((2, 2)), np.array([[0, 1], [0, 0]], np.uint8))
    # All is background: 3 of 4 are right, then 4 of 8.
    assert counts.right == 3 and counts.precision == 3 / 4 * 3 / 4 + 4 / 8 * 1 / 4


@pytest.mark.parametrize('source, kind', [('masks', 'folder'), ('masks.json', 'COCO')])
def test_masks(source, kind, tmp_path):
    wanted = np.zeros((6, 8), np.uint8)
    wanted[1:3, 2:5] = 1
    if kind == 'folder':
        (tmp_path / 'masks/a').mkdir(parents=True), (tmp_path / 'masks/b').mkdir()
        cv2.imwrite(str(tmp_path / 'masks/a/1.png'), np.where(wanted, 3, 11).astype(np.uint8))
        cv2.imwrite(str(tmp_path / 'masks/b/1.png'), np.full((6, 8), 9, np.uint8))
        masks = ForegroundMasks(tmp_path / source, background=[0, 11], ignore=9)
        assert (masks.read('b/1.jpg') == 255).all()
    else:
        box = [2, 1, 5, 1, 5, 3, 2, 3]
        content = dict(
            images=[dict(id=i, file_name=name, height=6, width=8) for i, name in ((7, 'a/1.jpg'), (8, 'c.jpg'))],
            categories=[dict(id=1, name='thing')],
            annotations=[
                dict(id=1, image_id=7, category_id=1, segmentation=[box], area=6, bbox=[2, 1, 3, 2], iscrowd=0),
                dict(id=2, image_id=8, category_id=1, segmentation=dict(counts=[0, 48], size=[6, 8]), area=48,
                     bbox=[0, 0, 8, 6], iscrowd=1),
            ],
        )  # fmt: skip
        (tmp_path / source).write_text(json.dumps(content))
        masks = ForegroundMasks(tmp_path / source)
        assert (masks.read('c.jpg') == 255).all()
    assert np.array_equal(masks.read('a/1.jpg'), wanted)


def test_mistakes_in_masks(tmp_path):
    with pytest.raises(ValueError, match='There are no masks nowhere: give a folder of PNG files'):
        ForegroundMasks('nowhere')
    (tmp_path / 'x.json').write_text('[]')
    with pytest.raises(ValueError, match="x.json is no JSON file in COCO's layout"):
        ForegroundMasks(tmp_path / 'x.json')
    (tmp_path / 'y.json').write_text(json.dumps(dict(images=[], annotations=[], categories=[])))
    with pytest.raises(ValueError, match='y.json has no image a.png'):
        ForegroundMasks(tmp_path / 'y.json').read('a.png')
    with pytest.raises(ValueError, match=r'has 0 masks b.png for a/b.jpg: it takes one'):
        ForegroundMasks(tmp_path).read('a/b.jpg')
    (tmp_path / 'b.png').write_text('nothing')
    with pytest.raises(ValueError, match='Cannot read the mask .*b.png'):
        ForegroundMasks(tmp_path).read('a/b.jpg')


def test_masks_as_the_network_sees_them():
    mask = np.zeros((4, 6), np.uint8)
    mask[1, 2] = 1
    seen = as_seen(mask, dict(ori_shape=(4, 6), img_shape=(6, 6), scale_factor=(2.0, 2.0), img_path='x'))
    # 8 x 12, of which rows 1 to 6 and columns 3 to 8 are left.
    assert [tuple(place) for place in np.argwhere(seen)] == [(1, 1), (1, 2), (2, 1), (2, 2)]
    assert np.array_equal(as_seen(mask, dict(ori_shape=(4, 6), img_shape=(4, 6))), mask)
    with pytest.raises(ValueError, match=r'The mask of x has \(4, 6\) pixels, but the image \(5, 6\)'):
        as_seen(mask, dict(ori_shape=(5, 6), img_shape=(4, 6), img_path='x'))
    with pytest.raises(ValueError, match=r'x was made larger than 4 x 6 pixels by the test pipeline'):
        as_seen(mask, dict(ori_shape=(4, 6), img_shape=(8, 6), img_path='x'))


@torch.no_grad()
def test_score_of_the_finest_granularity(make_backbone, encoders):
    (encoder, *_) = encoders(make_backbone('deit', dge=dict(granularities=(1, 2))))
    tokens = torch.randn(2, 1 + 35, 16)
    score = finest_score(encoder, tokens, (5, 7), 1, size=(20, 28))
    # Regions of 2 x 2 cells are 8 x 8 pixels; their centres are 4, 12, ... of the image, whose value is the region's.
    cells = tokens[:, 1:].unflatten(1, (5, 7))
    assert score.shape == (2, 20, 28)

    def of_region(row, column):
        region = cells[:, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].mean((1, 2))
        return (region @ encoder.router.weight.T + encoder.router.bias).softmax(-1)[:, 0]

    # A pixel's centre is at its number and a half: the two around 4 are an eighth of the way to the next regions.
    for row, column in ((0, 0), (0, 1), (1, 2)):
        around = score[:, 8 * row + 3 : 8 * row + 5, 8 * column + 3 : 8 * column + 5]
        others = [of_region(r, c) for r in (row - 1, row, row + 1) for c in (column - 1, column, column + 1)
                  if 0 <= r < 3 and 0 <= c < 4]  # fmt: skip
        most = (torch.stack(others) - of_region(row, column)).abs().amax(0)
        assert ((around.mean((1, 2)) - of_region(row, column)).abs() <= most / 8 + 1e-6).all()
    assert torch.allclose(score[:, 0, 0], of_region(0, 0), atol=1e-6)
    column = torch.stack([of_region(0, 0), of_region(0, 1)])
    assert torch.allclose(score[:, 0, 7], column[0] * 9 / 16 + column[1] * 7 / 16, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize('router', ['entropy', 'correlation'])
def test_score_of_a_router_that_is_not_trained(router, backbone_config):
    """The logits fall from 0 by what a region of 2 x 2 cells loses: its entropy, or what its correlation lacks of 1."""
    backbone = MODELS.build(backbone_config('deit', dge=dict(granularities=(1, 2), router=router))).eval()
    seen, encoder = {}, backbone.dge[0]
    encoder.register_forward_pre_hook(lambda module, inputs: seen.update(tokens=inputs[1]))
    images = torch.rand(2, 3, 32, 32)
    images[:, :, :8, :8] = 0.5  # without entropy
    backbone(images)
    score = finest_score(encoder, seen['tokens'], (8, 8), 1, size=(32, 32))
    for image, cells in enumerate(seen['tokens'][:, 1:].unflatten(1, (8, 8)).numpy()):
        region = cells[:2, :2].reshape(4, -1)
        loss = 1 - np.mean([np.corrcoef(cell, region.mean(0))[0, 1] for cell in region]) if router != 'entropy' else 0
        assert score[image, 0, 0].item() == pytest.approx(1 / (1 + np.exp(-loss)), abs=1e-5)
    assert score[:, 20:].min() > 0.5


@pytest.fixture
def example(tmp_path, backbone_config):
    """A classifier, a batch of three images and their masks, and the samples as an evaluator hands them over."""
    from mmpretrain.structures import DataSample

    backbone = backbone_config('pvt', out_type='avg_featmap', dge=dict(granularities=(1, 2)))
    head = dict(type='LinearClsHead', num_classes=3, in_channels=24)
    model = MODELS.build(dict(type='ImageClassifier', data_preprocessor=MEANS, backbone=backbone, head=head)).eval()
    for encoder in (module for module in model.modules() if hasattr(module, 'router')):
        nn.init.normal_(encoder.router.weight, std=10.0), nn.init.zeros_(encoder.router.bias)
    rng, samples = np.random.default_rng(0), []
    for i in range(3):
        cv2.imwrite(str(tmp_path / f'{i}.png'), rng.integers(0, 2, (32, 32), np.uint8))
        samples.append(DataSample(metainfo=dict(img_path=f'{i}.jpg', ori_shape=(32, 32), img_shape=(32, 32))))
    inputs = [torch.from_numpy(rng.integers(0, 256, (3, 32, 32), np.uint8)) for _ in samples]
    return model, dict(inputs=inputs, data_samples=samples), tmp_path


def test_metric_of_a_model(example):
    model, batch, folder = example
    metric = METRICS.build(dict(type='mmdyn.GateQuality', masks=str(folder)))
    seen = {}
    encoders = {
        'stages.0.blocks.0': model.backbone.stages[0].dge[0],
        'stages.1.blocks.0': model.backbone.stages[1].dge[0],
    }
    for name, encoder in encoders.items():
        encoder.register_forward_pre_hook(lambda module, inputs, name=name: seen.update({name: inputs[1:]}))
    with torch.inference_mode():
        samples = [sample.to_dict() for sample in model.test_step(batch)]
        metric.process(batch, samples)
        found = metric.evaluate(3)
        for name, encoder in encoders.items():
            scores = finest_score(encoder, *seen[name], size=(32, 32)).numpy()
            masks = [cv2.imread(str(folder / f'{i}.png'), 0) for i in range(3)]
            wanted = summarise([compare(score, mask) for score, mask in zip(scores, masks)])
            assert {key: found[f'gates/{name}/{key}'] for key in wanted} == pytest.approx(wanted)
    assert found['gates/random/accuracy'] == pytest.approx(50, abs=3)
    layers = {key.split('/')[1] for key in found}
    assert layers == {'random', 'stages.0.blocks.0', 'stages.0.blocks.1', 'stages.1.blocks.0'}


@torch.no_grad()
def test_models_of_other_libraries(example):
    """A model that DGE was added to has the same metrics, by the names of its layers."""
    timm = pytest.importorskip('timm')
    _, batch, folder = example
    model = timm.create_model('vit_tiny_patch16_224', img_size=32, patch_size=4, embed_dim=16, depth=2, num_heads=2)
    model = mmdyn.apply_dge(model, granularities=(1, 2)).eval()
    encoders = [module for module in model.modules() if hasattr(module, 'router')]
    seen = {}
    for name, encoder in zip(('blocks.0', 'blocks.1'), encoders):
        nn.init.normal_(encoder.router.weight, std=10.0), nn.init.zeros_(encoder.router.bias)
        encoder.register_forward_pre_hook(lambda module, inputs, name=name: seen.update({name: inputs[1:]}))
    metric = GateQuality(str(folder))
    model(torch.stack(batch['inputs']).float() / 64 - 2)
    metric.process(batch, [sample.to_dict() for sample in batch['data_samples']])
    for i, counts in enumerate(metric.results):
        mask = cv2.imread(str(folder / f'{i}.png'), 0)
        assert set(counts) == {'random', 'blocks.0', 'blocks.1'}
        for name, encoder in zip(('blocks.0', 'blocks.1'), encoders):
            score = finest_score(encoder, *seen[name], size=(32, 32))[i].numpy()
            assert counts[name] == compare(score, mask)


def test_layers_that_were_asked_for(example):
    model, batch, folder = example
    metric = GateQuality(str(folder), layers=['stages.0.blocks.1'])
    samples = [sample.to_dict() for sample in model.test_step(batch)]
    metric.process(batch, samples)
    assert set(metric.results[0]) == {'random', 'stages.0.blocks.1'}
    metric.layers = ['stages.7']
    model.test_step(batch)
    with pytest.raises(ValueError, match=r"no layers \['stages.7'\] have DGE: choose from \['stages.0.blocks.0', "):
        metric.process(batch, samples)


def test_passes_that_are_no_batch(example, backbone_config):
    model, batch, folder = example
    metric = GateQuality(str(folder))
    samples = [sample.to_dict() for sample in model.test_step(batch)]
    model.test_step(batch)
    with pytest.raises(ValueError, match='saw 2 passes of a backbone of mmdyn, with DGE in 0 layers, for a batch of 3'):
        metric.process(batch, samples)
    MODELS.build(backbone_config('pvt')).eval()(torch.zeros(3, 3, 32, 32))
    with pytest.raises(ValueError, match='with DGE in 0 layers'):
        metric.process(batch, samples)


@pytest.mark.parametrize(
    'options, message',
    [
        (dict(seed=-1), 'seed=-1: give an integer >= 0, of the random scores'),
        (dict(background='sky'), "background='sky': give an integer >= 0 and <= 255, a class of the masks"),
        (dict(background=[0, 999]), 'background=999: give an integer >= 0 and <= 255, a class of the masks'),
        (dict(ignore=1.5), 'ignore=1.5: give an integer >= 0 and <= 255, a class of the masks'),
    ],
)
def test_options(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        GateQuality(tmp_path, **options)


@pytest.mark.parametrize(
    'options, message',
    [
        (dict(masks=3), 'masks=3: give a folder of masks'),
        (dict(layers='blocks.0'), "layers='blocks.0': give a sequence of names"),
    ],
)
def test_types(options, message, tmp_path):
    with pytest.raises(TypeError, match=message):
        GateQuality(**{'masks': tmp_path, **options})


def test_nothing_is_left_behind(tmp_path):
    gc.collect()  # of what tests before have left
    before = len(torch_module._global_forward_pre_hooks)
    metric = GateQuality(str(tmp_path))
    assert len(torch_module._global_forward_pre_hooks) == before + 1
    del metric
    gc.collect()
    assert len(torch_module._global_forward_pre_hooks) == before
