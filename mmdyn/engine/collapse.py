"""Layers in which nearly all regions choose one granularity for long: they have stopped to decide by the image."""

from typing import Any, NamedTuple

import torch
from mmengine.dist import all_reduce
from torch import Tensor

from ..models.backbones.base import DynamicStages
from ..models.backbones.budget import spent_layers
from ..models.dge import share_within_images

# Routers start with the finest granularity at a probability of 0.95.
NEARLY_ALL = 0.99

ADVICE = {
    True: 'the routers feel too little of the budget. Lower budget or raise weight of BudgetHook, or let the routers '
    "learn faster: optim_wrapper=dict(paramwise_cfg=dict(custom_keys={'.router': dict(lr_mult=10.)})).",
    False: 'the budget outweighs the task. Raise budget or lower weight of BudgetHook, start from a checkpoint of the '
    "dense model, or let routers learn from what they did not choose: dge=dict(train_mode='dense'), the default.",
}


def count_choices(choice: Tensor, num: int) -> Tensor:
    """(B, rows, columns) indices -> (num,) how many regions chose each granularity, without waiting for the device."""
    return (choice.flatten()[:, None] == torch.arange(num, device=choice.device)).sum(0)


class LayerView(NamedTuple):
    """What a layer decided on some images.

    Attributes:
        query_ratio: mean of its query ratios.
        shares: of each granularity, the share of the regions that chose it.
        within_images: see :func:`~mmdyn.models.dge.share_within_images`.
    """

    query_ratio: float
    shares: dict[int, float]
    within_images: float


def look(backbones: list[DynamicStages]) -> dict[str, LayerView]:
    """What each layer decided in the last forward pass, over the images of all processes, by its name."""
    rows, phis = {}, {}
    for number, backbone in enumerate(backbones):
        for layer, encoder in spent_layers(backbone):
            name = layer.name if len(backbones) == 1 else f'{number}.{layer.name}'
            ratio, phis[name], decision = layer.query_ratio.detach(), encoder.granularities, encoder.decision
            assert decision is not None and layer.finest is not None  # or there would be no cost
            counts = count_choices(decision.choice, len(phis[name])).to(ratio)
            finest = layer.finest.to(ratio)
            sums = [ratio.sum(), ratio.new_tensor(len(ratio)), finest.sum(), finest.square().sum()]
            rows[name] = torch.cat([torch.stack(sums), counts])
    together = torch.cat([*rows.values()])
    all_reduce(together)
    result = {}
    for name, values in zip(rows, together.split([len(row) for row in rows.values()])):
        total, images, finest, squares, *counts = values.tolist()
        result[name] = LayerView(
            total / images,
            {phi: count / sum(counts) for phi, count in zip(phis[name], counts)},
            share_within_images(finest / images, squares / images),
        )
    return result


class CollapseWatch:
    """Notices which layers have collapsed.

    Args:
        patience: iterations for which nearly all regions of a layer must choose one granularity.
        state: where to go on: that of the watch of an earlier run.
    """

    def __init__(self, patience: int, state: dict[str, list[Any]] | None = None) -> None:
        # Of each layer that may be collapsing: the granularity, since which iteration, and whether it was told.
        self.patience = patience
        self.state: dict[str, list[Any]] = {} if state is None else state

    def warnings(self, iteration: int, shares: dict[str, dict[int, float]]) -> list[str]:
        """What is to be said about the shares of the regions that chose each granularity in an iteration."""
        news: dict[tuple[int, bool], list[str]] = {}
        for layer, share in shares.items():
            phi = max(share, key=share.__getitem__)
            if len(share) == 1 or share[phi] < NEARLY_ALL:
                self.state.pop(layer, None)
                continue
            known = self.state.get(layer)
            if known is None or known[0] != phi:
                known = self.state[layer] = [phi, iteration, False]
            if not known[2] and iteration - known[1] >= self.patience:
                known[2] = True
                finest = phi == min(filter(None, share))
                news.setdefault((phi, finest), []).append(f'{layer} (since iteration {known[1]})')
        return [
            f'{"All layers with DGE have" if len(layers) == len(shares) else "A part of the layers with DGE has"} '
            f'collapsed: for at least {self.patience} iterations {NEARLY_ALL:.0%} or more of the regions chose '
            f'granularity {phi} in {", ".join(layers)}. If that is not wanted, {ADVICE[finest]}'
            for (phi, finest), layers in news.items()
        ]
