"""Position embeddings, and how they fit maps of other shapes."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def position_embedding(num_extra: int, shape: tuple[int, int], dim: int) -> nn.Parameter:
    """(1, E + h*w, C), truncated normal with std 0.02."""
    return nn.Parameter(nn.init.trunc_normal_(torch.empty(1, num_extra + math.prod(shape), dim), std=0.02))


def resize_position_embedding(
    embedding: Tensor, source: tuple[int, int], target: tuple[int, int], num_extra: int = 0, mode: str = 'bilinear'
) -> Tensor:
    """Interpolate the map of (1, E + h*w, C) position embeddings to another shape; the extra rows stay."""
    if source == target:
        return embedding
    maps = embedding[:, num_extra:].unflatten(1, source).permute(0, 3, 1, 2)
    maps = F.interpolate(maps, target, mode=mode).permute(0, 2, 3, 1).flatten(1, 2)
    return torch.cat([embedding[:, :num_extra], maps], dim=1) if num_extra else maps


class Positions(NamedTuple):
    """A map of position embeddings for images of any size.

    Attributes:
        embedding: (1, h*w, C).
        shape: (h, w).
        mode: how it is resized, as in ``F.interpolate``.
    """

    embedding: Tensor
    shape: tuple[int, int]
    mode: str

    def resized(self, shape: tuple[int, int]) -> Tensor:
        """(1, H*W, C) for a map of ``shape`` (H, W)."""
        return resize_position_embedding(self.embedding, self.shape, shape, 0, self.mode)


def square_side(rows: int) -> int | None:
    """Side of the square map that has so many rows with 0 to 2 extra tokens, or None if there is none."""
    return next((math.isqrt(rows - e) for e in range(3) if rows > e and math.isqrt(rows - e) ** 2 == rows - e), None)


def fit_position_embedding(
    saved: Tensor,
    current: Tensor,
    shape: tuple[int, int],
    num_extra: int,
    mode: str = 'bilinear',
    source: tuple[int, int] | None = None,
) -> Tensor:
    """Make a checkpoint's position embedding fit a model: resize its map, drop or add the rows of extra tokens.

    Args:
        saved: (1, n, C) of the checkpoint. If n is not that of the model and ``source`` not known, it must be a square
            map with 0 to 2 extra tokens in front.
        current: (1, E + h*w, C) of the model; it lends the rows of extra tokens that the checkpoint has not.
        shape: (h, w) of the model's map.
        num_extra: E.
        source: (h, w) of the checkpoint's map.

    Raises:
        ValueError: if the checkpoint's rows are no square map.
    """
    if saved.shape == current.shape and source in (None, shape):
        return saved
    rows = saved.shape[1]
    if source is not None:
        saved_extra = rows - math.prod(source)
    elif rows == math.prod(shape):
        saved_extra, source = 0, shape
    else:
        side = square_side(rows)
        if side is None:
            raise ValueError(
                f'A position embedding of {rows} rows is no square map with 0, 1 or 2 extra tokens: '
                f'give img_size so that the model has as many rows (it has {current.shape[1]}).'
            )
        saved_extra, source = rows - side**2, (side, side)
    resized = resize_position_embedding(saved[:, saved_extra:], source, shape, 0, mode)
    both = min(saved_extra, num_extra)
    return torch.cat([saved[:, :both], current.detach()[:, both:num_extra].to(saved), resized], dim=1)
