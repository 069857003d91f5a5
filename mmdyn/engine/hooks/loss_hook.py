from typing import Optional

import torch
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper

from ..checks import check_channels


def unwrapped(model: torch.nn.Module) -> torch.nn.Module:
    """The model without the wrappers of distributed training."""
    while is_model_wrapper(model):
        model = model.module
    return model


class LossHook(Hook):
    """Base of the hooks that look at, or add to, the dict of losses which a model in training returns.

    Before any run, they refuse a model whose neck does not fit its backbone.
    """
    _handle = None

    def before_run(self, runner) -> None:
        """Check that the parts of the model fit."""
        check_channels(unwrapped(runner.model))

    def before_train(self, runner) -> None:
        """Watch the model's forward passes."""
        model = unwrapped(runner.model)
        self.prepare(runner, model)
        self._handle = model.register_forward_hook(self._call, with_kwargs=True)

    def after_train(self, runner) -> None:
        """Leave the model as it was."""
        if self._handle is not None:
            self._handle.remove()

    def prepare(self, runner, model: torch.nn.Module) -> None:
        """Called once before training with the model without its wrappers."""

    def on_forward(self, model: torch.nn.Module, losses: Optional[dict], inputs: dict) -> None:
        """Called after each pass in training mode.

        Args:
            model: the model without its wrappers.
            losses: what it returned, which may be changed; None if that is no dict of losses.
            inputs: the keyword arguments of the pass.
        """
        raise NotImplementedError

    def _call(self, model, args, kwargs, output):
        if model.training:
            self.on_forward(model, output if isinstance(output, dict) else None, kwargs)
