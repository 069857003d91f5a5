"""What CF-ViT's confidence threshold trades: accuracy against multiply-adds."""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from mmengine.config import Config
from torch import Tensor, nn

from ..values import check_number


class Curve(NamedTuple):
    """Accuracy and cost at each of T thresholds.

    Attributes:
        threshold: (T,) eta.
        exit_share: (T,) share of the images, in [0, 1], that stop after the coarse stage.
        top1: (T,) accuracy in per cent.
        macs: (T,) multiply-adds of an image on average.
        coarse_right, fine_right: (T,) images that are classified correctly where they stop, at the coarse and at the
            fine stage (figure 8 of the paper).
    """

    threshold: Tensor
    exit_share: Tensor
    top1: Tensor
    macs: Tensor
    coarse_right: Tensor
    fine_right: Tensor

    def point(self, index: int) -> dict:
        """The numbers at one threshold."""
        return {name: values[index].item() for name, values in self._asdict().items()}


def run_both_stages(model: nn.Module, batches: Iterable[Any]) -> dict[str, Any]:
    """Run both stages of a CoarseToFineClassifier on labelled images.

    Returns:
        the arguments of :func:`curve`, but for the thresholds.

    Raises:
        ValueError: if the images have no labels.
    """
    before, model.test_cfg = model.test_cfg, dict(threshold=1.0, every_stage=True)
    coarse, fine, labels = [], [], []
    for batch in batches:
        with torch.inference_mode():
            samples = model.test_step(batch)
        if any('gt_label' not in sample for sample in samples):
            raise ValueError('the images of the test set have no labels.')
        coarse += [sample.coarse_score.cpu() for sample in samples]
        fine += [sample.fine_score.cpu() for sample in samples]
        labels += [sample.gt_label.cpu() for sample in samples]
    model.test_cfg = before
    coarse_macs, fine_macs = model.backbone.stage_macs()
    return dict(
        coarse_scores=torch.stack(coarse),
        fine_scores=torch.stack(fine),
        labels=torch.cat(labels),
        coarse_macs=coarse_macs,
        fine_macs=fine_macs,
    )


def check_has_threshold(cfg: Config) -> None:
    """Raise ValueError if the model of a config has no stages to stop between."""
    if not has_threshold(cfg):
        raise ValueError(
            f'the model is a {cfg.model.type}: give the config of an mmdyn.CoarseToFineClassifier, which '
            'has a threshold.'
        )


def has_threshold(cfg: Config) -> bool:
    """Whether the model of a config stops by a confidence."""
    return cfg.model.type.split('.')[-1] == 'CoarseToFineClassifier'


def curve(
    coarse_scores: Tensor, fine_scores: Tensor, labels: Tensor, coarse_macs: float, fine_macs: float, thresholds: Tensor
) -> Curve:
    """What early exit would have done at each threshold, from one run of both stages.

    An image stops if its coarse confidence reaches the threshold; threshold 1 stops none.

    Args:
        coarse_scores, fine_scores: (N, classes) probabilities of N images.
        labels: (N,).
        coarse_macs, fine_macs: multiply-adds of the coarse stage, and those that the fine stage adds.
        thresholds: (T,), in [0, 1].
    """
    for name, value in (('coarse_macs', coarse_macs), ('fine_macs', fine_macs)):
        check_number(name, value, '[0, inf)')
    thresholds = torch.as_tensor(thresholds, dtype=torch.double)
    if not ((thresholds >= 0) & (thresholds <= 1)).all():
        raise ValueError(f'thresholds={thresholds.tolist()}: a confidence is in [0, 1].')
    confidence, coarse_class = coarse_scores.max(-1)
    confidence, order = confidence.sort()
    coarse_right, fine_right = (
        right[order].long() for right in (coarse_class == labels, fine_scores.argmax(-1) == labels)
    )
    num, none = len(labels), labels.new_zeros(1)
    # The images that go on are the least confident ones. As in the classifier, a threshold has the scores' precision.
    goes_on = torch.searchsorted(confidence, thresholds.to(confidence))
    goes_on[thresholds >= 1] = num
    fine_right = torch.cat([none, fine_right.cumsum(0)])[goes_on]
    coarse_right = coarse_right.sum() - torch.cat([none, coarse_right.cumsum(0)])[goes_on]
    right, goes_on = (fine_right + coarse_right).double(), goes_on.double()
    macs = coarse_macs + fine_macs * (goes_on / num)
    return Curve(thresholds, (num - goes_on) / num, 100 * right / num, macs, coarse_right, fine_right)


def operating_points(coarse_scores: Tensor) -> Tensor:
    """Thresholds, rounded to 6 decimals, between each two confidences: all that can differ in which images stop."""
    confidence = coarse_scores.amax(-1).double().unique()
    between = (confidence[1:] + confidence[:-1]) / 2
    return torch.cat([confidence.new_zeros(1), between.round(decimals=6), confidence.new_ones(1)]).unique()


def most_accurate(of: Curve, macs: float) -> int:
    """Index of the most accurate point that spends at most ``macs``, the cheapest of several.

    Raises:
        ValueError: if there is none; it says what is reachable.
    """
    check_number('macs', macs, '[0, inf)', 'multiply-adds')
    allowed = of.macs <= macs
    if not allowed.any():
        raise ValueError(
            f'No threshold brings the multiply-adds down to {macs / 1e9:.7g} G: they range from '
            f'{round_up(of.macs.min().item() / 1e9)} G, where all images stop after the coarse stage, to '
            f'{round_up(of.macs.max().item() / 1e9)} G.'
        )
    best = allowed & (of.top1 == of.top1[allowed].max())
    return of.macs.where(best, torch.inf).argmin().item()


def cheapest(of: Curve, top1: float) -> int:
    """Index of the cheapest point whose accuracy is at least ``top1``, the most accurate of several.

    Raises:
        ValueError: if there is none; it says what is reachable.
    """
    check_number('top1', top1, '[0, inf)', 'an accuracy in per cent')
    allowed = of.top1 >= top1
    if not allowed.any():
        raise ValueError(
            f'No threshold reaches {top1:g} % top-1: the accuracy ranges from '
            f'{round_down(of.top1.min().item())} to {round_down(of.top1.max().item())} %.'
        )
    best = allowed & (of.macs == of.macs[allowed].min())
    return of.top1.where(best, -torch.inf).argmax().item()


def round_up(value: float) -> float:
    """To 7 decimals: a budget that was copied from a message can be met."""
    return math.ceil(value * 1e7) / 1e7


def round_down(value: float) -> float:
    """To 3 decimals: an accuracy that was copied from a message can be reached."""
    return math.floor(value * 1e3) / 1e3
