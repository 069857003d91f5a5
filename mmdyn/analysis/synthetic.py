"""Routing that is made up or replayed, so that speed is measured at a chosen query ratio without trained weights."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..models.backbones.base import DynamicStages
from ..models.dge import check_granularities
from ..models.dge.routing import grid
from ..values import check_choice, check_integer, check_number, sides

PATTERNS = ('clustered', 'random')


def synthetic_choice(
    regions: tuple[int, int], granularities: Sequence[int], query_ratio: float, pattern: str, seed: int = 0
) -> Tensor:
    """Choose a granularity for each region so that about ``query_ratio`` of the dense queries are used.

    The finest granularity gets the share of regions that the ratio asks for, the others share the rest alike.

    Args:
        regions: rows and columns of regions.
        granularities: sides of the patches in cells.
        query_ratio: queries over cells.
        pattern: ``'clustered'``: the finest regions lie together in a few blobs, with coarser ones around them, as on
            the objects of a natural image; ``'random'``: each region by itself, the worst case.
        seed: of the random numbers.

    Returns:
        (rows, columns) indices into ``granularities``.
    """
    regions = sides('regions', regions, unit='regions')
    check_choice('pattern', pattern, PATTERNS)
    check_number('query_ratio', query_ratio, '[0, 1]')
    check_integer('seed', seed, 0, 2**63 - 1)
    check_granularities(granularities)
    shares = [1 / phi**2 if phi else 0.0 for phi in granularities]
    order = sorted(range(len(shares)), key=lambda k: -shares[k])
    others = [shares[k] for k in order[1:]]
    coarse = sum(others) / len(others) if others else shares[order[0]]
    if not coarse <= query_ratio <= max(shares):
        raise ValueError(
            f'query_ratio={query_ratio}: granularities {tuple(granularities)}, with equal shares of all '
            f'but the finest, allow {coarse:.4f} to {max(shares):.4f}.'
        )
    finest = (query_ratio - coarse) / (shares[order[0]] - coarse) if others else 1.0
    noise = torch.rand(*regions, generator=torch.Generator().manual_seed(int(seed)))
    if pattern == 'clustered':
        small = torch.rand(1, 1, 4, 4, generator=torch.Generator().manual_seed(int(seed)))
        noise = F.interpolate(small, regions, mode='bicubic')[0, 0] + 1e-3 * noise
    rank = noise.flatten().argsort(descending=True).argsort()
    fine = round(finest * len(rank))
    bounds = [fine] + [fine + round((len(rank) - fine) * (i + 1) / len(others)) for i in range(len(others))]
    place = torch.bucketize(rank, torch.tensor(bounds), right=True)
    return torch.tensor(order)[place].view(regions)


class LayerChoice(NamedTuple):
    """What a DGE layer chose for one image.

    Attributes:
        granularities: sides of the patches in cells.
        choice: (rows, columns) indices into them.
    """

    granularities: tuple[int, ...]
    choice: Tensor


Recording = list[list[LayerChoice]]
"""The layers with DGE of each stage that has any."""


def record_routing(backbone: DynamicStages, image: int = 0) -> Recording:
    """What the DGE layers chose for an image of the last forward pass."""
    dynamic = [[encoder for encoder in stage.dge if encoder is not None] for stage, _ in backbone.named_stages()]
    return [
        [LayerChoice(encoder.granularities, encoder.decision.choice[image]) for encoder in of_stage]
        for of_stage in dynamic
        if of_stage
    ]


def proportional(items: Sequence, index: int, count: int):
    """The item that lies as far along ``items`` as ``index`` along ``count``."""
    return items[index * len(items) // count]


def recorded_granularities(recording: Recording, num_stages: int) -> list[tuple[int, ...]]:
    """The granularities that each of ``num_stages`` stages needs to replay a recording."""
    return [proportional(recording, i, num_stages)[0].granularities for i in range(num_stages)]


def replay_choice(choice: Tensor, regions: tuple[int, int]) -> Tensor:
    """Resize a map of choices (rows, columns) to ``regions``: each takes the choice at its centre."""
    return F.interpolate(choice[None, None].double(), regions, mode='nearest-exact')[0, 0].long()


def force_routing(backbone: DynamicStages, size: tuple[int, int], query_ratio: float, pattern: str) -> None:
    """Make every DGE layer of a backbone decide by :func:`synthetic_choice` on images of ``size`` (H, W) pixels.

    The routers decide as well, so that their time is spent.
    """
    for stage, _, encoder, regions in _dge_layers(backbone, size):
        choice = synthetic_choice(regions, encoder.granularities, query_ratio, pattern, seed=stage)
        encoder.forced = choice.to(next(backbone.entry.parameters()).device)


def replay_routing(backbone: DynamicStages, size: tuple[int, int], recording: Recording) -> None:
    """Make every DGE layer decide on images of ``size`` as another model did.

    A layer takes the choice of the one that lies as far along the recorded stages, and along the layers of its stage.

    Raises:
        ValueError: if they choose among different granularities.
    """
    stages = [stage for stage, _ in backbone.named_stages()]
    for i, j, encoder, regions in _dge_layers(backbone, size):
        recorded = proportional(proportional(recording, i, len(stages)), j, len(stages[i].dge))
        if recorded.granularities != encoder.granularities:
            needed = recorded_granularities(recording, len(stages))
            raise ValueError(
                f'Layer {j} of stage {i} has granularities {encoder.granularities}, but the recorded one '
                f'{recorded.granularities}: build the backbone with dge=dict(granularities={needed}).'
            )
        encoder.forced = replay_choice(recorded.choice, regions).to(next(backbone.entry.parameters()).device)


def _dge_layers(backbone: DynamicStages, size: tuple[int, int]) -> Iterator[tuple]:
    """Stage, index, encoder, and rows and columns of regions of each DGE layer on images of ``size`` pixels."""
    stride = 1
    for i, (stage, _) in enumerate(backbone.named_stages()):
        stride *= stage.patch_embed.patch_size
        for j, encoder in enumerate(stage.dge):
            if encoder is None:
                continue
            yield i, j, encoder, grid(encoder.region, (size[0] // stride, size[1] // stride))
