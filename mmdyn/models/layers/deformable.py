"""Deformable attention: a query attends to a few points of the map, which it chooses itself (DPVT)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...values import MOST, check_integer
from ..dge.routing import centres
from ..replaceable import replaceable
from ..tracing import image_of_each, is_traced, refuse_onnx_by_torchscript
from .attention import check_heads
from .macs import macs_of


@replaceable
def deformable_sampling(
    value: Tensor, points: Tensor, weights: Tensor, shape: tuple[int, int], lengths: list[int] | None = None
) -> Tensor:
    """Weighted sums of values at points of a map, interpolated bilinearly; outside of the map they are 0.

    Args:
        value: (B, H*W, heads, D).
        points: (N, heads, P, 2), x and y in cells; (0, 0) is the centre of the first cell.
        weights: (N, heads, P).
        shape: (H, W).
        lengths: queries of each of the B images, which sum to N; None if all have as many.

    Returns:
        (N, heads * D).

    Raises:
        ValueError: if the values are not those of maps of ``shape``, or ``lengths`` not those of the queries.
    """
    (images, cells), num = value.shape[:2], points.shape[0]
    if cells != math.prod(shape) or (lengths is not None and (len(lengths), sum(lengths)) != (images, num)):
        raise ValueError(
            f'Values of {images} images with {cells} cells and points of {num} '
            f'queries do not fit lengths={lengths} and shape={tuple(shape)}: give the queries of each '
            'image, and the (height, width) of the map.'
        )
    if value.dtype in (torch.float16, torch.bfloat16):  # whose places on a map of some hundred cells are rough
        return deformable_sampling.plain(value.float(), points.float(), weights.float(), shape, lengths).to(value.dtype)
    # Each point is the weighted sum of its four neighbouring cells.
    (height, width), heads = shape, value.shape[2]
    if lengths is None:
        image = torch.arange(num, device=value.device) * images // max(num, 1)
    else:
        image = image_of_each(lengths, num, value.device)
    # Rows of the (B * H*W * heads) values: an image's begin at its first cell, those of a cell at its first head.
    first = (image.int() * (height * width * heads))[:, None] + torch.arange(heads, device=value.device).int()
    x, y = (place.contiguous() for place in points.unbind(-1))
    left, top = x.floor(), y.floor()
    to_right, to_bottom = x - left, y - top
    rows, shares = [], []
    for line, to_line in ((top, 1 - to_bottom), (top + 1, to_bottom)):
        share = weights * to_line * ((line >= 0) & (line < height))
        start = first[..., None] + line.int().clamp(0, height - 1) * (width * heads)
        for column, to_column in ((left, 1 - to_right), (left + 1, to_right)):
            shares.append(share * to_column * ((column >= 0) & (column < width)))
            rows.append(start + column.int().clamp(0, width - 1) * heads)
    rows, shares = (torch.cat(parts, dim=2).flatten(0, 1) for parts in (rows, shares))
    value = value.flatten(0, 2)
    if is_traced():  # the operator below is one that neither ONNX nor counters of operations know
        sums = shares[:, None] @ value[rows.long()]
    else:
        sums = F.embedding_bag(rows, value, mode='sum', per_sample_weights=shares)
    return sums.view(num, heads * value.shape[-1])


def scale_gradient(x: Tensor, scale: float) -> Tensor:
    """``x``, whose gradient is multiplied by ``scale``."""
    return x.detach() + scale * (x - x.detach()) if x.requires_grad or is_traced() else x


class DeformableAttention(nn.Module):
    """Each head of a query takes the values at a few points around the query's reference point.

    Offsets and weights of the points are linear in the query. Offsets learn at a tenth of the gradient.

    Args:
        dim: channels.
        num_heads: heads; they divide ``dim``.
        num_points: points of each head.
    """

    uses_points = True

    def __init__(self, dim: int, num_heads: int, num_points: int = 4):
        super().__init__()
        check_heads(dim, num_heads)
        check_integer('num_points', num_points, 1, MOST, 'the points of each head')
        self.dim, self.num_heads, self.num_points = dim, num_heads, num_points
        self.offsets = nn.Linear(dim, num_heads * num_points * 2)
        self.attn_weight = nn.Linear(dim, num_heads * num_points)
        self.v = nn.Linear(dim, dim)
        self.proj = nn.Linear(dim, dim)
        self.start()

    @torch.no_grad()
    def start(self) -> None:
        """In the beginning head k looks in the direction 2*pi*k / heads, at points in distances of 1, 2, ... cells."""
        for layer in (self.offsets, self.attn_weight):
            nn.init.zeros_(layer.weight), nn.init.zeros_(layer.bias)
        angle = torch.arange(self.num_heads) * (2 * math.pi / self.num_heads)
        direction = torch.stack([angle.cos(), angle.sin()], -1)[:, None]
        self.offsets.bias.copy_((direction * torch.arange(1, self.num_points + 1)[:, None]).flatten())

    def forward(
        self,
        queries: Tensor,
        tokens: Tensor,
        shape: tuple[int, int],
        num_extra: int = 0,
        lengths: list[int] | None = None,
        points: Tensor | None = None,
    ) -> Tensor:
        """Attend from the queries to points of the map.

        Args:
            queries: (B, n, C), or packed (N, C) with the ``lengths`` of the images.
            tokens: (B, H*W, C).
            shape: (H, W).
            num_extra: 0; extra tokens have no place on the map.
            lengths: queries of each image, where they are packed.
            points: (N, 2) places of the queries, x and y in cells. Default to the cells' own.

        Returns:
            as ``queries``.
        """
        if num_extra:
            raise ValueError(
                f'Deformable attention samples a map, but there are {num_extra} extra tokens, which have '
                'no place on it: use a model without class token.'
            )
        refuse_onnx_by_torchscript('deformable attention on any number of images')
        packed = queries.flatten(0, -2)
        if points is None:
            points = centres(shape, tokens.device).expand(tokens.shape[0], -1, -1).flatten(0, 1)
        value = self.v(tokens).unflatten(-1, (self.num_heads, -1))
        offsets = scale_gradient(self.offsets(packed), 0.1).unflatten(-1, (self.num_heads, self.num_points, 2))
        points = points[:, None, None] + offsets.to(torch.promote_types(offsets.dtype, torch.float32))
        weights = self.attn_weight(packed).unflatten(-1, (self.num_heads, self.num_points)).softmax(-1)
        return self.proj(deformable_sampling(value, points, weights, shape, lengths)).view_as(queries)

    def macs(self, shape: tuple[int, int], num_extra: int) -> tuple[int, int]:
        """Multiply-adds of one query, with 4 of each channel for each sampled point, and of the values of one image."""
        query = macs_of(self.offsets) + macs_of(self.attn_weight) + macs_of(self.proj)
        query += 4 * self.num_points * getattr(self.v, 'out_features', self.dim)
        return query, math.prod(shape) * macs_of(self.v)
