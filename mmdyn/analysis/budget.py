"""What a checkpoint reaches at which budget: prices of queries that make it, accuracy, multiply-adds and time."""

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from mmengine.evaluator import Evaluator
from mmengine.runner import Runner, TestLoop
from torch import nn
from torch.utils.data import DataLoader, Subset

from ..evaluation import DynamicFLOPs
from ..models.backbones.base import DynamicStages, find_backbones
from ..models.cost import CostMeter
from ..models.dge.prices import Prices
from ..values import check_integer, check_number
from .latency import synchronise

# The first price that is tried, the factor to the next, and the last.
FIRST, FACTOR, LAST = 0.01, 4.0, 1e5
BUDGETS = [round(0.1 * tenth, 1) for tenth in range(2, 11)]
MODES = ('average', 'exact', 'equal')
# What a row of a sweep tells beside the metrics of the evaluator.
COLUMNS = ('checkpoint', 'mode', 'budget', 'threshold', 'query_ratio', 'gflops', 'milliseconds', 'layers')


class Spent(NamedTuple):
    """What images spent on average.

    Attributes:
        query_ratio: beta of eq. 7.
        layers: query ratio of each dynamic layer, by its name.
        macs: multiply-adds of the backbone for an image, in all its forward passes.
    """

    query_ratio: float
    layers: dict[str, float]
    macs: float


def dynamic_backbone(model: nn.Module) -> DynamicStages:
    """The backbone with DGE of a model.

    Raises:
        ValueError: if it has none, or several.
    """
    found = [backbone for backbone in find_backbones(model) if backbone.has_dge]
    if len(found) != 1:
        raise ValueError(
            f'The model has {len(found)} backbones with DGE: give the config of one that has one, e.g. '
            'mmdyn.PVT with dge=dict(granularities=(1, 2, 4)).'
        )
    return found[0]


def model_and_loop(runner: Runner, checkpoint: str) -> tuple[nn.Module, TestLoop]:
    """A checkpoint's model in evaluation mode, and the loop that tests it, without a metric of multiply-adds.

    That would count passes beside the test too, and take time; tools that test at many points tell what each cost.
    """
    runner.load_checkpoint(checkpoint, map_location='cpu')
    loop = runner.test_loop
    loop.evaluator.metrics = [metric for metric in loop.evaluator.metrics if not isinstance(metric, DynamicFLOPs)]
    return runner.model.eval(), loop


def average(meter: CostMeter, images: int) -> Spent:
    """What the forward passes since the last call spent, on so many images."""
    costs = meter.take()
    ratio, macs, layers = torch.cat([cost.query_ratio for cost in costs]), sum(cost.spent.sum() for cost in costs), {}
    for cost in costs:
        for layer in cost.layers:
            if layer.dynamic:
                layers.setdefault(layer.name, []).append(layer.query_ratio)
    return Spent(
        ratio.double().mean().item(),
        {name: torch.cat(of_layer).double().mean().item() for name, of_layer in layers.items()},
        (macs / images).item(),
    )


def evenly_spaced(loader: DataLoader, most: int) -> DataLoader:
    """Batches of ``most`` images from all of a loader's data, if there are so many: it may be sorted by class."""
    check_integer('most', most, 1, what='a number of images')
    size = len(loader.dataset)
    count = min(size, most)
    return DataLoader(
        Subset(loader.dataset, [place * size // count for place in range(count)]),
        batch_size=loader.batch_size or 1,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        worker_init_fn=loader.worker_init_fn,
        persistent_workers=loader.persistent_workers,
    )


def spend(model: nn.Module, batches: Iterable[Any]) -> Spent:
    """What a model spends on all images of some batches."""
    meter, images = CostMeter(training=False, backbones=[dynamic_backbone(model)]), 0
    for batch in batches:
        with torch.inference_mode():
            images += len(model.test_step(batch))
    if not images:
        raise ValueError('There are no images to measure what the model spends: give a test set that has some.')
    return average(meter, images)


def calibrate(
    measure: Callable[[float], Spent], budgets: Sequence[float], tolerance: float = 2e-3, tries: int = 12
) -> Prices:
    """Find the prices at which a model spends some budgets on average.

    Args:
        measure: what the model spends at a price.
        budgets: query ratios.
        tolerance: of the query ratio. Layers that choose one granularity for all regions make the ratio jump, and then
            no price may meet a budget so closely.
        tries: prices that are tried for each budget, beside those that are tried to find out how they relate.

    Returns:
        All that was measured.
    """
    if not isinstance(budgets, (list, tuple)) or not budgets:
        raise ValueError(f'budgets={budgets!r}: give a list of query ratios, e.g. [0.3, 0.5].')
    for budget in budgets:
        check_number('budgets', budget, '[0, 1]', 'a query ratio')
    check_number('tolerance', tolerance, '(0, inf)', 'of the query ratio')
    check_integer('tries', tries, 0, 1000)
    found: dict[float, Spent] = {}

    def ratio(price: float) -> float:
        if price not in found:
            found[price] = measure(price)
        return found[price].query_ratio

    ratio(0.0)
    for sign, wanted in ((1, min(budgets)), (-1, max(budgets))):
        price = FIRST
        while sign * (ratio(sign * price) - wanted) > tolerance and price < LAST:
            price *= FACTOR
    for budget in budgets:
        for attempt in range(tries):
            if min(abs(spent.query_ratio - budget) for spent in found.values()) <= tolerance:
                break
            above = max((price for price in found if ratio(price) > budget), default=min(found))
            below = min((price for price in found if ratio(price) < budget and price > above), default=max(found))
            part, gap = 0.5, ratio(above) - ratio(below)
            if attempt % 2 == 0 and gap > 0:
                part = min(max((ratio(above) - budget) / gap, 0.05), 0.95)
            ratio(above + part * (below - above))
    points = sorted(found.items(), key=lambda point: (point[1].query_ratio, -point[0]))
    return Prices(
        [price for price, _ in points],
        [spent.query_ratio for _, spent in points],
        {name: [spent.layers[name] for _, spent in points] for name in points[0][1].layers},
    )


def budgets_of(backbone: DynamicStages, given: Sequence[float] | None) -> list[float]:
    """The budgets that were asked, or those of :data:`BUDGETS` that the granularities reach, ascending."""
    least, most = backbone.ratio_bounds()
    return sorted(given or [budget for budget in BUDGETS if least <= budget <= most + 1e-6])


def modes_of(backbone: DynamicStages, given: Sequence[str] | None) -> list[str]:
    """The modes that were asked, or those of :data:`MODES` that the model has."""
    by_layer = any(getattr(module, 'routing', 'region') == 'layer' for module in backbone.modules())
    return list(given or [mode for mode in MODES if mode == 'average' or not by_layer])


def measure_prices(model: nn.Module, loader: DataLoader, budgets: Sequence[float], most: int) -> Prices:
    """The prices of some budgets, measured on ``most`` evenly spaced images if there are so many."""
    backbone, batches = dynamic_backbone(model), evenly_spaced(loader, most)

    def at_price(price: float) -> Spent:
        backbone.set_price(price)
        return spend(model, batches)

    return calibrate(at_price, budgets)


def set_mode(backbone: DynamicStages, mode: str, budget: float | None, prices: Prices) -> None:
    """Set a budget in one of :data:`MODES`; ``'router'`` lets the routers decide."""
    settings = {
        'average': partial(backbone.set_budget, mode='average', prices=prices),
        'exact': partial(backbone.set_budget, mode='exact', prices=prices),
        'equal': partial(backbone.set_budget, mode='exact'),
    }
    settings.get(mode, backbone.set_budget)(budget)


def sweep(
    model: nn.Module,
    batches: Iterable[Any],
    evaluator: Evaluator,
    budgets: Sequence[float],
    modes: Sequence[str],
    prices: Prices,
) -> Iterator[dict[str, Any]]:
    """Test a model as its routers decide, then in each mode at each budget.

    Yields:
        ``mode`` and ``budget``, and what :func:`evaluate` returns.
    """
    for mode, budget in [('router', None), *((mode, budget) for mode in modes for budget in budgets)]:
        set_mode(dynamic_backbone(model), mode, budget, prices)
        yield dict(mode=mode, budget=budget, **evaluate(model, batches, evaluator))


def evaluate(
    model: nn.Module, batches: Iterable[Any], evaluator: Evaluator, backbone: DynamicStages | None = None
) -> dict[str, Any]:
    """Accuracy and cost of a model.

    Args:
        model: of any task.
        batches: of its test set.
        evaluator: whose metrics tell the accuracy.
        backbone: whose cost counts. Defaults to the one with DGE.

    Returns:
        ``query_ratio``; ``layers``, that of each layer with DGE; ``gflops``, multiply-adds of the backbone for an image
        in 1e9; ``milliseconds`` of the whole model for an image, the median of the batches behind the first; and the
        numbers that the evaluator finds.
    """
    backbone, seconds, images = backbone or dynamic_backbone(model), [], 0
    meter, device = CostMeter(training=False, backbones=[backbone]), next(model.parameters()).device
    for batch in batches:
        synchronise(device)
        start = time.perf_counter()
        with torch.inference_mode():
            samples = model.test_step(batch)
        synchronise(device)
        seconds.append((time.perf_counter() - start) / len(samples))
        images += len(samples)
        evaluator.process(data_samples=samples, data_batch=batch)
    spent = average(meter, images)
    metrics = {name: float(value) for name, value in evaluator.evaluate(images).items() if not isinstance(value, str)}
    return dict(
        query_ratio=spent.query_ratio,
        layers=spent.layers,
        gflops=spent.macs / 1e9,
        milliseconds=1e3 * statistics.median(seconds[1:] or seconds),
        **metrics,
    )


def metric_of(rows: list[dict], asked: str | None) -> str:
    """The metric to show: the one that was asked; by default mIoU, or else the first that the evaluator found.

    Raises:
        ValueError: if there is none, or not the one that was asked.
    """
    names = [name for name in dict.fromkeys(name for row in rows for name in row) if name not in COLUMNS]
    if not names:
        raise ValueError('The test evaluator found nothing to show: does the model predict anything?')
    if asked and asked not in names:
        raise ValueError(f'The test evaluator has no metric {asked}: choose from {names}.')
    return asked or ('mIoU' if 'mIoU' in names else names[0])
