"""MixToken of LV-ViT. This module imports mmpretrain, when the preprocessor is first built."""

import math

import numpy as np
import torch
from mmpretrain.models.utils import ClsDataPreprocessor
from torch import Tensor

from ...values import MOST, check_integer, check_number

Box = tuple[int, int, int, int]


def random_box(rows: int, columns: int, alpha: float) -> Box:
    """CutMix's box, y1, y2, x1, x2 in patches: its share of the map is 1 - lambda, before the map's borders clip it."""
    side = math.sqrt(1 - np.random.beta(alpha, alpha))
    box = []
    for size in (rows, columns):
        cut, centre = int(size * side), np.random.randint(size)
        first = centre - cut // 2
        box += [max(first, 0), min(first + cut, size)]
    return tuple(box)


def exchange_(maps: Tensor, box: Box, scale: int) -> None:
    """Give each of the (B, h, w, C) maps the box of its partner in the flipped batch; ``scale`` cells are a patch."""
    top, bottom, left, right = (scale * side for side in box)
    maps[:, top:bottom, left:right] = maps[:, top:bottom, left:right].flip(0)


class MixTokenPreprocessor(ClsDataPreprocessor):
    """Exchanges a box of patches between the images of a batch in training; token labels and image labels move along.

    LV-ViT exchanges embedded tokens. Here the images are, along the borders of patches: the same for a projection of
    patches. LV-ViT's stem of convolutions sees a few pixels across the box's border, and so does the coarse stage of
    CF-ViT, which halves the image.

    Args:
        patch_size: pixels of a patch's side: that of the backbone, and twice as many for CF-ViT, whose coarse patches
            must stay whole.
        prob: probability to mix a batch.
        alpha: of the beta distribution of lambda.
        kwargs: as for mmpretrain's ClsDataPreprocessor. It needs ``num_classes``.
    """

    def __init__(self, patch_size: int = 16, prob: float = 1.0, alpha: float = 1.0, **kwargs):
        check_integer('patch_size', patch_size, 1, MOST, 'the side of a patch in pixels')
        check_number('prob', prob, '[0, 1]', 'the probability to mix a batch')
        check_number('alpha', alpha, '(0, inf)', 'of the beta distribution')
        super().__init__(**{**kwargs, 'to_onehot': True})
        self.patch_size, self.prob, self.alpha = patch_size, prob, alpha

    def forward(self, data: dict, training: bool = False) -> dict:
        """Preprocess a batch; in training, also mix it."""
        batch = super().forward(data, training)
        samples = batch['data_samples']
        if not training or not samples:
            return batch
        has_maps = 'gt_token_score' in samples[0]
        if has_maps and self.batch_augments is not None:
            raise ValueError(
                'train_cfg has batch augmentations, which do not move token labels: leave them out, or '
                'train without LoadTokenLabels.'
            )
        if np.random.rand() < self.prob:
            self._mix(batch['inputs'], samples, has_maps)
        return batch

    def _mix(self, images: Tensor, samples: list, has_maps: bool) -> None:
        rows, columns = (side // self.patch_size for side in images.shape[-2:])
        if not rows or not columns:
            raise ValueError(
                f'Images of {images.shape[-2]} x {images.shape[-1]} hold no patch of patch_size='
                f'{self.patch_size}: choose a smaller one.'
            )
        box = random_box(rows, columns, self.alpha)
        exchange_(images.movedim(1, -1), box, self.patch_size)
        share = (box[1] - box[0]) * (box[3] - box[2]) / (rows * columns)
        scores = torch.stack([sample.gt_score for sample in samples])
        for sample, score in zip(samples, (1 - share) * scores + share * scores.flip(0)):
            sample.set_gt_score(score)
        if not has_maps:
            return
        maps = torch.stack([sample.gt_token_score for sample in samples]).to(images.device)
        scale = maps.shape[1] // rows
        if maps.shape[1:3] != (scale * rows, scale * columns):
            raise ValueError(
                f'Token labels of {maps.shape[1]} x {maps.shape[2]} cells do not divide into the {rows} x '
                f'{columns} patches of patch_size={self.patch_size}: choose a multiple of the patch_size '
                'of TokenLabelCrop.'
            )
        exchange_(maps, box, scale)
        for sample, score in zip(samples, maps):
            sample.set_field(score, 'gt_token_score')
