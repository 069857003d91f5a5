from collections.abc import Sequence
from typing import Any

from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch import nn

from ...registry import HOOKS
from ...values import check_integer, check_type
from .loss_hook import unwrapped


@HOOKS.register_module()
class FrozenStartHook(Hook):
    """Train only some parameters, such as the routers of DGE, in the first iterations.

    What waits has a learning rate of 0 until then, and so keeps its values; gradients are as ever, so that it works
    with distributed training, mixed precision and accumulation. The optimizer's averages fill meanwhile.

    Args:
        iters: iterations in which the others wait; what counts is the number of the iteration, also after resuming.
        trained: parts of the names of the parameters that learn from the start.

    Raises:
        ValueError: for ``iters`` that are no positive integer; before training for names that no parameter has, or an
            optimizer that has waiting and learning parameters in one group.
    """

    def __init__(self, iters: int = 500, trained: Sequence[str] = ('.router', 'head', 'neck')) -> None:
        check_integer('FrozenStartHook: iters', iters, 1, what='a number of iterations')
        trained = (trained,) if isinstance(trained, str) else trained
        check_type('FrozenStartHook: trained', trained, (list, tuple), "parts of names, e.g. ('.router', 'head')")
        for part in trained:
            check_type('FrozenStartHook: trained', part, str, "parts of names, e.g. ('.router', 'head')")
        self.iters, self.trained = iters, tuple(trained)

    def before_train(self, runner: Runner) -> None:
        """Find the optimizer's groups of what waits."""
        learning = self._learning(unwrapped(runner.model))
        self._waiting: list[dict[str, Any]] = []
        for group in runner.optim_wrapper.optimizer.param_groups:
            kinds = {id(parameter) in learning for parameter in group['params']}
            if len(kinds) > 1:
                raise ValueError(
                    'FrozenStartHook: the optimizer has parameters that wait and that learn in one group of one '
                    "learning rate: give optim_wrapper a paramwise_cfg, e.g. dict(custom_keys={'.router': "
                    'dict(lr_mult=10.0)}), which makes a group of each.'
                )
            if kinds == {False}:
                self._waiting.append(group)

    def _learning(self, model: nn.Module) -> set[int]:
        names = dict(model.named_parameters())
        unknown = [part for part in self.trained if not any(part in name for name in names)]
        if len(unknown) == len(self.trained):
            raise ValueError(
                f'FrozenStartHook: trained={self.trained} are in no name of the parameters: nothing would learn. '
                f'Names are such as {", ".join(list(names)[:3])}.'
            )
        return {id(weight) for name, weight in names.items() if any(part in name for part in self.trained)}

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Let wait what waits."""
        self._rates = [group['lr'] for group in self._waiting]
        if runner.iter < self.iters:
            for group in self._waiting:
                group['lr'] = 0.0

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: dict[str, Any] | None = None
    ) -> None:
        """Give the rates back, before schedulers go on from them and before they are saved."""
        for group, rate in zip(self._waiting, self._rates):
            group['lr'] = rate
