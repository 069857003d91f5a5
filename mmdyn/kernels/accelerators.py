"""Fused operators of accelerators that torch or mmcv has: attention of variable length, and deformable sampling."""

import torch
from torch import Tensor

from ..models.layers import deformable_sampling, packed_attention
from ..models.replaceable import Refused
from .prepared import equal_lengths, refuse_watchers

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # torch before 2.10
    varlen_attn = None


@packed_attention.register
def attention_of_variable_length(query: Tensor, key: Tensor, value: Tensor, lengths: list[int]) -> Tensor | Refused:
    """:func:`~mmdyn.models.layers.attention.packed_attention` by one fused kernel, in half precision on a GPU."""
    if not query.is_cuda or query.dtype not in (torch.float16, torch.bfloat16):
        return Refused(f'the queries are {query.dtype} on {query.device}, not of half precision on a GPU')
    if varlen_attn is None:
        return Refused('torch has no attention of variable length before 2.10')
    if len(set(lengths)) <= 1:
        return Refused('all images have as many queries')
    reason = refuse_watchers()
    if reason is not None:
        return Refused(reason)
    return varlen_attention(query, key, value, lengths)


def varlen_attention(query: Tensor, key: Tensor, value: Tensor, lengths: list[int]) -> Tensor:
    """Queries (N, heads, D) and keys and values (B, heads, M, D) as torch's operator takes them."""
    images, _, keys, _ = key.shape
    ends = (
        torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(query.device, non_blocking=True)
    )
    starts = torch.arange(0, images * keys + 1, keys, dtype=torch.int32, device=query.device)
    key, value = (x.transpose(1, 2).flatten(0, 1) for x in (key, value))
    return varlen_attn(query, key, value, ends, starts, max(lengths), keys)


@deformable_sampling.register
def sample_by_mmcv(
    value: Tensor, points: Tensor, weights: Tensor, shape: tuple[int, int], lengths: list[int] | None = None
) -> Tensor | Refused:
    """:func:`~mmdyn.models.layers.deformable.deformable_sampling` with mmcv's operator for accelerators."""
    if value.device.type == 'cpu':
        return Refused("the values are on the CPU, for which mmcv's operator is not written")
    if len(points) == 0:
        return Refused('there are no queries')
    reason = refuse_watchers()
    if reason is not None:
        return Refused(reason)
    return mmcv_sampling(
        value, points, weights, shape, equal_lengths(len(points), len(value)) if lengths is None else lengths
    )


def mmcv_sampling(
    value: Tensor, points: Tensor, weights: Tensor, shape: tuple[int, int], lengths: list[int]
) -> Tensor | Refused:
    """Values, points and weights as mmcv's operator takes them, or why there is no operator for them."""
    try:
        from mmcv.ops.multi_scale_deform_attn import MultiScaleDeformableAttnFunction
    except ImportError as error:
        return Refused(f'{_NEEDS_OPERATORS} ({error})')
    full = torch.promote_types(value.dtype, torch.float32)  # a place on a large map does not fit into half precision
    kind, (value, points, weights) = value.dtype, (x.to(full) for x in (value, points, weights))
    # The operator takes as many queries of each image: shorter images are filled up with points of weight 0.
    images, most = len(lengths), max(lengths)
    ragged = set(lengths) != {most}
    if ragged:
        starts = range(0, images * most, most)
        slots = torch.cat([torch.arange(start, start + n) for start, n in zip(starts, lengths)]).to(value.device)
        points, weights = (x.new_zeros(images * most, *x.shape[1:]).index_copy(0, slots, x) for x in (points, weights))
    sides = torch.stack([torch.full((), side, device=value.device) for side in shape])[None]
    where = ((points + 0.5) / sides.flip(1)).unflatten(0, (images, most))[:, :, :, None]
    try:
        sums = MultiScaleDeformableAttnFunction.apply(
            value.contiguous(),
            sides,
            sides.new_zeros(1),
            where.contiguous(),
            weights.unflatten(0, (images, most))[:, :, :, None].contiguous(),
            images,
        )
    except RuntimeError as error:
        if 'implementation for device' not in str(error):
            raise
        return Refused(f'{_NEEDS_OPERATORS} for {value.device}')
    sums = sums.flatten(0, 1)
    return (sums[slots] if ragged else sums).to(kind)


_NEEDS_OPERATORS = (
    'the installed mmcv has no operators: compile them with the CUDA toolkit of your torch in place: '
    'MMCV_WITH_OPS=1 FORCE_CUDA=1 pip install --force-reinstall --no-deps --no-cache-dir '
    '--no-build-isolation mmcv==2.1.0'
)
