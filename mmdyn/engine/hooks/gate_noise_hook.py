from typing import Any

from mmengine.hooks import Hook
from mmengine.runner import Runner

from ...models.backbones.budget import encoders_of
from ...models.checks import dynamic_backbones
from ...registry import HOOKS
from ...values import check_number
from .loss_hook import unwrapped


@HOOKS.register_module()
class GateNoiseHook(Hook):
    """Fade the noise that the gates of DGE are drawn with (eq. 4), so that training ends with the choices of inference.

    Inference takes the greatest logit. Where a region's logits are near each other, as most are after a short training,
    noise still draws them all: a layer that spends half of its queries in training may spend nearly all of them
    afterwards. The scale of the noise is 1 up to a share ``begin`` of the iterations, falls on a line, and is 0 from
    ``end`` on; it follows from the number of the iteration alone, also after resuming. It is best to begin when the
    budget's schedule has come to its end: routers explore until then.

    Args:
        begin: share of the training's iterations, in [0, 1), up to which the noise is whole.
        end: share, in (0, 1], from which there is none; not before ``begin``.

    Raises:
        ValueError: for shares out of these ranges or order; before training for a model without DGE.
    """

    def __init__(self, begin: float = 0.4, end: float = 0.8) -> None:
        check_number('GateNoiseHook: begin', begin, '[0, 1)', 'a part of the iterations')
        check_number('GateNoiseHook: end', end, '(0, 1]', 'a part of the iterations')
        if not begin <= end:
            raise ValueError(f'GateNoiseHook: begin={begin} is behind end={end}: give shares such as 0.4 and 0.8.')
        self.begin, self.end = begin, end

    def before_train(self, runner: Runner) -> None:
        """Find the encoders."""
        backbones = dynamic_backbones(unwrapped(runner.model), 'GateNoiseHook')
        self._encoders = [encoder for backbone in backbones for encoder in encoders_of(backbone)]

    def scale(self, progress: float) -> float:
        """Of the noise, when a share of the iterations is done."""
        if progress >= self.end:
            return 0.0
        return 1.0 if progress <= self.begin else (self.end - progress) / (self.end - self.begin)

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Set the scale of the noise."""
        self._set(self.scale(runner.iter / runner.max_iters))

    def after_train(self, runner: Runner) -> None:
        """Leave the model as it was."""
        self._set(1.0)

    def _set(self, scale: float) -> None:
        for encoder in self._encoders:
            encoder.noise = scale
