"""Routing that is made up or replayed, so that speed is measured at a chosen query ratio without trained weights."""
from typing import Iterator, List, NamedTuple, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.backbones.base import DynamicBackbone
from ..models.dge.grains import grid

PATTERNS = ('clustered', 'random')


def synthetic_choice(regions: Tuple[int, int], granularities: Sequence[int], query_ratio: float, pattern: str,
                     seed: int = 0) -> Tensor:
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
    if pattern not in PATTERNS:
        raise ValueError(f'pattern={pattern!r}: choose from {PATTERNS}.')
    shares = [1 / phi**2 if phi else 0. for phi in granularities]
    order = sorted(range(len(shares)), key=lambda k: -shares[k])
    others = [shares[k] for k in order[1:]]
    coarse = sum(others) / len(others) if others else shares[order[0]]
    if not coarse <= query_ratio <= max(shares):
        raise ValueError(f'query_ratio={query_ratio}: granularities {tuple(granularities)}, with equal shares of all '
                         f'but the finest, allow {coarse:.4f} to {max(shares):.4f}.')
    finest = (query_ratio - coarse) / (shares[order[0]] - coarse) if others else 1.
    noise = torch.rand(*regions, generator=torch.Generator().manual_seed(seed))
    if pattern == 'clustered':
        small = torch.rand(1, 1, 4, 4, generator=torch.Generator().manual_seed(seed))
        noise = F.interpolate(small, regions, mode='bicubic')[0, 0] + 1e-3 * noise
    rank = noise.flatten().argsort(descending=True).argsort()
    fine = round(finest * len(rank))
    bounds = [fine] + [fine + round((len(rank) - fine) * (i + 1) / len(others)) for i in range(len(others))]
    place = torch.bucketize(rank, torch.tensor(bounds), right=True)
    return torch.tensor(order)[place].view(regions)


class SyntheticRouter(nn.Module):
    """A router that decides and then does as it was told.

    Args:
        router: the real one, whose time is spent as well.
        choice: (rows, columns) index of each region's granularity.
    """

    def __init__(self, router: nn.Module, choice: Tensor):
        super().__init__()
        self.router = router
        self.register_buffer('choice', choice)
        self.register_buffer('logits', F.one_hot(choice.flatten(), len(router.bias)) * 100.)

    @property
    def weight(self) -> Tensor:
        return self.router.weight

    def forward(self, regions: Tensor) -> Tensor:
        """(B, regions, C) means of regions -> (B, regions, K) logits."""
        return self.router(regions) * 0 + self.logits

    def choose(self, tokens: Tensor, *args) -> Tensor:
        """(B, E + H*W, C) -> (B, rows, columns) indices of granularities."""
        self.router.choose(tokens, *args)
        return self.choice.expand(len(tokens), -1, -1)

    def planned(self, images: int, regions: Tuple[int, int]) -> Optional[Tuple[Tensor, nn.Module, Tensor]]:
        """The choice that counts, and where the real router, which chooses as well, writes its own."""
        planned = self.router.planned(images, regions)
        return planned and (self.choice.expand(images, -1, -1), *planned[1:])


class LayerChoice(NamedTuple):
    """What a DGE layer chose for one image.

    Attributes:
        granularities: sides of the patches in cells.
        choice: (rows, columns) indices into them.
    """
    granularities: Tuple[int, ...]
    choice: Tensor


Recording = List[List[LayerChoice]]
"""The layers of each stage."""


def record_routing(backbone: DynamicBackbone, image: int = 0) -> Recording:
    """What the DGE layers chose for an image of the last forward pass."""
    return [[LayerChoice(encoder.granularities, encoder.decision.choice[image]) for encoder in stage.dge]
            for stage, _ in backbone.named_stages()]


def proportional(items: Sequence, index: int, count: int):
    """The item that lies as far along ``items`` as ``index`` along ``count``."""
    return items[index * len(items) // count]


def recorded_granularities(recording: Recording, num_stages: int) -> List[Tuple[int, ...]]:
    """The granularities that each of ``num_stages`` stages needs to replay a recording."""
    return [proportional(recording, i, num_stages)[0].granularities for i in range(num_stages)]


def replay_choice(choice: Tensor, regions: Tuple[int, int]) -> Tensor:
    """Resize a map of choices (rows, columns) to ``regions``: each takes the choice at its centre."""
    return F.interpolate(choice[None, None].double(), regions, mode='nearest-exact')[0, 0].long()


def force_routing(backbone: DynamicBackbone, size: Tuple[int, int], query_ratio: float, pattern: str) -> None:
    """Make every DGE layer of a backbone decide by :func:`synthetic_choice` on images of ``size`` (H, W) pixels."""
    for stage, _, encoder, regions in _dge_layers(backbone, size):
        choice = synthetic_choice(regions, encoder.granularities, query_ratio, pattern, seed=stage)
        encoder.router = SyntheticRouter(encoder.router, choice)


def replay_routing(backbone: DynamicBackbone, size: Tuple[int, int], recording: Recording) -> None:
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
            raise ValueError(f'Layer {j} of stage {i} has granularities {encoder.granularities}, but the recorded one '
                             f'{recorded.granularities}: build the backbone with dge=dict(granularities={needed}).')
        encoder.router = SyntheticRouter(encoder.router, replay_choice(recorded.choice, regions))


def _dge_layers(backbone: DynamicBackbone, size: Tuple[int, int]) -> Iterator[tuple]:
    """Stage, index, encoder, and rows and columns of regions of each DGE layer on images of ``size`` pixels."""
    stride = 1
    for i, (stage, _) in enumerate(backbone.named_stages()):
        stride *= stage.patch_embed.proj.kernel_size[0]
        for j, encoder in enumerate(stage.dge):
            yield i, j, encoder, grid(encoder.region, (size[0] // stride, size[1] // stride))
