from typing import Any

import torch
from mmengine.runner import Runner

from ...models.cost import CostMeter
from ...models.backbones.base import find_backbones
from ...models.dge.budget import budget_loss, mean_over_processes
from ...registry import HOOKS
from .loss_hook import LossHook


@HOOKS.register_module()
class BudgetHook(LossHook):
    """Train any mmpretrain, mmdet or mmseg model with DGE towards a computational budget (eq. 7 and 8).

    Adds ``loss_budget`` = weight * (beta - budget)^2 to the losses that the model returns, and ``query_ratio`` = beta
    to the log. Beta is averaged over the batch and over all processes.

    Args:
        budget: gamma, the aspired ratio of the dynamic layers' complexity to that without DGE, in (0, 1].
        weight: lambda.

    Raises:
        ValueError: for a budget outside of (0, 1]; before training for a model without DGE, or one whose granularities
            cannot reach the budget.
    """

    def __init__(self, budget: float = 0.5, weight: float = 1.) -> None:
        if not 0 < budget <= 1:
            raise ValueError(f'BudgetHook: budget={budget} must be greater than 0 and at most 1, the cost without DGE.')
        if weight < 0:
            raise ValueError(f'BudgetHook: weight={weight} must not be negative.')
        self.budget, self.weight = budget, weight

    def prepare(self, runner: Runner, model: torch.nn.Module) -> None:
        """Check the budget against the model."""
        backbones = [backbone for backbone in find_backbones(model) if backbone.has_dge]
        if not backbones:
            raise ValueError('BudgetHook found no DGE in the model: give its backbone dge=dict(granularities=(1, 2, 4)), '
                             'or leave out the hook.')
        for backbone in backbones:
            least, most = backbone.ratio_bounds()
            if not least <= self.budget <= most:
                raise ValueError(
                    f'BudgetHook: budget={self.budget} cannot be reached: on images of img_size the granularities of '
                    f'the {type(backbone).__name__} allow query ratios from {least:.4f} to {most:.4f}. Choose a budget '
                    'between them, or a coarser largest granularity.')
        self._meter = CostMeter(training=True, backbones=backbones)

    def on_forward(self, model: torch.nn.Module, losses: dict[str, Any] | None, inputs: dict[str, Any]) -> None:
        """Add ``loss_budget`` and ``query_ratio``."""
        costs = self._meter.take()
        if costs and losses is not None:
            ratio = mean_over_processes(torch.cat([cost.query_ratio for cost in costs]))
            losses['loss_budget'] = self.weight * budget_loss(ratio, self.budget)
            losses['query_ratio'] = ratio.detach()
