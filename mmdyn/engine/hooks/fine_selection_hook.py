from mmengine.hooks import Hook
from mmengine.runner import Runner

from ...models.backbones.base import find_backbones
from ...models.backbones.cfvit import CFViT
from ...models.checks import has_backbone
from ...registry import HOOKS
from ...values import check_integer
from .loss_hook import unwrapped


@HOOKS.register_module()
class FineSelectionHook(Hook):
    """Train CF-ViT's fine stage on all patches first, and on those split by their score from epoch ``begin``.

    Args:
        begin: the epoch, counted from 0, that is the first to split only the informative patches; 0 does so from the
            start. The paper's 200 is meant for 300 epochs.

    Raises:
        ValueError: for a negative ``begin``; before training for a model without CFViT, or a ``begin`` that the
            training does not reach.
    """

    def __init__(self, begin: int = 200) -> None:
        check_integer(
            'FineSelectionHook: begin', begin, 0, what='an epoch; 0 splits the informative patches from the first'
        )
        self.begin = begin

    def before_train(self, runner: Runner) -> None:
        """Find the backbones, and check that the training reaches ``begin``."""
        model = unwrapped(runner.model)
        self._backbones: list[CFViT] = []
        if not has_backbone(model, 'FineSelectionHook'):
            return
        self._backbones = [backbone for backbone in find_backbones(model) if isinstance(backbone, CFViT)]
        if not self._backbones:
            raise ValueError(
                'FineSelectionHook found no CFViT in the model: give it the backbone mmdyn.CFViT, or '
                'leave out the hook.'
            )
        if self.begin >= runner.max_epochs:
            raise ValueError(
                f'FineSelectionHook: begin={self.begin} is not reached by max_epochs={runner.max_epochs}: '
                'no epoch would split only the informative patches, as the test does. Choose a begin less '
                'than max_epochs; a training by iterations has one epoch.'
            )

    def before_train_epoch(self, runner: Runner) -> None:
        """Choose by the epoch alone, so that a resumed training goes on as it was."""
        for backbone in self._backbones:
            backbone.split_all = runner.epoch < self.begin

    def after_train(self, runner: Runner) -> None:
        """Leave the model as it was."""
        for backbone in self._backbones:
            backbone.split_all = False
