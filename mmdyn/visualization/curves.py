"""Plots of what the tools measure."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

DEPTHS = matplotlib.colormaps['turbo']  # colours of layers, blue to red


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
    figure = Figure(figsize=(13, 4), layout='constrained')
    left, middle, right = figure.subplots(1, 3)
    left.bar(edges[:-1], 100 * histogram.mean(0), width=np.diff(edges), align='edge')
    left.set(xlabel='correlation with the mean of the 2 x 2 patch', ylabel='tokens (%)')
    middle.plot([row['gflops'] for row in rows], [row[metric] for row in rows], '.-')
    costs = [row['gflops'] for row in rows]
    last = np.inf
    for row in rows:
        label = 'dense' if row['threshold'] is None else f'{row["threshold"]:g}'
        if last - row['gflops'] > 0.03 * (max(costs) - min(costs)):  # or labels would hide each other
            last = row['gflops']
            middle.annotate(label, (last, row[metric]), (2, 3), textcoords='offset points', fontsize=7)
    middle.set(xlabel='multiply-adds of the backbone (G)', ylabel=metric)
    right.boxplot(of_images, whis=(0, 100))
    right.set(xlabel='block', ylabel='mean correlation of an image')
    figure.savefig(path, dpi=150)


def draw_points(curves: dict[str, Sequence[tuple[float, float]]], xlabel: str, ylabel: str, path: str | Path) -> None:
    """Accuracy over a cost: (x, y) of each curve; a single point is a star."""
    axes = (figure := Figure(figsize=(6, 4), layout='constrained')).subplots()
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
        axes.stackplot(*zip(*points), labels=['coarse stage', 'fine stage'])
        axes.set(xlabel='multiply-adds of the backbone (G)', ylabel='images classified correctly', title=name)
        axes.legend(loc='lower right', fontsize=7)
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
    axes = (figure := Figure(figsize=(6, 4), layout='constrained')).subplots()
    for name, values in accuracy.items():
        axes.plot(range(1, len(values) + 1), values, '.-', label=f'the {count} {name} patches')
    axes.axhline(every, linestyle=':', color='0.4', label='all patches')
    axes.set(xlabel='block whose class attention tells them', ylabel='top-1 accuracy (%)')
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)
