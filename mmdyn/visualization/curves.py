"""Plots of what the tools measure."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure


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
    for row in rows:
        label = 'dense' if row['threshold'] is None else f'{row["threshold"]:g}'
        middle.annotate(label, (row['gflops'], row[metric]), (2, 3), textcoords='offset points', fontsize=7)
    middle.set(xlabel='multiply-adds of the backbone (G)', ylabel=metric)
    right.boxplot(of_images, whis=(0, 100))
    right.set(xlabel='block', ylabel='mean correlation of an image')
    figure.savefig(path, dpi=150)
