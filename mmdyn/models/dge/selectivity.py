"""Whether a layer chooses by region: figure 4 of the DGE paper as numbers.

A region asks for the finest granularity or not. By the law of total variance the variance of that choice is the mean
variance within images plus the variance of the images' shares. A layer that tells regions apart has it within images,
one that tells easy images from difficult ones between them, and one that always chooses the same has none.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from .encoder import Decision


def index_of_finest(granularities: Sequence[int]) -> int:
    """Index of the finest granularity, of ascending ones of which the first may be 0."""
    return next(k for k, phi in enumerate(granularities) if phi)


def share_of_finest(decision: 'Decision', granularities: Sequence[int]) -> Tensor:
    """Share of each image's regions that ask for the finest granularity, in training without the noise: (B,)."""
    choice = decision.choice if decision.logits is None else decision.logits.argmax(-1)
    return (choice == index_of_finest(granularities)).float().flatten(1).mean(1)


def share_within_images(mean: float, square: float) -> float:
    """How much of the variance of a choice lies within images.

    Args:
        mean: of the images' shares of regions that ask for the finest granularity.
        square: mean of the squares of these shares.

    Returns:
        Mean variance within images over total variance, from 0, one choice for all regions of each image, to 1, images
        with equal shares. 0 where nothing varies.
    """
    total = mean * (1 - mean)
    return (mean - square) / total if total > 1e-9 else 0.0
