"""The classifier of CF-ViT. This module imports mmpretrain, when the classifier is first built."""

import torch
import torch.nn.functional as F
from mmpretrain.models.classifiers import ImageClassifier
from mmpretrain.models.heads import ClsHead
from mmpretrain.structures import DataSample
from torch import Tensor

from ...values import check_choice, check_number, check_type
from ..cfvit import coarse_targets, fine_targets
from ..heads.lvvit_head import LVViTHead, stack_token_scores

LOSSES = ('kl', 'ce')


class CoarseToFineClassifier(ImageClassifier):
    """An image classifier whose backbone, :class:`~mmdyn.models.CFViT`, may stop after its coarse stage.

    Args:
        coarse_loss: what teaches the coarse stage: ``'kl'``, the fine stage's prediction (eq. 14), or ``'ce'``, the
            labels (eq. 15).
        test_cfg: ``threshold``, eta: an image whose coarse confidence reaches it goes no further; 0 stops all, 1 none.
            ``every_stage``: run the fine stage on all images nevertheless and keep its scores; the prediction stays
            that of the stage at which the image would have stopped.
        kwargs: as for mmpretrain's ImageClassifier.
    """

    def __init__(self, *args, coarse_loss: str = 'kl', test_cfg: dict | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        if self.with_neck:
            raise ValueError(
                'CoarseToFineClassifier takes no neck, because the head takes what the backbone returns: remove it.'
            )
        if self.with_head and not isinstance(self.head, ClsHead):
            raise ValueError(
                f'CoarseToFineClassifier stops at the confidence of one class by a softmax, which the head '
                f'{type(self.head).__name__} does not give: use a head for one label, e.g. LinearClsHead, or '
                'the model type ImageClassifier with the backbone mmdyn.DeiT or mmdyn.LVViT.'
            )
        check_choice('coarse_loss', coarse_loss, LOSSES)
        check_type('test_cfg', test_cfg, (dict, type(None)), 'a dict such as dict(threshold=0.5)')
        options = {**dict(threshold=0.5, every_stage=False), **(test_cfg or {})}
        unknown = set(options) - {'threshold', 'every_stage'}
        if unknown:
            raise ValueError(f'test_cfg has no option {sorted(map(str, unknown))}: it takes threshold and every_stage.')
        check_number('test_cfg threshold', options['threshold'], '[0, 1]', 'a confidence')
        check_choice('test_cfg every_stage', options['every_stage'], (True, False))
        self.coarse_loss, self.test_cfg = coarse_loss, options

    def forward(self, inputs: Tensor, data_samples: list[DataSample] | None = None, mode: str = 'tensor'):
        """As mmpretrain's; ``mode='tensor'`` returns the logits of both stages of every image."""
        if mode == 'tensor':
            return tuple(self.head((out,)) for out in self.backbone(inputs))
        return super().forward(inputs, data_samples, mode)

    def loss(self, inputs: Tensor, data_samples: list[DataSample]) -> dict:
        """Eq. 14: the head's loss on the fine stage, and ``loss_coarse``."""
        stage = self.backbone.coarse(inputs)
        tokens, chosen = self.backbone.fine(inputs, stage)
        coarse, fine = self.backbone.output(stage.tokens), self.backbone.output(tokens)
        coarse_labels, fine_labels = self._token_labels(data_samples, chosen)
        losses = self.head.loss((fine,), data_samples, **fine_labels)
        if self.coarse_loss == 'ce':
            coarse_losses = self.head.loss((coarse,), data_samples, **coarse_labels)
            losses['loss_coarse'] = sum(value for name, value in coarse_losses.items() if 'loss' in name)
        else:
            teacher = self.head((fine,)).detach().softmax(-1)
            losses['loss_coarse'] = F.kl_div(self.head((coarse,)).log_softmax(-1), teacher, reduction='batchmean')
        return losses

    def _token_labels(self, data_samples: list[DataSample], chosen: Tensor) -> tuple[dict, dict]:
        """What the head's loss needs to know of the patch tokens of each stage, if there are token labels."""
        maps = stack_token_scores(data_samples, chosen.device) if isinstance(self.head, LVViTHead) else None
        if maps is None:
            return {}, {}
        labels, columns = maps.flatten(1, 2), self.backbone.coarse_size
        stages = coarse_targets(labels, columns), fine_targets(labels, chosen, columns)
        return tuple(dict(token_score=targets) for targets in stages)

    def predict(self, inputs: Tensor, data_samples: list[DataSample] | None = None, **kwargs) -> list[DataSample]:
        """Classify; only the images that the coarse stage is not sure of go on, in one batch.

        Returns:
            Data samples with ``pred_score`` and ``pred_label``, ``coarse_score``, ``exit_stage`` (0 coarse, 1 fine),
            ``macs`` that the backbone spent and, where the fine stage ran, ``fine_score`` and ``regions``, the indices
            of the split patches in the coarse grid.
        """
        coarse = self.backbone.coarse(inputs)
        coarse_score = self.head((self.backbone.output(coarse.tokens),)).softmax(-1)
        threshold = self.test_cfg['threshold']
        exits = (coarse_score.amax(-1) >= threshold) & (threshold < 1)
        goes_on = torch.arange(len(inputs), device=inputs.device)
        if not self.test_cfg['every_stage']:
            goes_on = goes_on[~exits]
        fine_score, regions = {}, {}
        if len(goes_on):
            tokens, chosen = self.backbone.fine(inputs[goes_on], type(coarse)(*(part[goes_on] for part in coarse)))
            scores = self.head((self.backbone.output(tokens),)).softmax(-1)
            fine_score, regions = (dict(zip(goes_on.tolist(), values)) for values in (scores, chosen))
        spent = self.backbone.stage_macs()
        results = []
        for i, (sample, stops) in enumerate(zip(data_samples or [DataSample() for _ in inputs], exits.tolist())):
            score = coarse_score[i] if stops else fine_score[i]
            sample.set_pred_score(score).set_pred_label(score.argmax(-1, keepdim=True))
            sample.set_field(coarse_score[i], 'coarse_score')
            sample.set_field(int(not stops), 'exit_stage')
            sample.set_field(spent[0] + (0 if stops else spent[1]), 'macs')
            for name, values in (('fine_score', fine_score), ('regions', regions)):
                sample.pop(name, None)  # of an earlier prediction
                if i in values:
                    sample.set_field(values[i], name)
            results.append(sample)
        return results
