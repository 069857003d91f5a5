"""What a report on a trained model tells: accuracy, cost and time at each budget or threshold, and what images got."""

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from mmengine.config import Config
from mmengine.evaluator import Evaluator
from mmengine.structures import BaseDataElement
from torch import nn
from torch.utils.data import DataLoader, Dataset

from ..models.backbones.base import find_backbones
from ..models.backbones.budget import check_budget
from ..visualization import build_visualizer, data_uri, describe_label, describe_stages, draw_prediction
from .budget import budgets_of, dynamic_backbone, evaluate, measure_prices, metric_of, set_mode, sweep
from .flops import image_files, run_on_images
from .gates import GatedRun, image_of, run_with_gates
from .latency import interleaved_times
from .threshold import curve, run_both_stages

Say = Callable[[str], None]
# Sides of the pictures of a page, which has to be sent.
MOST, LEAST = 384, 160


class Gallery(NamedTuple):
    """The images that a report may show.

    Attributes:
        files: the images.
        labels: the class of those that have one.
        meta: names of the classes, and their colours.
        num: how many to show of those that cost most, and of those that cost least.
        score_thr: least score of the instances of a detector.
    """

    files: list[Path]
    labels: dict[Path, int]
    meta: dict[str, Any]
    num: int
    score_thr: float = 0.3


def gallery_of(
    dataset: Dataset, folder: str | None, meta: dict[str, Any] | None, num: int, score_thr: float = 0.3, most: int = 256
) -> Gallery:
    """The images of a folder, or of a test set: at most so many of them, evenly spaced.

    Raises:
        ValueError: for a folder without images, or a ``num`` below 1.
    """
    if num < 1:
        raise ValueError(f'--num {num}: give the number of images to show of each kind, at least 1.')
    infos = [dataset.get_data_info(index) for index in range(len(dataset))]
    labels = {
        Path(info['img_path']).resolve(): int(info['gt_label'])
        for info in infos
        if np.ndim(info.get('gt_label')) == 0 and info.get('gt_label') is not None
    }
    files = image_files(folder) if folder else [Path(info['img_path']) for info in infos]
    step = math.ceil(len(files) / most)
    return Gallery(files[::step], labels, {**dataset.metainfo, **(meta or {})}, num, score_thr)


def extremes(costs: dict[Path, float], num: int) -> dict[Path, str]:
    """The images of the highest and of the lowest cost, ``'most'`` before ``'least'``; no image is both."""
    order = sorted(costs, key=lambda path: (-costs[path], path))
    num = min(num, math.ceil(len(order) / 2))
    least = order[max(num, len(order) - num) :]
    return {**dict.fromkeys(order[:num], 'most'), **dict.fromkeys(reversed(least), 'least')}


def encode_grid(grid: np.ndarray, values: Sequence[int]) -> str:
    """A grid of some values as their indices, one digit each, row by row."""
    return ''.join(str(values.index(value)) for value in np.ravel(grid).tolist())


def shown(image: np.ndarray) -> np.ndarray:
    """An image, at most :data:`MOST` pixels wide and high."""
    scale = MOST / max(image.shape[:2])
    return image if scale >= 1 else cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)


def measure_times(
    model: nn.Module,
    batches: Iterable[Any],
    prepare: Callable[[int], object],
    points: list[dict[str, Any]],
    rounds: int = 3,
    most: int = 8,
) -> None:
    """Time a model at all points in turns, on the same batches, and note ``milliseconds`` for an image.

    Args:
        model: in evaluation mode.
        batches: at most so many of them are taken, evenly spaced.
        prepare: sets the model to a point, given its index.
        points: that are changed.
        rounds: whose median counts.
        most: see ``batches``.
    """
    step = math.ceil(len(batches) / most)
    kept = [batch for index, batch in enumerate(batches) if index % step == 0]
    images = 0

    def run() -> None:
        nonlocal images
        with torch.inference_mode():
            images = sum(len(model.test_step(batch)) for batch in kept)

    device = next(model.parameters()).device
    times = interleaved_times(dict.fromkeys(range(len(points)), run), rounds, device=device, prepare=prepare)
    for index, point in enumerate(points):
        point['milliseconds'] = 1e3 * statistics.median(times[index]) / images


def budget_report(
    cfg: Config,
    model: nn.Module,
    loader: DataLoader,
    evaluator: Evaluator,
    gallery: Gallery,
    budgets: Sequence[float] | None = None,
    metric: str | None = None,
    images: int = 256,
    say: Say = print,
) -> dict[str, Any]:
    """Test a model with DGE as its routers decide and at each budget, and keep what some images got.

    Args:
        cfg: config of the model.
        model: of any task, in evaluation mode.
        loader, evaluator: of its test set.
        gallery: images to choose from.
        budgets: query ratios on average. Defaults to those of :data:`~mmdyn.analysis.budget.BUDGETS` that are
            reachable.
        metric: to show. Defaults to mIoU, or the first that the evaluator finds.
        images: that prices are measured on, evenly spaced in the test set.
        say: is told what is being done.

    Returns:
        ``kind``, ``metric``, ``points`` by ascending multiply-adds, ``start``, the index of the point without a budget,
        ``gflops_dense`` on average over the gallery, and ``pictures``.
    """
    backbone = dynamic_backbone(model)
    budgets = budgets_of(backbone, budgets)
    for budget in budgets:  # to say what is wrong before the work
        check_budget(backbone, budget, 'average')
    say(f'measuring the prices of {len(budgets)} budgets on {images} images')
    prices, points = measure_prices(model, loader, budgets, images), []
    for row in sweep(model, loader, evaluator, budgets, ['average'], prices):
        points.append(dict(row, label='trained' if row['budget'] is None else f'{row["budget"]:g}'))
        metric = metric_of(points, metric)
        say(f'{"as trained" if row["budget"] is None else "budget " + points[-1]["label"]}: {metric} {row[metric]:.4g}')
    points.sort(key=lambda point: point['gflops'])

    def set_point(index: int) -> None:
        set_mode(backbone, points[index]['mode'], points[index]['budget'], prices)

    say('measuring times')
    measure_times(model, loader, set_point, points)

    backbone.set_budget(None)
    say(f'choosing from {len(gallery.files)} images')
    costs, dense = {}, []
    for gated in run_with_gates(model, backbone, cfg, gallery.files):
        costs[gated.run.path] = gated.run.cost.spent.item()
        dense.append(gated.run.cost.dense / 1e9)
    groups = extremes(costs, gallery.num)
    pictures, visualizer = {}, None
    for index, point in enumerate(points):
        say(f'drawing {len(groups)} images, {point["label"]}')
        set_point(index)
        for gated in run_with_gates(model, backbone, cfg, groups):
            path, sample, cost = gated.run.path, gated.run.sample, gated.run.cost
            if path not in pictures:
                pictures[path] = picture_of(gated.image, path, groups[path], gallery, panels_of(gated))
            if 'pred_label' in sample:
                label = gallery.labels.get(path.resolve())
                right = None if label is None else sample.pred_label.item() == label
                view = dict(text=describe_label(sample, gallery.meta), right=right)
            else:
                visualizer = visualizer or build_visualizer(cfg, gallery.meta)
                view = describe_dense(visualizer, path, sample, gallery.score_thr)
            view.update(gflops=cost.spent.item() / 1e9, dense=cost.dense / 1e9)
            view['grids'] = [encode_grid(layer.grid, layer.encoder.granularities) for layer in gated.layers]
            pictures[path]['views'].append(view)
    backbone.set_budget(None)
    start = next(index for index, point in enumerate(points) if point['budget'] is None)
    return dict(
        kind='budget',
        metric=metric,
        points=points,
        start=start,
        gflops_dense=sum(dense) / len(dense),
        looked_at=len(costs),
        pictures=list(pictures.values()),
    )


def panels_of(gated: GatedRun) -> list[dict[str, Any]]:
    """The grid of regions of each layer, over an image; ``step`` are the sides of a region as parts of the image's."""
    return [
        dict(
            title=layer.name,
            granularities=[int(phi) for phi in layer.encoder.granularities],
            rows=layer.grid.shape[0],
            columns=layer.grid.shape[1],
            # Regions hang over where the image was padded.
            step=[
                layer.encoder.region * padded / cells / side
                for padded, cells, side in zip(gated.size, layer.shape, gated.image.shape[:2])
            ],
        )
        for layer in gated.layers
    ]


def picture_of(image: np.ndarray, path: Path, group: str, gallery: Gallery, panels: list[dict]) -> dict[str, Any]:
    """What is told of an image once; its ``views`` are to be added."""
    truth = name_of(gallery, gallery.labels.get(path.resolve()))
    height, width = image.shape[:2]
    uri = data_uri(shown(image))
    return dict(
        name=path.name, group=group, truth=truth, image=uri, width=width, height=height, panels=panels, views=[]
    )


def name_of(gallery: Gallery, label: int | None) -> str | None:
    """The name of a class; None for None."""
    if label is None:
        return None
    return str(gallery.meta['classes'][label] if gallery.meta.get('classes') else label)


def describe_dense(visualizer, path: Path, sample: BaseDataElement, score_thr: float) -> dict[str, Any]:
    """What a detector or a segmentor found, in words and as a picture drawn by its framework."""
    image = cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB)
    drawn = draw_prediction(visualizer, image, sample, score_thr, max(1, LEAST // image.shape[0]))
    if 'pred_instances' in sample:
        count = int((sample.pred_instances.scores >= score_thr).sum())
        text = f'{count} instance{"" if count == 1 else "s"} of score {score_thr:g} or more'
    else:
        count = len(sample.pred_sem_seg.data.unique())
        text = f'{count} class{"" if count == 1 else "es"}'
    return dict(text=text, right=None, picture=data_uri(shown(drawn)))


def threshold_report(
    cfg: Config,
    model: nn.Module,
    batches: Iterable[Any],
    evaluator: Evaluator,
    gallery: Gallery,
    thresholds: Sequence[float] | None = None,
    metric: str | None = None,
    say: Say = print,
) -> dict[str, Any]:
    """Test a CoarseToFineClassifier at each threshold, and keep what its stages made of some images.

    Args:
        cfg, model, batches, evaluator, gallery, metric, say: as for :func:`budget_report`.
        thresholds: confidences that stop an image. Defaults to 0, 0.1, ..., 1. The config's own is added.

    Returns:
        as :func:`budget_report`, with the ``curve`` of all thresholds if the metric is top-1 accuracy.
    """
    own, (backbone,) = model.test_cfg['threshold'], find_backbones(model)
    thresholds = sorted({*(thresholds or (tenth / 10 for tenth in range(11))), own})
    if not 0 <= thresholds[0] <= thresholds[-1] <= 1:
        raise ValueError(f'thresholds from {thresholds[0]} to {thresholds[-1]}: a confidence is in [0, 1].')
    say('running both stages on all images')
    both, points = run_both_stages(model, batches), []
    before, fine = model.test_cfg, curve(**both, thresholds=torch.arange(101, dtype=torch.double) / 100)
    swept = curve(**both, thresholds=torch.tensor(thresholds, dtype=torch.double))

    def set_point(index: int) -> None:
        model.test_cfg = dict(before, threshold=thresholds[index], every_stage=False)

    for index, threshold in enumerate(thresholds):
        set_point(index)
        found = evaluate(model, batches, evaluator, backbone)
        points.append(dict(swept.point(index), **found, label=f'{threshold:g}'))
        metric = metric_of([found], metric)
        say(f'threshold {threshold:g}: {metric} {found[metric]:.4g}')
    say('measuring times')
    measure_times(model, batches, set_point, points)

    say(f'choosing from {len(gallery.files)} images')
    model.test_cfg = dict(before, threshold=1.0, every_stage=True)
    # Each stage is a run of its own, with the same prediction.
    runs = {run.path: run for run in run_on_images(model, cfg, gallery.files)}
    groups = extremes({path: -run.sample.coarse_score.max().item() for path, run in runs.items()}, gallery.num)
    model.test_cfg = before
    first, added = backbone.stage_macs()
    pictures = []
    for path, group in groups.items():
        sample, image, size = runs[path].sample, image_of(runs[path]), backbone.coarse_size
        texts, label = describe_stages(sample, gallery.meta), gallery.labels.get(path.resolve())
        split = np.isin(np.arange(size**2), sample.regions.cpu().numpy()).astype(int)
        views = []
        for threshold in thresholds:
            # As the classifier decides, in the precision of the scores.
            stops = bool((sample.coarse_score.max() >= threshold) and threshold < 1)
            score = sample.coarse_score if stops else sample.fine_score
            views.append(
                dict(
                    text=texts[0] if stops else texts[1],
                    right=None if label is None else score.argmax().item() == label,
                    gflops=(first + (0 if stops else added)) / 1e9,
                    dense=(first + added) / 1e9,
                    grids=['' if stops else encode_grid(split, [0, 1])],
                )
            )
        panels = [dict(title='patches', rows=size, columns=size, step=[1 / size, 1 / size])]
        pictures.append(dict(picture_of(image, path, group, gallery, panels), views=views))
    return dict(
        kind='threshold',
        metric=metric,
        points=points,
        start=thresholds.index(own),
        gflops_dense=(first + added) / 1e9,
        curve=list(zip((fine.macs / 1e9).tolist(), fine.top1.tolist())) if metric.endswith('top1') else [],
        looked_at=len(runs),
        images=len(both['labels']),
        pictures=pictures,
    )
