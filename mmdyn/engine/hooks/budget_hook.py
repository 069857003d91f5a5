from typing import List

import torch
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper

from ...analysis.complexity import CostMeter
from ...models.backbones.base import DynamicBackbone
from ...models.dge.budget import budget_loss, mean_over_processes
from ...registry import HOOKS


def dynamic_backbones(model: torch.nn.Module) -> List[DynamicBackbone]:
    """The backbones of a model that have DGE."""
    return [module for module in model.modules() if isinstance(module, DynamicBackbone) and module.has_dge]


@HOOKS.register_module()
class BudgetHook(Hook):
    """Train any mmpretrain, mmdet or mmseg model with DGE towards a computational budget (eq. 7 and 8).

    Adds ``loss_budget`` = weight * (beta - budget)^2 to the losses that the model returns, and ``query_ratio`` = beta to
    the log. Beta is averaged over the batch and over all processes.

    Args:
        budget: gamma, the aspired ratio of the dynamic layers' complexity to that without DGE, in (0, 1].
        weight: lambda.

    Raises:
        ValueError: for a budget outside of (0, 1]; before training for a model without DGE, or one whose granularities
            cannot reach the budget.
    """

    def __init__(self, budget: float = 0.5, weight: float = 1.):
        if not 0 < budget <= 1:
            raise ValueError(f'BudgetHook: budget={budget} must be greater than 0 and at most 1, the cost without DGE.')
        if weight < 0:
            raise ValueError(f'BudgetHook: weight={weight} must not be negative.')
        self.budget, self.weight = budget, weight
        self._handle = None

    def before_train(self, runner) -> None:
        """Check the budget against the model and watch its forward passes."""
        model = runner.model
        while is_model_wrapper(model):
            model = model.module
        backbones = dynamic_backbones(model)
        if not backbones:
            raise ValueError('BudgetHook found no DGE in the model: give its backbone dge=dict(granularities=(1, 2, 4)), '
                             'or leave out the hook.')
        for backbone in backbones:
            least, most = backbone.ratio_bounds()
            if not least <= self.budget <= most:
                raise ValueError(
                    f'BudgetHook: budget={self.budget} cannot be reached: on images of img_size the granularities of the '
                    f'{type(backbone).__name__} allow query ratios from {least:.4f} to {most:.4f}. Choose a budget '
                    'between them, or a coarser largest granularity.')
        self._meter = CostMeter(training=True, backbones=backbones)
        self._handle = model.register_forward_hook(self._add_loss)

    def after_train(self, runner) -> None:
        """Leave the model as it was."""
        if self._handle is not None:
            self._handle.remove()

    def _add_loss(self, model, args, output):
        costs = self._meter.take()
        if model.training and isinstance(output, dict) and costs:
            ratio = mean_over_processes(torch.cat([cost.query_ratio for cost in costs]))
            output['loss_budget'] = self.weight * budget_loss(ratio, self.budget)
            output['query_ratio'] = ratio.detach()
