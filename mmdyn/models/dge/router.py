"""The router: which granularity each region gets (DGE paper, section 3.2.1)."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..replaceable import replaceable
from .budget import choose_within, queries_within
from .routing import count_patches, grid, pool
from .selectivity import index_of_finest
from .untrained import CorrelationRouter, EntropyRouter, RandomRouter, UntrainedRouter


class Router(nn.Module):
    """Gating logits of eq. 1: the mean of a region, projected to K logits.

    Its parameters are not an ``nn.Linear``, so that a model-wide initialisation of linear layers leaves the bias alone
    with which the finest granularity starts at a probability of 0.95. It computes in float32, also under autocast.

    Args:
        dim: channels.
        granularities: the K sides of patches.

    Attributes:
        price: (K,) what each granularity's logit is lowered by when a choice is made in inference, or None.
        training_price: the same in training, before the gates are drawn.
        share: share of the dense block's queries that each image gets in inference, or None: the router decides.
    """

    price: Tensor | None
    training_price: Tensor | None
    is_trained = True
    images = None

    def __init__(self, dim: int, granularities: Sequence[int]):
        super().__init__()
        self.granularities, num = tuple(granularities), len(granularities)
        self.weight = nn.Parameter(torch.empty(num, dim))
        self.bias = nn.Parameter(torch.empty(num))
        nn.init.normal_(self.weight, std=0.01)
        nn.init.constant_(self.bias, math.log(0.05 / max(num - 1, 1)))
        finest = index_of_finest(granularities)
        nn.init.constant_(self.bias[finest : finest + 1], math.log(0.95))
        self.register_buffer('price', None, persistent=False)
        self.register_buffer('training_price', None, persistent=False)
        self.share: float | None = None

    def forward(self, regions: Tensor) -> Tensor:
        """(..., C) means of regions -> (..., K) logits."""
        with torch.autocast(regions.device.type, enabled=False):
            return F.linear(regions.float(), self.weight.float(), self.bias.float())

    def logits(self, tokens: Tensor, shape: tuple[int, int], region: int, num_extra: int) -> Tensor:
        """(B, E + H*W, C) tokens -> (B, rows, columns, K)."""
        means: Tensor = self(pool(tokens, shape, region, num_extra))
        return means

    def macs(self, shape: tuple[int, int], region: int) -> int:
        """Multiply-adds of an image with a map of ``shape``."""
        return math.prod(grid(region, shape)) * self.weight.numel()


ROUTERS: dict[str, type[Router] | type[UntrainedRouter]] = dict(
    linear=Router, random=RandomRouter, entropy=EntropyRouter, correlation=CorrelationRouter
)


@replaceable
def choose(
    router: Router | UntrainedRouter, tokens: Tensor, shape: tuple[int, int], region: int, num_extra: int
) -> Tensor:
    """The granularity of the greatest logit of each region: (B, E + H*W, C) -> (B, rows, columns) indices.

    The router's price lowers the logits. Its share decides for all regions of an image together.
    """
    return choose_greatest(router, router.logits(tokens, shape, region, num_extra), shape, region, num_extra)


def choose_greatest(
    router: Router | UntrainedRouter, logits: Tensor, shape: tuple[int, int], region: int, num_extra: int
) -> Tensor:
    """The choice of a router's (B, rows, columns, K) logits: (B, rows, columns) indices."""
    if router.share is None:
        return (logits if router.price is None else logits - router.price).argmax(-1)
    patches = count_patches(shape, router.granularities, region, logits.device)
    budget = queries_within(router.share, shape, num_extra) - num_extra
    return choose_within(logits, router.granularities, patches, budget)


def straight_through_gates(
    logits: Tensor, tau: float, choice: Tensor | None = None, noise: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Sample hard gates with Gumbel noise (eq. 4) that have the gradient of the soft score (eq. 5).

    Args:
        logits: (..., K) gating logits.
        tau: temperature of the softmax.
        choice: (...) indices that are taken in place of the greatest noisy logits.
        noise: scale of the noise; at 0 gates are those of inference.

    Returns:
        (..., K) gates, exactly 0 or 1, and the (...) indices of the ones.
    """
    gumbel = -torch.empty_like(logits).exponential_().log()
    soft = ((logits + noise * gumbel) / tau).softmax(-1)
    choice = soft.argmax(-1) if choice is None else choice
    return F.one_hot(choice, logits.shape[-1]) + (soft - soft.detach()), choice
