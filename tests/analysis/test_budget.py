import math
from types import SimpleNamespace

import pytest
import torch
from mmengine.registry import MODELS
from torch import nn
from torch.utils.data import DataLoader

from mmdyn.analysis.budget import (
    Spent,
    average,
    calibrate,
    dynamic_backbone,
    evaluate,
    evenly_spaced,
    measure_prices,
    metric_of,
    spend,
)
from mmdyn.models.cost import CostMeter


def measured(ratio):
    """A model with two layers whose first always spends 0.5; counts how often it was asked."""
    prices = []

    def measure(price):
        prices.append(price)
        return Spent(ratio(price), dict(a=0.5, b=2 * ratio(price) - 0.5), 0)

    return measure, prices


@pytest.mark.parametrize('scale', [0.003, 1.0, 40.0])
@pytest.mark.parametrize('budgets', [[0.3], [0.95, 0.3, 0.6], [0.5]])
def test_calibration_finds_what_a_budget_costs(budgets, scale):
    """ratio = 0.25 + 0.75 / (1 + exp(price / scale)), whose inverse is known, at prices of any size."""
    measure, prices = measured(lambda price: 0.25 + 0.75 / (1 + math.exp(min(price / scale, 700))))
    found = calibrate(measure, budgets)
    assert len(prices) == len(set(prices)) == len(found.price) <= 12 * len(budgets) + 18
    assert found.query_ratio == sorted(found.query_ratio)
    for budget in budgets:
        price, layers = found.at(budget)
        # The greatest slope is 0.75 / 4 / scale; the tolerance is one of the ratio.
        exact = scale * math.log(0.75 / (budget - 0.25) - 1)
        assert 0.25 + 0.75 / (1 + math.exp(price / scale)) == pytest.approx(budget, abs=5e-3)
        assert price == pytest.approx(exact, abs=0.2 * scale)
        assert layers == pytest.approx(dict(a=0.5, b=2 * budget - 0.5), abs=1e-2)


def test_calibration_of_bounds_and_of_jumps_ends():
    """All regions change at once at 0.2: no price spends 0.5, and the bounds are reached by any great price."""
    measure, prices = measured(lambda price: 1.0 if price < 0.2 else 0.1)
    found = calibrate(measure, [0.1, 0.5, 1.0])
    assert {0.1, 1.0} == set(found.query_ratio) and len(prices) < 40
    around = [price for price, ratio in zip(found.price, found.query_ratio)]
    assert min(abs(price - 0.2) for price in around) < 1e-2
    measure, prices = measured(lambda price: 0.7)
    assert set(calibrate(measure, [0.2, 1.0]).query_ratio) == {0.7}


@pytest.fixture
def model(make_backbone):
    """A model that has 'predictions', in the manner of mmengine, and batches of 2, 2 and 1 images."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = make_backbone('pvt', dge=dict(granularities=(1, 2, 4)))

        def test_step(self, batch):
            return list(self.backbone(batch)[-1])

    return Model().eval(), torch.randn(5, 3, 32, 32).split(2)


def test_what_images_spend(model):
    """As each image alone does."""
    model, batches = model
    backbone = model.backbone
    ratios, macs, of_layer = [], [], []
    with torch.no_grad():
        for image in torch.cat(batches):
            backbone(image[None])
            ratios.append(backbone.cost.query_ratio.item()), macs.append(backbone.cost.spent.item())
            of_layer.append(backbone.cost.layers[1].query_ratio.item())
    spent = spend(model, batches)
    assert spent.query_ratio == pytest.approx(sum(ratios) / 5) and spent.macs == pytest.approx(sum(macs) / 5)
    assert spent.layers['stages.0.blocks.1'] == pytest.approx(sum(of_layer) / 5) and len(spent.layers) == 3
    # The passes before do not count.
    assert spend(model, batches[:1]).query_ratio == pytest.approx(sum(ratios[:2]) / 2)


@pytest.mark.parametrize(
    'size, most, places',
    [
        (10, 5, [0, 2, 4, 6, 8]),
        (10, 4, [0, 2, 5, 7]),
        (7, 3, [0, 2, 4]),
        (3, 256, [0, 1, 2]),
        (9, 9, list(range(9))),
        (0, 4, []),
    ],
)
def test_images_are_evenly_spaced(size, most, places):
    loader = DataLoader(range(size), batch_size=2, collate_fn=list)
    batches = evenly_spaced(loader, most)
    assert [image for batch in batches for image in batch] == places
    assert list(batches) == [places[start : start + 2] for start in range(0, len(places), 2)]  # again, too


def test_batches_of_a_sampler_of_its_own():
    """Where a loader has no size of a batch."""
    loader = DataLoader(range(4), batch_sampler=[[3, 0], [1, 2]], collate_fn=list)
    assert list(evenly_spaced(loader, 2)) == [[0], [2]]


def test_prices_of_data_sorted_by_class(model, randomise):
    """The images of the first class are dear: prices that are measured on them alone would miss all other budgets."""
    model, _ = model
    backbone, images = (
        randomise(model).backbone,
        torch.randn(96, 3, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3),
    )
    for module in backbone.modules():
        if hasattr(module, 'router'):
            nn.init.normal_(module.router.weight, std=1.0)
    images = images[sorted(range(96), key=lambda place: -spent_alone(backbone, images[place]))]

    def missed(prices):
        """How far a budget of 0.5 is from what all images spend."""
        backbone.set_budget(0.5, mode='average', prices=prices)
        return abs(spend(model, images.split(32)).query_ratio - 0.5)

    all_of_them, first = (measure_prices(model, DataLoader(data, 8), [0.5], 32) for data in (images, images[:32]))
    assert missed(all_of_them) < 0.03 < 0.1 < missed(first)


@torch.no_grad()
def spent_alone(backbone, image):
    """What an image spends by itself."""
    backbone.set_budget(None)
    backbone(image[None])
    return backbone.cost.query_ratio.item()


def test_an_image_in_several_passes_spends_their_sum(model):
    model, (images, *_) = model
    meter = CostMeter(training=False, backbones=[model.backbone])
    model.test_step(images), model.test_step(images)
    twice = average(meter, 2)
    model.test_step(images)
    once = average(meter, 2)
    assert twice.macs == pytest.approx(2 * once.macs) and twice.query_ratio == pytest.approx(once.query_ratio)


def test_evaluation(model):
    model, batches = model
    seen = []
    evaluator = SimpleNamespace(
        process=lambda data_samples, data_batch: seen.append((len(data_samples), data_batch)),
        evaluate=lambda images: dict(accuracy=images),
    )
    found = evaluate(model, batches, evaluator)
    assert [count for count, _ in seen] == [2, 2, 1] and all(a is b for (_, a), b in zip(seen, batches))
    spent = spend(model, batches)
    assert found.pop('milliseconds') > 0
    assert found == dict(query_ratio=spent.query_ratio, layers=spent.layers, gflops=spent.macs / 1e9, accuracy=5)


def test_models_without_one_dynamic_backbone(backbone_config):
    dense = MODELS.build(backbone_config('pvt'))
    dynamic = [MODELS.build(backbone_config('pvt', dge=dict(granularities=(1, 2)))) for _ in range(2)]
    assert dynamic_backbone(nn.ModuleList([dense, dynamic[0]])) is dynamic[0]
    for parts, number in ((dense, 0), (nn.ModuleList(dynamic), 2)):
        with pytest.raises(ValueError, match=f'The model has {number} backbones with DGE: give the config of one'):
            dynamic_backbone(parts)


def test_metric_to_show():
    rows = [dict(mode='router', budget=None, gflops=1.0, layers={}, aAcc=80.0, mIoU=40.0)]
    assert metric_of(rows, None) == 'mIoU' and metric_of(rows, 'aAcc') == 'aAcc'
    assert metric_of([dict(rows[0], top1=1.0, mIoU=None)], None) == 'mIoU' and metric_of([dict(b=1, a=2)], None) == 'b'
    with pytest.raises(ValueError, match=r"no metric top1: choose from \['aAcc', 'mIoU'\]"):
        metric_of(rows, 'top1')
    with pytest.raises(ValueError, match='The test evaluator found nothing to show'):
        metric_of([dict(mode='router', gflops=1.0)], None)
