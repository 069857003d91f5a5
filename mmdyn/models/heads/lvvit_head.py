"""LV-ViT's two linear classifiers. This module imports mmpretrain, when the head is first built."""

import torch
from mmpretrain.models.heads import LinearClsHead
from mmpretrain.structures import DataSample
from torch import Tensor, nn

from ...values import MOST, MOST_CLASSES, check_integer, check_number


def stack_token_scores(data_samples: list[DataSample], device: torch.device) -> Tensor | None:
    """The token labels of a batch, (B, h, w, classes), or None where the first sample has none."""
    if 'gt_token_score' not in data_samples[0]:
        return None
    return torch.stack([sample.gt_token_score for sample in data_samples]).to(device).float()


class LVViTHead(LinearClsHead):
    """Classifies the class token, and each patch token by an auxiliary classifier.

    At inference the logits are (class + 0.25 * max over the patches) / 1.25. In training the class token learns the
    image's label, and each patch its own, from the field ``gt_token_score`` of (h, w, classes) that
    :class:`~mmdyn.datasets.TokenLabelCrop` makes. Without that field each patch learns the image's label.

    Args:
        num_classes: classes.
        in_channels: channels of the tokens.
        aux_weight: weight of the patches' loss.
        kwargs: as for mmpretrain's LinearClsHead.
    """

    def __init__(self, num_classes: int, in_channels: int, aux_weight: float = 0.5, **kwargs):
        check_integer('LVViTHead: num_classes', num_classes, 1, MOST_CLASSES)
        check_integer('LVViTHead: in_channels', in_channels, 1, MOST)
        check_number('LVViTHead: aux_weight', aux_weight, '[0, inf)')
        super().__init__(num_classes, in_channels, **kwargs)
        self.aux_fc = nn.Linear(in_channels, num_classes)
        self.aux_weight = aux_weight

    def forward(self, feats: tuple[Tensor, ...]) -> Tensor:
        """Logits (B, classes) from all tokens (B, 1 + n, C) of the last stage."""
        tokens = self.pre_logits(feats)
        return (self.fc(tokens[:, 0]) + 0.25 * self.aux_fc(tokens[:, 1:]).amax(1)) / 1.25

    def loss(
        self, feats: tuple[Tensor, ...], data_samples: list[DataSample], token_score: Tensor | None = None, **kwargs
    ) -> dict:
        """``loss`` of the class tokens, and ``loss_aux``, the weighted mean of all patch tokens' losses.

        Args:
            feats: all tokens (B, 1 + n, C) of the last stage.
            data_samples: with ``gt_label`` or ``gt_score``.
            token_score: (B, n, classes), a soft label of each patch token, for tokens that are no map. Defaults to
                ``gt_token_score`` of the data samples, row by row.
        """
        tokens = self.pre_logits(feats)
        losses = self._get_loss(self.fc(tokens[:, 0]), data_samples, **kwargs)
        logits = self.aux_fc(tokens[:, 1:]).flatten(0, 1)
        if token_score is None:
            maps = stack_token_scores(data_samples, tokens.device)
            token_score = maps if maps is None else maps.flatten(1, 2)
        target = self._patch_targets(data_samples, token_score, tokens.shape[1] - 1)
        losses['loss_aux'] = self.aux_weight * self.loss_module(logits, target, avg_factor=len(logits), **kwargs)
        return losses

    def _patch_targets(self, data_samples: list[DataSample], token_score: Tensor | None, num: int) -> Tensor:
        """(B * n, classes) soft labels, or (B * n) labels."""
        if token_score is None:
            soft = 'gt_score' in data_samples[0]
            target = (
                torch.stack([sample.gt_score for sample in data_samples])
                if soft
                else torch.cat([sample.gt_label for sample in data_samples])
            )
            return target.repeat_interleave(num, 0)
        if token_score.shape[1:] != (num, self.num_classes):
            raise ValueError(
                f'Token labels of {token_score.shape[1]} tokens and {token_score.shape[2]} classes do not '
                f'fit {num} patch tokens and {self.num_classes} classes: give TokenLabelCrop the '
                'patch_size and scale of the backbone, and LoadTokenLabels the num_classes of the head.'
            )
        return token_score.flatten(0, 1)
