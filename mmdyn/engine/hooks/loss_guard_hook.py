import torch
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper

from ...registry import HOOKS


@HOOKS.register_module()
class LossGuardHook(Hook):
    """Stop a training whose loss is NaN or infinite, before the step that would spoil the weights, and say where.

    Args:
        interval: look at the losses of each ``interval``-th iteration; a look synchronises an accelerator.
    """

    def __init__(self, interval: int = 1):
        self.interval = interval

    def before_train(self, runner) -> None:
        """Watch the model's forward passes."""
        model = runner.model
        while is_model_wrapper(model):
            model = model.module
        self._runner = runner
        self._handle = model.register_forward_hook(self._check, with_kwargs=True)

    def after_train(self, runner) -> None:
        """Leave the model as it was."""
        self._handle.remove()

    def _check(self, model, args, kwargs, output):
        if not (model.training and isinstance(output, dict)) or not self.every_n_train_iters(self._runner, self.interval):
            return
        losses = {name: sum(v.mean() for v in value) if isinstance(value, (list, tuple)) else value.mean()
                  for name, value in output.items() if 'loss' in name}
        wrong = {name: value.item() for name, value in losses.items() if not torch.isfinite(value)}
        if not wrong:
            return
        samples = kwargs.get('data_samples') or []
        images = [path for path in (getattr(sample, 'img_path', None) for sample in samples) if path]
        spoilt = [name for name, weight in model.named_parameters() if not torch.isfinite(weight).all()]
        raise ValueError(
            f'Training stopped in epoch {self._runner.epoch + 1}, iteration {self._runner.iter + 1}: '
            f'{", ".join(f"{name} is {value}" for name, value in wrong.items())}. '
            + (f'The weights are no longer finite, first {spoilt[0]}: lower the learning rate or clip gradients. '
               if spoilt else 'The weights are still finite: look at the images of this batch. ')
            + (f'Images: {", ".join(images)}' if images else ''))
