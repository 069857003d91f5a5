"""Which price of queries makes which query ratio in training, while the routers learn."""

import numpy as np
import torch
from mmengine.dist import all_reduce

from ..models.backbones.base import DynamicStages
from ..models.backbones.budget import expected_ratios

# Of a query of a layer of mean complexity, dense around 0; the greatest outweighs any difference of logits.
PRICES = 50 * np.sinh(np.linspace(-8, 8, 65)) / np.sinh(8)


class PriceCurve:
    """Query ratios at some prices, as a moving average over the iterations.

    Args:
        ratios: where to go on: those of an earlier run.
        momentum: weight of the average so far.
    """

    def __init__(self, ratios: list[float] | None = None, momentum: float = 0.9) -> None:
        self.ratios, self.momentum = ratios, momentum

    def update(self, backbones: list[DynamicStages]) -> None:
        """Note what the routers would spend, by their logits of the last training pass in all processes."""
        prices = torch.from_numpy(PRICES).float().to(next(backbones[0].entry.parameters()).device)
        found = torch.stack([expected_ratios(backbone, prices) for backbone in backbones]).detach().mean(0)
        all_reduce(found, 'mean')
        new = found.tolist()
        old = new if self.ratios is None else self.ratios
        self.ratios = [self.momentum * a + (1 - self.momentum) * b for a, b in zip(old, new)]

    def price(self, budget: float) -> float:
        """The price of a query ratio by linear interpolation, the nearest one out of reach; 0 in the beginning."""
        return 0.0 if self.ratios is None else float(np.interp(budget, self.ratios[::-1], PRICES[::-1]))
