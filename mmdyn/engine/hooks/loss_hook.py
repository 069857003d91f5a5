from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner
from torch.utils.hooks import RemovableHandle

from ...models.checks import check_channels


def unwrapped(model: torch.nn.Module) -> torch.nn.Module:
    """The model without the wrappers of distributed training."""
    while is_model_wrapper(model):
        model = model.get_submodule('module')
    return model


class LossHook(Hook):
    """Base of the hooks that look at, or add to, the dict of losses which a model in training returns.

    Before any run, they refuse a model whose neck does not fit its backbone.
    """

    _handle: RemovableHandle | None = None

    def before_run(self, runner: Runner) -> None:
        """Check that the parts of the model fit."""
        check_channels(unwrapped(runner.model))

    def before_train(self, runner: Runner) -> None:
        """Watch the model's forward passes."""
        model = unwrapped(runner.model)
        self.prepare(runner, model)
        self._handle = model.register_forward_hook(self._call, with_kwargs=True)

    def after_train(self, runner: Runner) -> None:
        """Leave the model as it was."""
        if self._handle is not None:
            self._handle.remove()

    def prepare(self, runner: Runner, model: torch.nn.Module) -> None:
        """Called once before training with the model without its wrappers."""

    def on_forward(self, model: torch.nn.Module, losses: dict[str, Any] | None, inputs: dict[str, Any]) -> None:
        """Called after each pass in training mode.

        Args:
            model: the model without its wrappers.
            losses: what it returned, which may be changed; None if that is no dict of losses.
            inputs: the keyword arguments of the pass.
        """
        raise NotImplementedError

    def _call(self, model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if model.training:
            self.on_forward(model, output if isinstance(output, dict) else None, kwargs)
