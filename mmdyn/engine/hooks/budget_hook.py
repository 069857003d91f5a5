import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from mmengine.runner import Runner

from ...models.backbones.budget import expected_ratios, train_by
from ...models.checks import dynamic_backbones
from ...models.cost import BackboneCost, CostMeter
from ...models.dge.budget import budget_loss, mean_over_processes
from ...registry import HOOKS
from ...values import check_choice, check_integer, check_number
from ..collapse import CollapseWatch, look
from ..price_curve import PriceCurve
from .loss_hook import LossHook

SCHEDULES = 'constant', 'linear', 'cosine'
PRICE_CURVE = 'price_curve'
ROUNDING = 1e-6  # of a query ratio, which is a sum over layers


@HOOKS.register_module()
class BudgetHook(LossHook):
    """Train any mmpretrain, mmdet or mmseg model with DGE towards a computational budget (eq. 7 and 8).

    Adds ``loss_budget`` = weight * (beta - budget)^2 to the losses that the model returns, and ``query_ratio`` = beta
    to the log. Beta is averaged over the batch and over all processes.

    A training that starts from a dense model had better not save at once: with a ``schedule`` the target goes from
    ``start`` to ``budget`` in the first ``share`` of the iterations and stays there. It follows from the number of the
    iteration alone, also after resuming, and is logged as ``budget``.

    One budget for all layers lets whole layers go fine or coarse, whatever an image shows. With a ``layer_weight`` a
    further loss, ``loss_layers`` = layer_weight * the mean of (beta_l - budget)^2 over the layers that decide for more
    than one region, makes that dearer, so that they tell regions apart.

    A checkpoint that is to serve any budget is trained for many: with ``budget=(0.25, 1.0)`` each iteration draws one,
    uniformly, by the run's seed and its own number. A price of queries makes it: before the gates are drawn, logits are
    lowered by lambda c_k, as ``backbone.set_budget`` does in inference. The price follows from the logits of the
    iterations before. ``loss_budget`` then holds what the routers would spend at no price in the middle of the range,
    about which a test without a budget spends. ``budget`` and ``price`` are logged.

    Each ``log_interval`` iterations a line of the log, and the visualizer's scalars ``query_ratio/<layer>`` and
    ``within_images/<layer>``, tell the query ratio of each layer in that iteration, and how much of the variance of its
    choice lies within images: near 0 a layer treats all regions of an image alike. A warning names the layers in which
    nearly all regions have chosen one granularity for ``patience`` iterations, since when, and what to try.

    Args:
        budget: gamma, the aspired ratio of the dynamic layers' complexity to that without DGE, in (0, 1]; or the least
            and the greatest of those that are drawn.
        weight: lambda.
        log_interval: iterations from one look at the layers to the next.
        patience: iterations before the warning, which counts those with the budget itself.
        start: the first target, in (0, 1]. 1 asks for the dense model.
        share: of the training's iterations, in (0, 1), after which the target is the budget.
        schedule: ``'constant'``, or how the target moves: ``'linear'``, or by half a period of a ``'cosine'``.
        layer_weight: of the single layers' distance from the target; much less than ``weight``.

    Raises:
        ValueError: for a budget or start outside of (0, 1], a range of budgets that is none, a share outside of (0, 1),
            an unknown schedule, or intervals that are no positive integers; before training for a model without DGE,
            one whose granularities cannot reach a budget or the start, or a training that has no iteration with the
            budget.
    """

    _meter: CostMeter | None = None
    _curve: PriceCurve | None = None

    def __init__(
        self,
        budget: float | tuple[float, float] = 0.5,
        weight: float = 1.0,
        log_interval: int = 100,
        patience: int = 1000,
        start: float = 1.0,
        share: float = 0.4,
        schedule: str = 'constant',
        layer_weight: float = 0.0,
    ) -> None:
        self.draws = isinstance(budget, (tuple, list))
        pair: Sequence[float] = budget if isinstance(budget, (tuple, list)) else (budget, budget)
        allowed = 'give one, or the least and the greatest to draw from, e.g. (0.25, 1.0).'
        if len(pair) != 2:
            raise ValueError(f'BudgetHook: budget={budget}: {allowed}')
        for name, value in (('budget', pair[0]), ('budget', pair[1]), ('start', start)):
            check_number(f'BudgetHook: {name}', value, '(0, 1]', 'the share of the cost without DGE')
        if self.draws and not pair[0] < pair[1]:
            raise ValueError(f'BudgetHook: budget={budget}: {allowed}')
        self.budget, self.range = budget, (pair[0], pair[1])
        for name, value in (('weight', weight), ('layer_weight', layer_weight)):
            check_number(f'BudgetHook: {name}', value, '[0, inf)')
        for name, value in (('log_interval', log_interval), ('patience', patience)):
            check_integer(f'BudgetHook: {name}', value, 1, what='a number of iterations')
        check_choice('BudgetHook: schedule', schedule, SCHEDULES)
        check_number(
            'BudgetHook: share', share, '(0, 1)', 'a part of the iterations; the rest trains with the budget itself'
        )
        self.weight, self.layer_weight = weight, layer_weight
        self.log_interval, self.patience = log_interval, patience
        self.start, self.share, self.schedule = start, share, schedule

    def prepare(self, runner: Runner, model: torch.nn.Module) -> None:
        """Check the budget against the model, and the schedule against the training."""
        self._runner, self._meter, self._curve = runner, None, None
        backbones = dynamic_backbones(model, 'BudgetHook')
        if not backbones:
            return
        for backbone in backbones:
            least, most = backbone.ratio_bounds()
            targets = [('budget', target) for target in dict.fromkeys(self.range)]
            for name, target in targets + ([] if self.schedule == 'constant' else [('start', self.start)]):
                if not least - ROUNDING <= target <= most + ROUNDING:
                    raise ValueError(
                        f'BudgetHook: {name}={target} cannot be reached: on images of img_size the granularities of '
                        f'the {type(backbone.entry).__name__} allow query ratios from {least:.4f} to {most:.4f}. '
                        f'Choose a {name} between them, or {"a coarser largest" if target < least else "a finer"} '
                        'granularity.'
                    )
        if self.progress(0) < 1 and self.progress(runner.max_iters - 1) < 1:
            raise ValueError(
                f'BudgetHook: the {self.schedule} schedule never reaches budget={self.budget}: share='
                f'{self.share} of the {runner.max_iters} iterations leaves none of them to train with it. '
                'Choose a lower share, or train longer.'
            )
        self._backbones, self._meter = backbones, CostMeter(training=True, backbones=backbones)
        if self.draws:  # the message hub is part of the checkpoints
            self._curve = PriceCurve(runner.message_hub.get_info(PRICE_CURVE, None))

    def progress(self, iteration: int) -> float:
        """Of the schedule, at least 1 where it has reached the budget, in an iteration counted from 0."""
        return 1.0 if self.schedule == 'constant' else iteration / (self.share * self._runner.max_iters)

    def towards(self, budget: float, iteration: int) -> float:
        """What the schedule makes of a budget in an iteration."""
        progress = self.progress(iteration)
        if progress >= 1:
            return budget
        part = progress if self.schedule == 'linear' else (1 - math.cos(math.pi * progress)) / 2
        return self.start + part * (budget - self.start)

    def target(self, iteration: int) -> float:
        """The budget of an iteration, the same in all processes."""
        budget = self.range[0]
        if self.draws:
            budget = np.random.default_rng((self._runner.seed, iteration)).uniform(*self.range)
        return self.towards(budget, iteration)

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Set the price of the budget that the iteration draws."""
        if self._curve is not None:
            self._set_price(self._curve.price(self.target(runner.iter)))

    def _set_price(self, price: float | None) -> None:
        self._price = price
        for backbone in self._backbones:
            train_by(backbone, price)

    def after_train(self, runner: Runner) -> None:
        """Leave the model as it was."""
        super().after_train(runner)
        if self._curve is not None:
            self._set_price(None)

    def on_forward(self, model: torch.nn.Module, losses: dict[str, Any] | None, inputs: dict[str, Any]) -> None:
        """Add ``loss_budget`` and ``query_ratio``."""
        costs = self._meter.take() if self._meter else []
        if not costs or losses is None:
            return
        ratio = mean_over_processes(torch.cat([cost.query_ratio for cost in costs]))
        iteration = self._runner.iter
        if self.draws or self.schedule != 'constant':
            losses['budget'] = ratio.new_full((), self.target(iteration))
        losses['query_ratio'], target = ratio.detach(), self.towards(sum(self.range) / 2, iteration)
        if self._curve is not None:
            losses['price'] = ratio.new_full((), self._price or 0.0)
            self._curve.update(self._backbones)
            self._runner.message_hub.update_info(PRICE_CURVE, self._curve.ratios)
            no_price = ratio.new_zeros(1)
            ratio = mean_over_processes(torch.cat([expected_ratios(each, no_price) for each in self._backbones]))
        losses['loss_budget'] = self.weight * budget_loss(ratio, target)
        if self.layer_weight:
            losses['loss_layers'] = self.layer_weight * self._distance_of_layers(costs, self.target(iteration))

    def _distance_of_layers(self, costs: list[BackboneCost], target: float) -> torch.Tensor:
        """Mean squared distance of the layers' query ratios from a target; 0 if none decides for several regions."""
        passes = [[layer.query_ratio for layer in cost.layers if layer.decisions > 1] for cost in costs]
        means = [mean_over_processes(torch.stack(ratios, -1)) for ratios in passes if ratios]
        return budget_loss(torch.cat(means), target).mean() if means else costs[0].query_ratio.new_zeros(())

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: dict[str, Any] | None = None
    ) -> None:
        """Log what the layers decided, and warn of those that have collapsed."""
        if self._meter is None or not self.every_n_train_iters(runner, self.log_interval):
            return
        iteration, layers = runner.iter + 1, look(self._backbones)
        runner.logger.info(
            f'query_ratio by layer in iteration {iteration} (share of its choice that varies within images): '
            + ', '.join(f'{name} {layer.query_ratio:.3f} ({layer.within_images:.2f})' for name, layer in layers.items())
        )
        for title in ('query_ratio', 'within_images'):
            scalars = {f'{title}/{name}': getattr(layer, title) for name, layer in layers.items()}
            runner.visualizer.add_scalars(scalars, step=iteration)
        if self.progress(runner.iter) < 1:
            return  # the finest granularity everywhere is what was asked for
        # The message hub is part of the checkpoints.
        watch = CollapseWatch(self.patience, runner.message_hub.get_info('collapse', {}))
        for warning in watch.warnings(iteration, {name: layer.shares for name, layer in layers.items()}):
            runner.logger.warning(warning)
        runner.message_hub.update_info('collapse', watch.state)
