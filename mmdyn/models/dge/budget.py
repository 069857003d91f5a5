"""The budget constraint: in training (DGE paper, section 3.2.3), and on the decisions of a trained model.

A router's logits rank what its regions may gain from queries. A price lambda of each query moves the decision to any
budget: argmax_k (h_k - lambda * c_k), where c_k are the queries that granularity k makes of a whole region. What hangs
over an edge of the map pays the same: a logit is of the mean of a region's cells and does not know how many they are,
so the price is one of a cell, and a shift of the router's bias.
"""

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from .routing import look_up


def mean_over_processes(ratios: Tensor) -> Tensor:
    """Mean of the ratios of the images of all processes.

    The backward pass needs no communication: the value is the global mean, the gradient is that of the local images,
    scaled so that the average of all processes' gradients, which data parallel training takes, is the gradient of the
    global mean.

    Args:
        ratios: (B, ...) of this process.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return ratios.mean(0)
    sums = ratios.sum(0)
    total = torch.cat([sums.detach().flatten(), ratios.new_tensor([len(ratios)])])
    dist.all_reduce(total)
    local = sums * dist.get_world_size() / total[-1]
    return local + ((total[:-1] / total[-1]).view_as(local) - local).detach()


def budget_loss(ratio: Tensor, budget: float) -> Tensor:
    """Eq. 8: the squared distance of the spent share beta from the budget gamma."""
    return (ratio - budget) ** 2


def queries_of_region(granularities: Sequence[int], region: int) -> list[int]:
    """c_k: queries that each granularity makes of a whole region of region x region cells."""
    return [(region // phi) ** 2 if phi else 0 for phi in granularities]


def queries_within(share: float, shape: tuple[int, int], num_extra: int) -> int:
    """Most queries that are within a share of the dense block's on a map of ``shape``, but for rounding errors."""
    return math.floor(share * (num_extra + math.prod(shape)) + 1e-3)


def choose_within(logits: Tensor, granularities: Sequence[int], patches: Tensor, budget: int) -> Tensor:
    """The choice of argmax_k (h_k - lambda * c_k) with the least lambda of each image that keeps it within the budget.

    As lambda falls, a region goes from its fewest to its most queries, along the corners of the upper hull of the
    points (c_k, h_k): a step is taken as soon as lambda is no more than the slope of its edge. So the steps of an
    image's regions are taken by falling slope, regions in raster order where slopes are alike, as long as the budget
    lasts. What is left of it is less than the queries of the step that is no more taken. Lambda is negative where the
    budget is above what the router would spend.

    Args:
        logits: (B, rows, columns, K) h.
        granularities: the K sides of patches.
        patches: (rows, columns, K) queries that each granularity makes of each region.
        budget: queries of an image. Below the least that the granularities allow, the choice is that least.

    Returns:
        (B, rows, columns) indices.
    """
    costs = queries_of_region(granularities, math.lcm(*(phi for phi in granularities if phi)))
    order = sorted(range(len(costs)), key=costs.__getitem__)
    points, steps = logits.flatten(1, 2), torch.stack([patches[..., k].flatten() for k in order], -1).diff(dim=1)

    def slope(i: int, j: int) -> Tensor:
        return (points[..., order[j]] - points[..., order[i]]) / (costs[order[j]] - costs[order[i]])

    # The least concave function above the points has the slope min over i < k of max over j >= k at step k.
    num = len(order)
    slopes = (
        torch.stack(
            [
                torch.stack([torch.stack([slope(i, j) for j in range(k, num)]).amax(0) for i in range(k)]).amin(0)
                for k in range(1, num)
            ],
            -1,
        )
        .cummin(-1)
        .values
        if num > 1
        else points[..., :0]
    )
    prices = steps.expand_as(slopes).clone()
    for k in range(num - 2, 0, -1):  # an edge over several steps is taken as a whole: its first step pays for all
        of_rest = prices[..., k] * (slopes[..., k] == slopes[..., k - 1])
        prices[..., k - 1] += of_rest
        prices[..., k] -= of_rest
    ranking = slopes.flatten(1).sort(descending=True, stable=True).indices
    spent = patches[..., order[0]].sum() + prices.flatten(1).gather(1, ranking).cumsum(1)
    taken = torch.zeros_like(ranking).scatter(1, ranking, (spent <= budget).long()).view(slopes.shape).sum(-1)
    return look_up(order, taken).view(logits.shape[:-1])


def share_budget(
    budget: float, weights: Sequence[float], wanted: Sequence[float], least: Sequence[float], most: Sequence[float]
) -> list[float]:
    """Share a budget among layers in the proportions that are wanted, as far as each layer allows.

    Args:
        budget: mean of the layers' query ratios.
        weights: of the layers in that mean.
        wanted: query ratio of each layer, up to a common factor.
        least, most: query ratios that each layer allows.

    Returns:
        The query ratio of each layer.
    """

    def shares(factor: float) -> list[float]:
        return [min(max(factor * ratio, low), high) for ratio, low, high in zip(wanted, least, most)]

    wanted = [max(ratio, 1e-6) for ratio in wanted]
    low, high = 0.0, max(ratio / want for ratio, want in zip(most, wanted))
    for _ in range(100):
        middle = (low + high) / 2
        spent = sum(weight * share for weight, share in zip(weights, shares(middle))) / sum(weights)
        low, high = (middle, high) if spent <= budget else (low, middle)
    return shares(low)
