"""Plots of what the tools measure."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

DEPTHS = matplotlib.colormaps['turbo']  # colours of layers, blue to red


def unit_of(gflops: Iterable[float]) -> tuple[float, str]:
    """What multiply-adds in 1e9 are multiplied with for an axis, and its unit: G, or M if all are below 1e9."""
    return (1.0, 'G') if max(gflops, default=1.0) >= 1 else (1e3, 'M')


def label_points(axes: Axes, points: Sequence[tuple[float, float, str]]) -> None:
    """Write the texts of points (x, y, text), in their order, but those that would hide one before."""
    places = np.array([(x, y) for x, y, _ in points])
    places = places / np.maximum(np.ptp(places, axis=0), 1e-12)
    written: list[np.ndarray] = []
    for (x, y, text), place in zip(points, places):
        if all((abs(place - other) > (0.1, 0.06)).any() for other in written):
            written.append(place)
            axes.annotate(text, (x, y), (4, -8), textcoords='offset points', fontsize=7)  # below curves that rise


def stack_stages(axes: Axes, points: Sequence[tuple[float, float, float]]) -> None:
    """Images that are right at the coarse and at the fine stage, over multiply-adds in 1e9 (CF-ViT paper, figure 8)."""
    factor, unit = unit_of(x for x, _, _ in points)
    axes.stackplot(*zip(*[(factor * x, *right) for x, *right in points]), labels=['coarse stage', 'fine stage'])
    axes.set(xlabel=f'multiply-adds of the backbone ({unit})', ylabel='images classified correctly')
    axes.set_ylim(top=1.15 * max(coarse + fine for _, coarse, fine in points) or 1)
    axes.legend(loc='upper left', ncols=2, fontsize=7)


def draw_redundancy(
    edges: np.ndarray,
    histogram: np.ndarray,
    of_images: np.ndarray,
    rows: Sequence[dict],
    metric: str,
    path: str | Path,
) -> None:
    """The three panels of the DGE paper's figure 2.

    Args:
        edges, histogram, of_images: of :class:`~mmdyn.analysis.redundancy.Redundancy`.
        rows: accuracy and cost at some thresholds, by falling threshold.
        metric: of the rows.
        path: of the picture.
    """
    figure = Figure(figsize=(11, 3.6), layout='constrained')
    left, middle, right = figure.subplots(1, 3)
    shares = histogram.mean(0)
    left.bar(edges[:-1], 100 * shares, width=np.diff(edges), align='edge')
    left.set(xlabel='correlation with the mean of the 2 x 2 patch', ylabel='tokens (%)')
    left.set_xlim(edges[np.searchsorted(shares.cumsum(), 0.01)], 1)  # all but one in a hundred
    factor, unit = unit_of(row['gflops'] for row in rows)
    names = ['dense' if row['threshold'] is None else f'{row["threshold"]:g}' for row in rows]
    points = [(factor * row['gflops'], row[metric], name) for row, name in zip(rows, names)]
    middle.plot([x for x, _, _ in points], [y for _, y, _ in points], '.-')
    label_points(middle, points)
    middle.margins(0.1)
    middle.set(xlabel=f'multiply-adds of the backbone ({unit})', ylabel=metric)
    right.boxplot(of_images, whis=(0, 100))
    right.set(xlabel='block', ylabel='mean correlation of an image')
    figure.savefig(path, dpi=150)


def draw_points(curves: dict[str, Sequence[tuple[float, float]]], xlabel: str, ylabel: str, path: str | Path) -> None:
    """Accuracy over a cost: (x, y) of each curve; a single point is a star."""
    axes = (figure := Figure(figsize=(8, 3.6), layout='constrained')).subplots()
    for name, points in curves.items():
        many = len(points) > 40
        axes.plot(*zip(*points), '*' if len(points) == 1 else '-' if many else '.-', label=name, markersize=8)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=150)


def draw_layers(ratios: dict[str, dict[str, float]], path: str | Path) -> None:
    """Query ratio of each layer, a group of bars for each of some models."""
    layers = list(dict.fromkeys(layer for of_model in ratios.values() for layer in of_model))
    axes = (figure := Figure(figsize=(max(6, 0.4 * len(layers)), 4), layout='constrained')).subplots()
    width = 0.8 / len(ratios)
    for index, (name, of_model) in enumerate(ratios.items()):
        places = np.arange(len(layers)) - 0.4 + (index + 0.5) * width
        axes.bar(places, [of_model.get(layer, np.nan) for layer in layers], width, label=name)
    axes.set_xticks(range(len(layers)), layers, rotation=60, ha='right', rotation_mode='anchor', fontsize=7)
    axes.set(ylabel='share of the dense queries', ylim=(0, 1.05))
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=150)


def draw_stages(stages: dict[str, Sequence[tuple[float, float, float]]], path: str | Path) -> None:
    """Images that are classified correctly at each stage, over multiply-adds (CF-ViT paper, figure 8)."""
    figure = Figure(figsize=(5 * len(stages), 4), layout='constrained')
    for axes, (name, points) in zip(np.ravel(figure.subplots(1, len(stages))), stages.items()):
        stack_stages(axes, points)
        axes.set(title=name)
    figure.savefig(path, dpi=150)


def draw_training(
    trainings: dict[str, dict[str, Sequence[tuple[float, float]]]], metric: str, path: str | Path
) -> None:
    """Loss, accuracy, and budget with query ratio over the steps of some trainings; what none tells has no panel.

    Layers' query ratios have the training's colour, faint; those of a single training have colours of their own.
    """
    told = {quantity: None for of in trainings.values() for quantity in of}
    panels = {'loss': ('loss',), metric: (metric,), 'query ratio': ('query_ratio', 'budget')}
    panels = {label: shown for label, shown in panels.items() if told.keys() & shown}
    alone, prefix = len(trainings) == 1, 'query_ratio/'
    figure = Figure(figsize=(4.4 * max(len(panels), 1), 4), layout='constrained')
    for axes, (label, shown) in zip(figure.subplots(1, max(len(panels), 1), squeeze=False)[0], panels.items()):
        layers = [quantity for quantity in told if quantity.startswith(prefix) and label == 'query ratio']
        for index, (name, of) in enumerate(trainings.items()):
            colour = 'black' if alone and layers else f'C{index}'
            for quantity in filter(of.get, shown):
                style, title = (':', f'{name}, budget') if quantity == 'budget' else ('.-', name)
                axes.plot(*zip(*of[quantity]), style, color=colour, label=title)
            for depth, quantity in enumerate(layers):
                style = dict(color=colour, alpha=0.2)
                if alone:
                    style = dict(color=DEPTHS(depth / len(layers)), label=quantity.removeprefix(prefix), linewidth=1)
                axes.plot(*zip(*of.get(quantity, [(np.nan, np.nan)])), '-', **style)
        axes.set(xlabel='step', ylabel=label if alone or not layers else f'{label}; faint: each layer')
        axes.grid(alpha=0.3)
        columns = 1 + len(axes.get_lines()) // 28
        place = dict(loc='upper left', bbox_to_anchor=(1, 1), ncols=columns) if alone and layers else {}
        axes.legend(fontsize=7, **place)
    figure.savefig(path, dpi=150)


def draw_patches(accuracy: dict[str, Sequence[float]], every: float, count: int, path: str | Path) -> None:
    """Accuracy with the patches of the highest and lowest class attention of each block (CF-ViT paper, figure 1a)."""
    axes = (figure := Figure(figsize=(8, 3.2), layout='constrained')).subplots()
    for name, values in accuracy.items():
        axes.plot(range(1, len(values) + 1), values, '.-', label=f'the {count} {name} patches')
    axes.axhline(every, linestyle=':', color='0.4', label='all patches')
    axes.set(xlabel='block whose class attention tells them', ylabel='top-1 accuracy (%)')
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)
