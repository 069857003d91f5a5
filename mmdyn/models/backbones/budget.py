"""How a budget in inference is shared among the layers of a backbone: as prices, or as queries."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ...values import is_number
from ..cost import LayerCost
from ..dge import DynamicGrainedEncoder
from ..dge.budget import queries_of_region, share_budget
from ..dge.prices import Prices
from ..dge.routing import count_patches

if TYPE_CHECKING:
    from .base import DynamicStages


class DynamicLayer(NamedTuple):
    """A layer with DGE on images of ``img_size``: its cost, and its fewest and most queries."""

    cost: LayerCost
    bounds: tuple[int, int]


def encoders_of(backbone: 'DynamicStages') -> list[DynamicGrainedEncoder]:
    """The encoders, in the order of their layers."""
    modules = [module for stage, _ in backbone.named_stages() for module in stage.dge]
    return [module for module in modules if isinstance(module, DynamicGrainedEncoder)]


def dynamic_layers(backbone: 'DynamicStages') -> list[DynamicLayer]:
    """The layers with DGE, in their order."""
    found = []

    def fewest(encoder: DynamicGrainedEncoder | None, bounds: tuple[int, int]) -> tuple[int]:
        found.append(bounds)
        return bounds[:1]

    layers = backbone._cost_of(backbone.stage_shapes, fewest).layers
    return [DynamicLayer(cost, bounds) for cost, bounds in zip(layers, found, strict=True) if cost.dynamic]


def spent_layers(backbone: 'DynamicStages') -> list[tuple[LayerCost, DynamicGrainedEncoder]]:
    """What each layer with DGE spent in the last forward pass, and its encoder."""
    layers = [layer for layer in backbone.cost.layers if layer.dynamic]
    return list(zip(layers, encoders_of(backbone), strict=True))


def check_budget(backbone: 'DynamicStages', budget: float, mode: str) -> None:
    """Raise ValueError for a budget that the backbone cannot keep."""
    name = type(backbone.entry).__name__
    if not backbone.has_dge:
        raise ValueError(
            f'budget={budget}: the {name} has no DGE: give it dge=dict(granularities=(1, 2, 4)), or leave '
            'the budget out.'
        )
    if not is_number(budget, '[0, inf)'):
        raise ValueError(f'budget={budget!r}: give a query ratio, a number such as 0.4, or None.')
    least, most = backbone.ratio_bounds()
    if not least - 1e-6 <= budget <= most + 1e-6:
        raise ValueError(
            f'budget={budget} cannot be reached: on images of img_size the granularities of the {name} allow '
            f'query ratios from {least:.4f} to {most:.4f}. Choose a budget between them, or other '
            'granularities.'
        )
    if mode == 'exact' and any(encoder.routing == 'layer' for encoder in encoders_of(backbone)):
        raise ValueError(
            "An exact budget needs regions that choose, but routing='layer' makes one decision for an image: "
            "choose routing='region', or the mode 'average'."
        )


def check_layers(backbone: 'DynamicStages', prices: Prices) -> None:
    """Raise ValueError for prices that were measured on a model of other layers."""
    names = {layer.cost.name for layer in dynamic_layers(backbone)}
    if prices.layers.keys() != names:
        raise ValueError(
            f'The prices are of the layers {sorted(prices.layers)}, but those of the '
            f'{type(backbone.entry).__name__} with DGE are {sorted(names)}: measure them for this model.'
        )


def prices_of_layers(backbone: 'DynamicStages', price: float) -> list[float]:
    """The price of a query of each layer, in proportion to its complexity C^l, from that of the layers' mean."""
    if not backbone.has_dge:
        raise ValueError(
            f'price={price}: the {type(backbone.entry).__name__} has no DGE: give it '
            'dge=dict(granularities=(1, 2, 4)), or leave the price out.'
        )
    costs = [layer.cost.per_query for layer in dynamic_layers(backbone)]
    return [price * cost * len(costs) / sum(costs) for cost in costs]


def shares_of_layers(backbone: 'DynamicStages', budget: float, prices: Prices | None) -> list[float]:
    """The query ratio of each layer: what it spent on average at this budget, or without prices the same for all."""
    layers, wanted = dynamic_layers(backbone), {}
    if prices is not None:
        check_layers(backbone, prices)
        wanted = prices.at(budget)[1]
    bounds = [[queries / cost.dense_queries for queries in bounds] for cost, bounds in layers]
    return share_budget(
        budget,
        weights=[cost.per_query * cost.dense_queries for cost, _ in layers],
        wanted=[wanted.get(cost.name, 1.0) for cost, _ in layers],
        least=[least for least, _ in bounds],
        most=[most for _, most in bounds],
    )


def prices_of_granularities(encoder: DynamicGrainedEncoder, price: float, device: torch.device) -> Tensor:
    """(K,) what each granularity's logit is lowered by at a price of a query."""
    queries = queries_of_region(encoder.granularities, encoder.region)
    return torch.tensor([price * count for count in queries], dtype=torch.float32, device=device)


def decide_by(
    backbone: 'DynamicStages', prices: Sequence[float] | None = None, shares: Sequence[float] | None = None
) -> None:
    """Set the price of a query, or the share of the dense queries, of each layer; neither lets the routers decide."""
    device = next(backbone.entry.parameters()).device
    for index, encoder in enumerate(encoders_of(backbone)):
        encoder.router.share = None if shares is None else shares[index]
        encoder.router.price = None if prices is None else prices_of_granularities(encoder, prices[index], device)


def train_by(backbone: 'DynamicStages', price: float | None) -> None:
    """Set the price under which gates are drawn in training, as :meth:`DynamicBackbone.set_price` does in inference."""
    prices = None if price is None else prices_of_layers(backbone, price)
    device = next(backbone.entry.parameters()).device
    for index, encoder in enumerate(encoders_of(backbone)):
        encoder.router.training_price = (
            None if prices is None else prices_of_granularities(encoder, prices[index], device)
        )


def expected_ratios(backbone: 'DynamicStages', prices: Tensor) -> Tensor:
    """Query ratios that gates drawn under some prices have on average, by the logits of the last training pass.

    Args:
        prices: (P) lambda.

    Returns:
        (P) beta of eq. 7, with the probabilities of the gates, softmax((h - lambda c) / noise), in their place; its
        gradient is that of the noise's whole scale, as that of gates.
    """
    layers = spent_layers(backbone)
    shapes = [
        (stage, shape)
        for (stage, _), shape in zip(backbone.named_stages(), backbone.last_shapes)
        for encoder in stage.dge
        if encoder is not None
    ]
    of_layers, spent = prices_of_layers(backbone, 1.0), prices.new_zeros(len(prices))
    for (layer, encoder), (stage, shape), price in zip(layers, shapes, of_layers, strict=True):
        if encoder.decision.logits is None:  # frozen
            spent = spent + layer.per_query * layer.queries.to(prices).mean()
            continue
        logits = encoder.decision.logits.to(prices)
        if encoder.router.training_price is not None:
            logits = logits + encoder.router.training_price
        of_granularities = prices_of_granularities(encoder, price, prices.device)
        priced = logits - prices.view(-1, 1, 1, 1, 1) * of_granularities
        soft, drawn = priced.softmax(-1), (priced.detach() / max(encoder.noise, 1e-6)).softmax(-1)
        probabilities = drawn + (soft - soft.detach())
        patches = count_patches(shape, encoder.granularities, encoder.region, prices.device)
        queries = stage.num_extra + (probabilities * patches).sum((2, 3, 4)).mean(1)
        spent = spent + layer.per_query * queries
    return spent / sum(layer.per_query * layer.dense_queries for layer, _ in layers)
