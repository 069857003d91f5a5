"""Which coarse patches are informative, and the fine sequence of tokens (CF-ViT paper), as pure tensor functions."""

import math

import torch
from torch import Tensor


def num_informative(alpha: float, num: int) -> int:
    """ceil(alpha * num) of eq. 10, for an alpha that is a decimal number: 0.7 of 10 are 7."""
    return math.ceil(round(alpha * num, 6))


def update_score(score: Tensor, row: Tensor, decay: float) -> Tensor:
    """Global class attention, eq. 9: (B, N) running average and (B, N) class attention of the next block -> (B, N)."""
    return decay * score + (1 - decay) * row


def select(score: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The (B, count) patches of the highest scores and the (B, N - count) others, both by their place in the image."""
    this, other = score[:, :, None], score[:, None]
    place = torch.arange(score.shape[1], device=score.device)
    # Of equal scores, the first in the image counts as the higher.
    higher = (other > this) | ((other == this) & (place < place[:, None]))
    is_other = higher.sum(2) >= count
    order = (place + score.shape[1] * is_other).argsort(1)
    return order[:, :count], order[:, count:]


def split(patches: Tensor, columns: int) -> Tensor:
    """The four fine patches of each coarse one.

    Args:
        patches: (B, n) indices into a grid of ``columns`` columns.

    Returns:
        (B, 4 * n) indices into the grid of twice the rows and columns: upper left and right, lower left and right.
    """
    corner = patches // columns * (4 * columns) + patches % columns * 2
    steps = torch.tensor([0, 1, 2 * columns, 2 * columns + 1], device=patches.device)
    return (corner[..., None] + steps).flatten(1)


def take(tokens: Tensor, index: Tensor) -> Tensor:
    """Rows of each image: (B, N, C) and (B, n) -> (B, n, C)."""
    return tokens.gather(1, index[..., None].expand(-1, -1, tokens.shape[2]))


def fine_sequence(
    class_token: Tensor, fine: Tensor, coarse: Tensor, chosen: Tensor, rest: Tensor, columns: int
) -> Tensor:
    """Eq. 11: the class token, four fine tokens of each chosen patch, and the coarse token of each other patch.

    Args:
        class_token: (B, 1, C).
        fine: (B, 4 * N, C).
        coarse: (B, N, C), N coarse patches in ``columns`` columns.
        chosen, rest: (B, k) and (B, N - k) coarse patches.

    Returns:
        (B, 1 + 4 * k + N - k, C).
    """
    return torch.cat([class_token, take(fine, split(chosen, columns)), take(coarse, rest)], dim=1)
