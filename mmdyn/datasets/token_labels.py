"""Token labels (LV-ViT): maps of what is seen where in an image, cropped and flipped together with it."""

import math
from collections.abc import Sequence
from pathlib import Path

import mmcv
import mmcv.transforms
import torch
from torch import Tensor

from ..registry import TRANSFORMS
from ..values import MOST, MOST_CLASSES, check_choice, check_integer, check_number, check_type, sides


@TRANSFORMS.register_module()
class LoadTokenLabels(mmcv.transforms.BaseTransform):
    """Load the token labels of an image as scores of all classes.

    The file of ``.../<class folder>/<name>.jpg`` is ``<root>/<class folder>/<name>.pt``, a tensor (2, k, H, W): scores,
    before a softmax, and indices of the top k classes of each cell of an H x W grid over the whole image. The scores of
    all other classes are 0.

    Args:
        root: folder of the maps.
        num_classes: classes.

    Raises:
        ValueError: if the map is missing, damaged, of another shape, or names a class that is not there.
    """

    def __init__(self, root: str, num_classes: int = 1000):
        check_type('LoadTokenLabels: root', root, (str, Path), 'the folder of the maps')
        check_integer('LoadTokenLabels: num_classes', num_classes, 1, MOST_CLASSES)
        self.root, self.num_classes = root, num_classes

    def transform(self, results: dict) -> dict:
        """Read the map of ``results['img_path']`` into ``results['token_label_map']``, (H, W, classes)."""
        image = Path(results['img_path'])
        path = Path(self.root) / image.parent.name / f'{image.stem}.pt'
        try:
            labels = torch.load(path, map_location='cpu', weights_only=True)
        except Exception as error:
            raise ValueError(
                f'Cannot load the token labels {path} of the image {image}: the file is missing or '
                f'damaged ({str(error).strip()}). Restore it, or take LoadTokenLabels out of the pipeline '
                'to train without token labels.'
            ) from error
        shape = tuple(getattr(labels, 'shape', ()))
        if len(shape) != 4 or shape[0] != 2 or 0 in shape:
            raise ValueError(
                f'The token labels {path} have the shape {shape}, but need (2, k, H, W): scores and '
                'indices of the top k classes of each cell.'
            )
        scores, classes = labels.permute(0, 2, 3, 1).float()
        classes = classes.long()
        if classes.min() < 0 or classes.max() >= self.num_classes:
            raise ValueError(
                f'The token labels {path} name the classes {classes.min()} to {classes.max()}, but '
                f'num_classes={self.num_classes} allows 0 to {self.num_classes - 1}.'
            )
        results['token_label_map'] = torch.zeros(*classes.shape[:2], self.num_classes).scatter_(2, classes, scores)
        return results


def resampling(start: float, length: float, cells: int, count: int) -> Tensor:
    """RoIAlign along one side as a (count, cells) matrix.

    Each row is the mean of a bilinear interpolation over one of ``count`` parts of the interval.

    Args:
        start, length: of the interval, in shares of the whole side.
        cells: cells of the side.
        count: parts of the interval.
    """
    samples = math.ceil(length * cells / count)
    steps = (torch.arange(count * samples) + 0.5) / (count * samples)
    places = ((start + length * steps) * cells - 0.5).clamp(0, cells - 1)
    tents = (1 - (places[:, None] - torch.arange(cells)).abs()).clamp(min=0)
    return tents.unflatten(0, (count, samples)).mean(1)


@TRANSFORMS.register_module()
class TokenLabelCrop(mmcv.transforms.BaseTransform):
    """mmpretrain's RandomResizedCrop, which crops the token labels too.

    It leaves ``gt_token_score``, (h, w, classes), the label of each patch after a softmax. Let it survive:
    ``dict(type='PackInputs', algorithm_keys=['gt_token_score'])``. Without a map it only crops the image.

    Args:
        scale: side of the crop, or (height, width), as for RandomResizedCrop.
        patch_size: pixels of the side of a patch, which divides ``scale``.
        kwargs: the other options of RandomResizedCrop.
    """

    def __init__(self, scale, patch_size: int = 16, **kwargs):
        check_integer('TokenLabelCrop: patch_size', patch_size, 1, MOST, 'the side of a patch in pixels')
        sides('TokenLabelCrop: scale', scale)
        self.crop = TRANSFORMS.build(dict(type='mmpretrain.RandomResizedCrop', scale=scale, **kwargs))
        if any(side % patch_size for side in self.crop.scale):
            raise ValueError(
                f'scale={scale} does not divide into patches of patch_size={patch_size}: choose a multiple.'
            )
        self.grid = tuple(side // patch_size for side in self.crop.scale)

    def transform(self, results: dict) -> dict:
        """Crop ``results['img']``, and ``results['token_label_map']`` to ``results['gt_token_score']``."""
        image = results['img']
        height, width = image.shape[:2]
        top, left, crop_height, crop_width = self.crop.rand_crop_params(image)
        image = image[top : top + crop_height, left : left + crop_width]
        results['img'] = mmcv.imresize(
            image, tuple(self.crop.scale[::-1]), interpolation=self.crop.interpolation, backend=self.crop.backend
        )
        results['img_shape'] = results['img'].shape
        labels = results.pop('token_label_map', None)
        if labels is not None:
            down = resampling(top / height, crop_height / height, labels.shape[0], self.grid[0])
            across = resampling(left / width, crop_width / width, labels.shape[1], self.grid[1])
            scores = torch.einsum('yh,hwc,xw->yxc', down, labels, across)
            # Half precision, as the files have: a batch of maps for 1000 classes is larger than its images.
            results['gt_token_score'] = scores.softmax(-1).half()
        return results

    def __repr__(self) -> str:
        return f'{type(self).__name__}(grid={self.grid}, crop={self.crop})'


AXES = {'vertical': [0], 'horizontal': [1], 'diagonal': [0, 1]}


@TRANSFORMS.register_module()
class TokenLabelFlip(mmcv.transforms.RandomFlip):
    """mmcv's RandomFlip, which flips the token labels too, before and after :class:`TokenLabelCrop`.

    Args:
        prob: probability to flip, or one for each direction.
        direction: ``'horizontal'``, ``'vertical'`` or ``'diagonal'``, or several.
        kwargs: the other options of RandomFlip.

    Raises:
        ValueError: for a probability outside of [0, 1], or an unknown direction.
    """

    def __init__(self, prob: float | Sequence[float], direction: str | Sequence[str] = 'horizontal', **kwargs):
        several = isinstance(prob, (tuple, list)), isinstance(direction, (tuple, list))
        probs, directions = (list(x) if many else [x] for x, many in zip((prob, direction), several))
        for value in probs:
            check_number('TokenLabelFlip: prob', value, '[0, 1]', 'the probability to flip')
        for value in directions:
            check_choice('TokenLabelFlip: direction', value, AXES)
        if not directions or (several[0] and (len(probs) != len(directions) or sum(probs) > 1)):
            raise ValueError(
                f'TokenLabelFlip: prob={prob} and direction={direction}: give as many probabilities as directions, '
                'with a sum of at most 1.'
            )
        probs = [float(value) for value in probs]
        super().__init__(probs if several[0] else probs[0], directions if any(several) else direction, **kwargs)

    def _flip(self, results: dict) -> None:
        super()._flip(results)
        axes = AXES[results['flip_direction']]
        for key in ('token_label_map', 'gt_token_score'):
            if key in results:
                results[key] = results[key].flip(axes)
