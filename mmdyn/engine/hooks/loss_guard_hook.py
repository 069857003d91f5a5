from typing import Any

import torch
from mmengine.runner import Runner

from ...registry import HOOKS
from .loss_hook import LossHook


@HOOKS.register_module()
class LossGuardHook(LossHook):
    """Stop a training whose loss is NaN or infinite, before the step that would spoil the weights, and say where.

    Args:
        interval: look at the losses of each ``interval``-th iteration; a look synchronises an accelerator.
    """

    def __init__(self, interval: int = 1) -> None:
        self.interval = interval

    def prepare(self, runner: Runner, model: torch.nn.Module) -> None:
        """Keep the runner, which knows the iteration."""
        self._runner = runner

    def on_forward(self, model: torch.nn.Module, losses: dict[str, Any] | None, inputs: dict[str, Any]) -> None:
        """Raise ValueError if a loss is not finite."""
        if losses is None or not self.every_n_train_iters(self._runner, self.interval):
            return
        values = {name: sum(v.mean() for v in value) if isinstance(value, (list, tuple)) else value.mean()
                  for name, value in losses.items() if 'loss' in name}
        wrong = {name: value.item() for name, value in values.items() if not torch.isfinite(value)}
        if not wrong:
            return
        samples = inputs.get('data_samples') or []
        images = [path for path in (getattr(sample, 'img_path', None) for sample in samples) if path]
        spoilt = [name for name, weight in model.named_parameters() if not torch.isfinite(weight).all()]
        raise ValueError(
            f'Training stopped in epoch {self._runner.epoch + 1}, iteration {self._runner.iter + 1}: '
            f'{", ".join(f"{name} is {value}" for name, value in wrong.items())}. '
            + (f'The weights are no longer finite, first {spoilt[0]}: lower the learning rate or clip gradients. '
               if spoilt else 'The weights are still finite: look at the images of this batch. ')
            + (f'Images: {", ".join(images)}' if images else ''))
