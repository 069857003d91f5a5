"""Functions in inference on a CPU by compiled code: the router's choice, patches, deformable sampling, maps."""

import ctypes
import math

import torch
from torch import Tensor, nn

from ..models.dge.encoder import check_granularities
from ..models.dge.router import Router, choose
from ..models.dge.routing import grid
from ..models.layers import Positions, deformable_sampling, project_patches, to_maps
from ..models.replaceable import Refused
from .library import Map, Projection, Sampling, Step, call, library
from .prepared import (
    Cache,
    Prepared,
    Refusal,
    are_counts,
    decision_of,
    equal_lengths,
    first,
    refuse_context,
    refuse_rows,
    refuse_tensor,
    refuse_tokens,
)
from .stage import as_numbers, refuse_processor

_cache = Cache()


def refuse_library() -> str | None:
    """Why there are no compiled functions; None if there are."""
    functions = library()
    if isinstance(functions, Refused):
        return functions.reason
    return None if torch._C._get_mkldnn_enabled() else 'torch.backends.mkldnn is switched off'


class PreparedRouter(Prepared):
    """A router.

    Attributes:
        addresses: of its weight and bias.
        options: K.
        channels: C.
    """

    def __init__(self, router: nn.Module):
        super().__init__()
        self.module(router, 'router', Router)
        if getattr(router.weight, 'ndim', 0) != 2:
            raise Refusal('router.weight is no matrix')
        self.options, self.channels = router.weight.shape
        self.addresses = self.weights(router, 'router', self.options, self.channels)
        if self.addresses[1] is None:
            raise Refusal('router has no bias')


@choose.register
def choose_by_means(
    router: Router, tokens: Tensor, shape: tuple[int, int], region: int, num_extra: int
) -> Tensor | Refused:
    """:func:`~mmdyn.models.dge.router.choose` without a table of means."""
    reason = refuse_context() or refuse_library() or refuse_tokens(tokens, shape, num_extra)
    if reason is None and not are_counts([region], 1):
        reason = f'region={region} is no number of cells'
    if reason is not None:
        return Refused(reason)
    try:
        prepared = _cache.get(router, None, lambda: PreparedRouter(router))
        bias, budget = decision_of(router, prepared.options, shape, num_extra)
        if budget >= 0:
            check_granularities(router.granularities, region)
    except (Refusal, ValueError) as refusal:
        return Refused(str(refusal).rstrip('.'))
    images, _, channels = tokens.shape
    if channels != prepared.channels:
        return Refused(f'the tokens have {channels} channels, not {prepared.channels}')
    choice, options = torch.empty(images, *grid(region, shape), dtype=torch.long, device='cpu'), prepared.options
    job = ctypes.byref(Map(images, num_extra, *shape, region, channels, choice.data_ptr()))
    logits = None if budget < 0 else torch.empty(*choice.shape, options, dtype=torch.float32, device='cpu')
    library().choose(
        job,
        tokens.data_ptr(),
        prepared.addresses[0],
        bias.data_ptr(),
        options,
        None if logits is None else logits.data_ptr(),
    )
    if logits is not None:
        steps = torch.empty(2 * logits.numel() * ctypes.sizeof(Step), dtype=torch.uint8, device='cpu')
        granularities = ctypes.addressof(as_numbers(router.granularities))
        library().choose_within(job, logits.data_ptr(), granularities, options, budget, steps.data_ptr())
    return choice


class PreparedPatches(Prepared):
    """A projection of patches.

    Attributes:
        side, channels, depth: of a patch, and channels of what comes out and goes in.
        weight, norm: addresses of their weights and biases.
        eps: the norm's epsilon.
    """

    def __init__(self, proj: nn.Module, norm: nn.Module, of_tokens: bool):
        super().__init__()
        self.module(proj, 'proj', nn.Conv2d)
        self.module(norm, 'norm', nn.LayerNorm, nn.Identity)
        self.channels, self.depth = (
            self.attribute(proj, 'proj', name, int) for name in ('out_channels', 'in_channels')
        )
        order = (0, 2, 3, 1) if of_tokens else (0, 1, 2, 3)
        self.side, self.weight = self.patches(proj, 'proj', self.channels, self.depth, order)
        self.eps, self.norm_weight = 0.0, (None, None)
        if type(norm) is nn.LayerNorm:
            self.eps, self.norm_weight = self.norm(norm, 'norm', self.channels)


def _refuse_positions(positions: Positions, channels: int) -> str | None:
    embedding = positions.embedding
    reason = refuse_rows(embedding, 'the position embedding')
    if reason is not None:
        return reason
    if not are_counts(positions.shape, 1) or embedding.shape != (1, math.prod(positions.shape), channels):
        return 'the position embedding has another shape than its map'
    return None if positions.mode == 'bilinear' else f'position embeddings are resized by {positions.mode!r}'


@project_patches.register
def project_panels(
    maps: Tensor, proj: nn.Module, norm: nn.Module, positions: Positions | None = None
) -> Tensor | Refused:
    """:func:`~mmdyn.models.layers.embedding.project_patches` on panels of patches that stay in cache."""
    if maps.ndim != 4:
        return Refused(f'there are {maps.ndim} dimensions, not 4')
    (images, depth, height, width), (image, channel, line, cell) = maps.shape, maps.stride()
    of_tokens = channel == 1 and cell == depth
    reason = refuse_context() or refuse_processor() or refuse_tensor(maps, 'the map')
    if reason is None and not (of_tokens or cell == 1):
        reason = 'neither the channels of a pixel nor the pixels of a line lie side by side'
    if reason is not None:
        return Refused(reason)
    try:
        prepared = _cache.get(proj, (norm, of_tokens), lambda: PreparedPatches(proj, norm, of_tokens))
    except Refusal as refusal:
        return Refused(str(refusal))
    side, channels = prepared.side, prepared.channels
    if depth != prepared.depth or min(height, width) < side:
        return Refused(f'a map of {depth} x {height} x {width} holds no patch, or has not {prepared.depth} channels')
    reason = _refuse_positions(positions, channels) if positions else None
    if reason is not None:
        return Refused(reason)
    segments, strides = ((side, side, depth), (line, cell)) if of_tokens else ((depth, side, side), (channel, line))
    rows, columns = height // side, width // side
    out = torch.empty(images, rows * columns, channels, dtype=torch.float32, device='cpu')
    call(
        'project',
        ctypes.byref(
            Projection(
                images,
                rows,
                columns,
                *segments,
                channels,
                0,
                image,
                side * line,
                side * cell,
                *strides,
                0.0,
                prepared.eps,
                None,
                None,
                *prepared.weight,
                *prepared.norm_weight,
                None,
                None,
                maps.data_ptr(),
                out.data_ptr(),
                positions.embedding.data_ptr() if positions else None,
                *(positions.shape if positions else (0, 0)),
            )
        ),
    )
    return out


@deformable_sampling.register
def sample_points(
    value: Tensor, points: Tensor, weights: Tensor, shape: tuple[int, int], lengths: list[int] | None = None
) -> Tensor | Refused:
    """:func:`~mmdyn.models.layers.deformable.deformable_sampling` point by point."""
    names = dict(value='the values', points='the points', weights='the weights')
    tensors = dict(value=value, points=points, weights=weights)
    reason = refuse_context() or refuse_library() or first(refuse_tensor(x, names[key]) for key, x in tensors.items())
    if reason is not None:
        return Refused(reason)
    if (value.ndim, points.ndim, weights.ndim, len(shape)) != (4, 4, 3, 2) or not are_counts(
        [*(lengths or ()), *shape]
    ):
        return Refused('values, points, weights, lengths and shape are not of the kinds that belong together')
    images, cells, heads, channels = value.shape
    if lengths is None:
        lengths = equal_lengths(len(points), images)
    num = sum(lengths)
    if (
        (images, cells) != (len(lengths), math.prod(shape))
        or points.shape != (num, heads, points.shape[2], 2)
        or (weights.shape != points.shape[:3])
    ):
        return Refused('values, points, weights and lengths do not fit each other')
    value, points, weights = value.contiguous(), points.contiguous(), weights.contiguous()
    counts = torch.tensor(lengths, dtype=torch.long, device='cpu')
    out = torch.empty(num, heads * channels, dtype=torch.float32, device='cpu')
    library().sample(
        ctypes.byref(Sampling(*shape, heads, points.shape[2], channels)),
        value.data_ptr(),
        points.data_ptr(),
        weights.data_ptr(),
        counts.data_ptr(),
        images,
        out.data_ptr(),
    )
    return out


@to_maps.register
def transpose_tokens(tokens: Tensor, shape: tuple[int, int]) -> Tensor | Refused:
    """:func:`~mmdyn.models.layers.embedding.to_maps` by vectors of 16 cells."""
    reason = refuse_context() or refuse_processor() or refuse_tokens(tokens, shape)
    if reason is not None:
        return Refused(reason)
    images, cells, channels = tokens.shape
    if cells % 16:
        return Refused(f'{cells} cells do not fill vectors of 16')
    maps = torch.empty(images, channels, *shape, dtype=torch.float32, device='cpu')
    if maps.data_ptr() % 64:
        return Refused('the allocator does not align tensors to 64 bytes')
    library().transpose_tokens(tokens.data_ptr(), images, cells, channels, maps.data_ptr())
    return maps
