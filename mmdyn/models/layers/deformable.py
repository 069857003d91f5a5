"""Deformable attention: a query attends to a few points of the map, which it chooses itself (DPVT)."""
import math
from typing import Dict, List, Optional, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from .. import native
from ..native import encoder as compiled
from ..native.sampling import sample
from .base import AttentionBase
from .linear import Linear, StartLinear, by_pieces_of_rows


def sample_by_embedding_bag(value: Tensor, points: Tensor, weights: Tensor, shape: Tuple[int, int],
                            lengths: List[int]) -> Tensor:
    """:func:`deformable_sampling` as sums of weighted rows: each point is the mean of its four neighbouring cells."""
    (height, width), heads = shape, value.shape[2]
    image = torch.arange(len(lengths), device=value.device, dtype=torch.int32).repeat_interleave(
        torch.tensor(lengths, device=value.device, dtype=torch.long), output_size=len(points))
    # Rows of the (B * H*W * heads) values: an image's begin at its first cell, those of a cell at its first head.
    first = (image * (height * width * heads))[:, None] + torch.arange(heads, device=value.device, dtype=torch.int32)
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
    sums = F.embedding_bag(rows, value.flatten(0, 2), mode='sum', per_sample_weights=shares)
    return sums.view(len(points), heads * value.shape[-1])


def sample_by_mmcv(value: Tensor, points: Tensor, weights: Tensor, shape: Tuple[int, int],
                   lengths: List[int]) -> Tensor:
    """:func:`deformable_sampling` with mmcv's operator for accelerators.

    Raises:
        ImportError: if mmcv lacks the operator for the device of ``value``; it says how to install it.
    """
    try:
        from mmcv.ops.multi_scale_deform_attn import MultiScaleDeformableAttnFunction
    except ImportError as error:
        raise ImportError(_needs_operators(value.device)) from error
    # The operator takes as many queries of each image: shorter images are filled up with points of weight 0.
    images, most = len(lengths), max([1, *lengths])
    ragged = set(lengths) != {most}
    if ragged:
        starts = range(0, images * most, most)
        slots = torch.cat([torch.arange(start, start + n) for start, n in zip(starts, lengths)]).to(value.device)
        points, weights = (
            x.new_zeros(images * most, *x.shape[1:]).index_copy(0, slots, x) for x in (points, weights))
    sides = torch.tensor([shape], device=value.device)
    where = ((points + 0.5) / sides.flip(1)).unflatten(0, (images, most))[:, :, :, None]
    try:
        sums = MultiScaleDeformableAttnFunction.apply(value.contiguous(), sides, sides.new_zeros(1), where.contiguous(),
                                                      weights.unflatten(0, (images, most))[:, :, :, None].contiguous(),
                                                      images)
    except RuntimeError as error:
        if 'implementation for device' not in str(error):
            raise
        raise ImportError(_needs_operators(value.device)) from error
    sums = sums.flatten(0, 1)
    return sums[slots] if ragged else sums


def _needs_operators(device: torch.device) -> str:
    return (f"Deformable attention on {device} needs mmcv's operators, but the installed mmcv has none for this "
            'device: use the CPU, or compile them with the CUDA toolkit of your torch in place: MMCV_WITH_OPS=1 '
            'FORCE_CUDA=1 pip install --force-reinstall --no-deps --no-cache-dir --no-build-isolation mmcv==2.1.0')


SAMPLERS = {'embedding_bag': sample_by_embedding_bag, 'mmcv': sample_by_mmcv}


def deformable_sampling(value: Tensor, points: Tensor, weights: Tensor, shape: Tuple[int, int], lengths: List[int],
                        sampler: Optional[str] = None) -> Tensor:
    """Weighted sums of values at points of a map, interpolated bilinearly; outside of the map they are 0.

    Args:
        value: (B, H*W, heads, D).
        points: (N, heads, P, 2), x and y in cells; (0, 0) is the centre of the first cell.
        weights: (N, heads, P).
        shape: (H, W).
        lengths: queries of each of the B images; they sum to N.
        sampler: a key of ``SAMPLERS``. Defaults to mmcv's operator on accelerators, which it is written for, and to a
            compiled function in inference on a CPU.

    Returns:
        (N, heads * D).

    Raises:
        ValueError: if the values are not those of maps of ``shape``, or ``lengths`` not those of the queries.
    """
    if value.shape[:2] != (len(lengths), math.prod(shape)) or sum(lengths) != len(points):
        raise ValueError(f'Values of {value.shape[0]} images with {value.shape[1]} cells and points of {len(points)} '
                         f'queries do not fit lengths={lengths} and shape={tuple(shape)}: give the queries of each '
                         'image, and the (height, width) of the map.')
    # A position on a map of some hundred cells does not fit into half precision.
    with torch.autocast(value.device.type, enabled=False):
        full = torch.promote_types(value.dtype, torch.float32)
        inputs = value.to(full), points.to(full), weights.to(full), shape, lengths
        if sampler is None and native.is_used(inputs[0]) and all(map(native.is_plain_tensor, inputs[1:3])):
            return sample(*inputs).to(value.dtype)
        sampler = sampler or ('embedding_bag' if value.device.type == 'cpu' else 'mmcv')
        return SAMPLERS[sampler](*inputs).to(value.dtype)


def scale_gradient(x: Tensor, scale: float) -> Tensor:
    """``x``, whose gradient is multiplied by ``scale``."""
    return x.detach() + scale * (x - x.detach()) if x.requires_grad else x


class DeformableAttention(AttentionBase):
    """Each head of a query takes the values at a few points around the query's reference point.

    Offsets and weights of the points are linear in the query. In the beginning head k looks in the direction
    2 * pi * k / heads, with point i at a distance of i + 1 cells and all weights alike. Offsets learn at a tenth of the
    gradient.

    Args:
        dim: channels.
        num_heads: heads; they divide ``dim``.
        num_points: points of each head.
        sampler: forces a path of :func:`deformable_sampling`.
    """
    uses_points = True

    def __init__(self, dim: int, num_heads: int, num_points: int = 4, sampler: Optional[str] = None):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f'{dim} channels do not divide into {num_heads} heads: choose num_heads that divide '
                             f'{dim}.')
        self.num_heads, self.num_points, self.sampler = num_heads, num_points, sampler
        angle = torch.arange(num_heads) * (2 * math.pi / num_heads)
        direction = torch.stack([angle.cos(), angle.sin()], -1)[:, None]
        self.offsets = StartLinear(dim, (direction * torch.arange(1, num_points + 1)[:, None]).flatten())
        self.attn_weight = StartLinear(dim, torch.zeros(num_heads * num_points))
        self.v = Linear(dim, dim)
        self.proj = Linear(dim, dim)

    def keys_values(self, tokens: Tensor, shape: Tuple[int, int], num_extra: int = 0,
                    norm: Optional[nn.Module] = None) -> Tuple[Tensor]:
        """(B, H*W, heads, D) values. There are no extra tokens: they have no place on the map."""
        if num_extra:
            raise ValueError(f'Deformable attention samples a map, but there are {num_extra} extra tokens, which have '
                             'no place on it: use a model without class token.')
        values = by_pieces_of_rows(lambda rows: self.v(rows if norm is None else norm(rows)), tokens, tokens.shape[2])
        return (values.unflatten(-1, (self.num_heads, -1)), )

    def compiled_layers(self, shape: Tuple[int, int], num_extra: int) -> Optional[Dict[str, nn.Module]]:
        if num_extra or self.sampler is not None or not compiled.is_plain(self, DeformableAttention):
            return None
        own = self._modules
        return dict(query=own['offsets'], weights=own['attn_weight'], proj=own['proj'], reduce=None, norm_keys=None,
                    memory=own['v'])

    def attend(self, queries: Tensor, memory: Tuple[Tensor], shape: Tuple[int, int], lengths: List[int],
               points: Optional[Tensor] = None) -> Tensor:
        """From packed queries (N, C) with reference points (N, 2) to the values around them."""
        heads = (self.num_heads, self.num_points)
        offsets = scale_gradient(self.offsets(queries), 0.1).unflatten(-1, (*heads, 2))
        points = points[:, None, None] + offsets.to(torch.promote_types(offsets.dtype, torch.float32))
        weights = self.attn_weight(queries).unflatten(-1, heads).softmax(-1)
        return self.proj(deformable_sampling(*memory, points, weights, shape, lengths, self.sampler))

    def macs(self, shape: Tuple[int, int], num_extra: int) -> Tuple[int, int]:
        """Multiply-adds of one query, with 4 of each channel for each sampled point, and of the values of one image."""
        dim = self.v.in_features
        query = self.offsets.weight.numel() + self.attn_weight.weight.numel() + self.proj.weight.numel()
        return query + 4 * self.num_points * dim, math.prod(shape) * self.v.weight.numel()
