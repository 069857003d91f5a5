from functools import partial
from typing import Any

import torch
from mmengine.runner import Runner
from torch.utils.hooks import RemovableHandle

from ...models.backbones.base import DynamicStages, check_sides, find_backbones
from ...models.checks import check_classes
from ...registry import HOOKS
from ...values import check_integer
from .loss_hook import LossHook, unwrapped


def image_files(samples: Any) -> list[str]:
    """The files of a batch's data samples, as far as they are known."""
    return [path for path in (getattr(sample, 'img_path', None) for sample in samples or []) if path]


def check_inputs(images: list[str], backbone: DynamicStages, inputs: tuple[Any, ...]) -> None:
    """A forward pre-hook of a backbone."""
    check_sides(backbone, inputs[0].shape, images)


@HOOKS.register_module()
class LossGuardHook(LossHook):
    """Stop a training whose loss is NaN or infinite, before the step that would spoil the weights, and say where.

    Before, it refuses data with more classes than the model's heads, and it names images that are too small for the
    backbone.

    Args:
        interval: look at the losses of each ``interval``-th iteration; a look synchronises an accelerator.
    """

    def __init__(self, interval: int = 1) -> None:
        check_integer('LossGuardHook: interval', interval, 1, what='a number of iterations')
        self.interval = interval
        self._images: list[str] = []
        self._handles: list[RemovableHandle] = []

    def before_run(self, runner: Runner) -> None:
        """Check that the parts of the model fit, and look at the sizes of what the backbone gets."""
        super().before_run(runner)
        self._handles = [
            backbone.register_forward_pre_hook(partial(check_inputs, self._images))
            for backbone in find_backbones(unwrapped(runner.model))
        ]

    def before_train(self, runner: Runner) -> None:
        """Check the data, and watch the model's forward passes."""
        super().before_train(runner)
        for loop in filter(None, (runner.train_loop, runner.val_loop)):
            check_classes(unwrapped(runner.model), loop.dataloader.dataset)

    def before_test(self, runner: Runner) -> None:
        """Check the data."""
        check_classes(unwrapped(runner.model), runner.test_loop.dataloader.dataset)

    def after_run(self, runner: Runner) -> None:
        """Leave the model as it was."""
        for handle in self._handles:
            handle.remove()

    def _before_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, mode: str = 'train') -> None:
        """Note the images."""
        self._images[:] = image_files(data_batch.get('data_samples') if isinstance(data_batch, dict) else None)

    def prepare(self, runner: Runner, model: torch.nn.Module) -> None:
        """Keep the runner, which knows the iteration."""
        self._runner = runner

    def on_forward(self, model: torch.nn.Module, losses: dict[str, Any] | None, inputs: dict[str, Any]) -> None:
        """Raise ValueError if a loss is not finite."""
        if losses is None or not self.every_n_train_iters(self._runner, self.interval):
            return
        values = {
            name: sum(v.mean() for v in value) if isinstance(value, (list, tuple)) else value.mean()
            for name, value in losses.items()
            if 'loss' in name
        }
        wrong = {name: value.item() for name, value in values.items() if not torch.isfinite(value)}
        if not wrong:
            return
        images = image_files(inputs.get('data_samples'))
        spoilt = [name for name, weight in model.named_parameters() if not torch.isfinite(weight).all()]
        raise ValueError(
            f'Training stopped in epoch {self._runner.epoch + 1}, iteration {self._runner.iter + 1}: '
            f'{", ".join(f"{name} is {value}" for name, value in wrong.items())}. '
            + (
                f'The weights are no longer finite, first {spoilt[0]}: lower the learning rate or clip gradients. '
                if spoilt
                else 'The weights are still finite: look at the images of this batch. '
            )
            + (f'Images: {", ".join(images)}' if images else '')
        )
