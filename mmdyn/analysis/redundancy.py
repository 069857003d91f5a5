"""How alike neighbouring tokens of a plain ViT are, and what it costs to treat them alike (DGE paper, figure 2)."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.backbones.base import find_backbones
from ..models.backbones.vit import PlainViT
from ..models.dge import DynamicGrainedEncoder
from ..models.dge.encoder import Decision
from ..models.dge.routing import Routing, grid, pool, unpool
from ..models.thread_local import ThreadLocal

SIDE = 2
BINS = np.linspace(-1, 1, 201)


def patch_correlation(tokens: Tensor, shape: tuple[int, int], num_extra: int = 0, side: int = SIDE) -> Tensor:
    """Pearson correlation of each cell's token with the mean token of its patch, over the channels.

    Args:
        tokens: (B, E + H*W, C).
        shape: (H, W).
        num_extra: E.
        side: of a patch in cells; at the edges it has fewer.

    Returns:
        (B, H*W) in [-1, 1]; 0 for a token whose channels are all the same.
    """
    means = unpool(pool(tokens, shape, side, num_extra), side, shape).flatten(1, 2)
    first, second = (x - x.mean(-1, keepdim=True) for x in (tokens[:, num_extra:].double(), means.double()))
    return F.cosine_similarity(first, second, dim=-1, eps=1e-12).float()


class MergeRedundant(DynamicGrainedEncoder):
    """An encoder without a router: cells that are like the mean of their 2 x 2 patch share its query.

    The mean is that of all four cells, whether or not they share it. As in DGE, keys and values stay dense, and a cell
    adds the residual of its query to itself.

    Args:
        dim: channels of the tokens.
        threshold: a cell shares the query if its correlation with the mean is above it.

    Attributes:
        correlation: (B, H*W) of the thread's last forward pass.
    """

    correlation: ThreadLocal[Tensor] = ThreadLocal()

    def __init__(self, dim: int, threshold: float = 1.0):
        super().__init__(dim, (1, SIDE))
        self.threshold = threshold

    def query_bounds(self, shape: tuple[int, int], num_extra: int = 0) -> tuple[int, int]:
        """Fewest and most queries of an image."""
        rows, columns = grid(SIDE, shape)
        return num_extra + rows * columns, num_extra + shape[0] * shape[1]

    def macs(self, shape: tuple[int, int]) -> int:
        """None: correlations are no part of a model that would be built on them, and there is no router."""
        return 0

    def forward(self, block: nn.Module, tokens: Tensor, shape: tuple[int, int], num_extra: int = 0) -> Tensor:
        """As a dynamic grained encoder's."""
        self.correlation = patch_correlation(tokens, shape, num_extra)
        shares = self.correlation > self.threshold
        routing = share_queries(shares, shape, num_extra)
        means = unpool(pool(tokens, shape, SIDE, num_extra), SIDE, shape).flatten(1, 2)
        cells = torch.where(shares[..., None], means, tokens[:, num_extra:])
        queries = routing.compress(torch.cat([tokens[:, :num_extra], cells], dim=1))
        residual = block(queries, tokens, shape, num_extra, routing.lengths) - queries
        self.decision = Decision(shares, torch.tensor(routing.lengths))
        return routing.decompress(residual, tokens)


def share_queries(shares: Tensor, shape: tuple[int, int], num_extra: int = 0) -> Routing:
    """One query for all cells of a 2 x 2 patch that share it, and one for each other cell.

    Args:
        shares: (B, H*W) whether a cell shares its patch's query.
        shape: (H, W).
        num_extra: extra tokens, which are queries of their own.
    """
    rows, columns = grid(SIDE, shape)
    patch = torch.arange(rows * columns).view(1, rows, columns, 1)
    patch = unpool(patch, SIDE, shape).flatten().to(shares.device)
    cell = torch.arange(len(patch), device=shares.device) + rows * columns
    # Numbers that are the same where the query is; then without gaps, image by image.
    own = F.pad(torch.where(shares, patch, cell) + num_extra, (num_extra, 0))
    own[:, :num_extra] = torch.arange(num_extra, device=shares.device)
    most = num_extra + rows * columns + len(patch)
    own = own + most * torch.arange(len(own), device=shares.device)[:, None]
    different, query = own.unique(return_inverse=True)
    return Routing(query, (different // most).bincount(minlength=len(own)).tolist())


def plain_vit(model: nn.Module) -> PlainViT:
    """The dense plain ViT of a model.

    Raises:
        ValueError: if it has another backbone.
    """
    found = [backbone for backbone in find_backbones(model) if isinstance(backbone, PlainViT)]
    if len(found) != 1 or len(found[0].dge):
        raise ValueError(
            'Redundancy is measured on a dense plain vision transformer: give the config of a model with the backbone '
            'mmdyn.DeiT or mmdyn.LVViT, without dge.'
        )
    return found[0]


@contextmanager
def merging(backbone: PlainViT) -> Iterator[list[MergeRedundant]]:
    """Let all blocks of a dense plain ViT merge redundant queries, as long as the context lasts."""
    before = backbone.dge
    backbone.dge = nn.ModuleList([MergeRedundant(backbone.norm.weight.numel()) for _ in backbone.blocks])
    try:
        yield list(backbone.dge)
    finally:
        backbone.dge = before


class Redundancy(NamedTuple):
    """Correlations of tokens with the mean of their patch, before each of L blocks.

    Attributes:
        edges: (201,) of the bins.
        histogram: (L, 200) share of the tokens in each bin.
        of_images: (N, L) mean correlation of each image.
    """

    edges: np.ndarray
    histogram: np.ndarray
    of_images: np.ndarray


def measure_redundancy(model: nn.Module, batches: Iterable[Any], most: int) -> Redundancy:
    """Correlations on the first images, at least ``most`` of them if there are so many."""
    of_images, histogram = [], 0
    with merging(plain_vit(model)) as layers:
        for batch in batches:
            with torch.inference_mode():
                model.test_step(batch)
            found = torch.stack([layer.correlation for layer in layers], dim=1).cpu().numpy()
            of_images.append(found.mean(-1))
            histogram = histogram + np.stack([np.histogram(found[:, i], BINS)[0] for i in range(len(layers))])
            if sum(map(len, of_images)) >= most:
                break
    return Redundancy(BINS, histogram / histogram.sum(1, keepdims=True), np.concatenate(of_images))
