"""Encoder blocks, and projections of patches, in inference on a CPU with AVX-512, by encoder.c.

Layers are taken as they are: what is replaced, or looked at by hooks, goes the way of plain PyTorch.
"""
import ctypes
import math
import threading
from functools import lru_cache
from typing import Iterable, List, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn

from ..dge.grains import Grains, grid
from ..layers.linear import Linear, StartLinear
from ..layers.position import Positions
from . import is_plain_tensor, is_used, library
from .routing import Map

_kept = threading.local()


def _fields(kind: type, names: str) -> List[Tuple[str, type]]:
    return [(name, kind) for name in names.split()]


_REAL, _NUMBER, _ADDRESS = ctypes.c_float, ctypes.c_int64, ctypes.c_void_p


def _parameters(names: str) -> List[Tuple[str, type]]:
    """The addresses of layers' weights and biases."""
    return [(f'{name}_{kind}', _ADDRESS) for name in names.split() for kind in ('weight', 'bias')]


class _Block(ctypes.Structure):
    """As in encoder.c."""
    _fields_ = [
        *_fields(_NUMBER, 'dim hidden heads points side'), *_fields(_REAL, 'eps1 eps2 eps_keys scale'),
        *_parameters('norm1 query weights proj norm2 fc1 fc2 reduce norm_keys memory'), ('is_half', _NUMBER),
        ('tokens', _ADDRESS), ('map', Map), ('sides', _ADDRESS), *_parameters('router'), ('options', _NUMBER),
        *_fields(_ADDRESS, 'chosen lengths')
    ]


class _Projection(ctypes.Structure):
    """As in encoder.c."""
    _fields_ = [
        *_fields(_NUMBER, 'images height width outer inner length channels then_channels image_stride line_stride '
                 'patch_stride outer_stride inner_stride'),
        *_fields(_REAL, 'eps_before eps_after'), *_parameters('before weights after then'),
        *_fields(_ADDRESS, 'table out positions'), *_fields(_NUMBER, 'lines columns'),
        ('router', _ADDRESS), ('options', _NUMBER), ('scores', _ADDRESS)
    ]


@lru_cache(maxsize=None)
def _runs(half: bool) -> bool:
    """Whether the processor has the instructions; bfloat16 is left to oneDNN where it has matrix units."""
    if half:
        return bool(library().runs_half()) and not torch.cpu._is_amx_tile_supported()
    return bool(library().runs())


def _is_half() -> bool:
    """Whether autocast asks for bfloat16."""
    return torch.is_autocast_enabled('cpu') and torch.get_autocast_dtype('cpu') == torch.bfloat16


def takes(rows: Tensor) -> bool:
    """Whether the compiled functions take these rows, if the layers are theirs.

    Under autocast to bfloat16 the linear layers of blocks compute in it, all else in float32.
    ``torch.backends.mkldnn.enabled`` switches the functions off, as it does oneDNN.
    """
    half = _is_half()
    return (is_used(rows) and (half or not torch.is_autocast_enabled('cpu')) and _runs(half)
            and torch._C._get_mkldnn_enabled() and rows.numel() > 0)


def is_plain(layer: nn.Module, *kinds: type) -> bool:
    """Whether a layer is exactly of one of these kinds, and no hooks look at it."""
    return type(layer) in kinds and not (layer._forward_hooks or layer._forward_pre_hooks)


def _address(x: Tensor, *shape: int) -> Optional[int]:
    """Where the numbers of a weight or bias are; None unless it has just the type, shape and order that is read."""
    if (type(x) in (Tensor, nn.Parameter) and x.dtype is torch.float32 and x.is_cpu and x.layout is torch.strided
            and x.shape == shape and x.is_contiguous()):
        return x.data_ptr() or None
    return None


def _addresses_of(weight: Tensor, bias: Optional[Tensor], *shape: int) -> Optional[Tuple[int, Optional[int]]]:
    """Of a weight of this shape and of a bias for its rows; None if the functions cannot read them."""
    found = _address(weight, *shape)
    if found is None or bias is None:
        return found and (found, None)
    of_bias = _address(bias, shape[0])
    return of_bias and (found, of_bias)


def _addresses(layers: Iterable[Tuple[Optional[nn.Module], Tuple[int, ...]]]) -> Optional[List[Optional[int]]]:
    """Of the weights, of the shapes that the functions read, and biases of layers, in turn.

    Returns:
        None if there is a layer that the functions do not take.
    """
    found = []
    for layer, shape in layers:
        if layer is None or is_plain(layer, nn.Identity):
            found += None, None
            continue
        if not (isinstance(layer, nn.Conv2d) or is_plain(layer, Linear, nn.LayerNorm, StartLinear)):
            return None
        weight, bias = layer._parameters['weight'], layer._parameters['bias']  # quicker than attributes
        if type(layer) is nn.LayerNorm and (weight is None or bias is None or layer.normalized_shape != shape):
            return None
        addresses = _addresses_of(weight.permute(0, 2, 3, 1) if weight.ndim == 4 else weight, bias, *shape)
        if addresses is None:
            return None
        found += addresses
    return found


def release() -> None:
    """Give back the memory that the calling thread keeps for the functions; the next call takes it again."""
    _kept.memory = ()


def _call(name: str, *job) -> None:
    """Call a function with memory that the thread keeps."""
    functions = library()
    numbers = getattr(functions, f'{name}_memory')(*job) + 16
    if numbers > len(getattr(_kept, 'memory', ())):
        _kept.memory = torch.empty(numbers, dtype=torch.float32, device='cpu')
    address = _kept.memory.data_ptr()
    getattr(functions, name)(*job, address + -address % 64)


class Layers(NamedTuple):
    """The layers of an encoder block, in the order of encoder.c.

    Attributes:
        norm1: of the tokens.
        query: makes queries, or offsets of points.
        weights: makes the points' weights, None in softmax attention.
        proj: the last one of the attention.
        norm2: of the queries after the attention.
        fc1, fc2: the feed-forward network.
        reduce, norm_keys: a convolution of patches, no hooks of which matter, and its norm, before keys and values; or
            None.
        memory: makes keys and values, or the points' values.
    """
    norm1: nn.Module
    query: nn.Module
    weights: Optional[nn.Module]
    proj: nn.Module
    norm2: nn.Module
    fc1: nn.Module
    fc2: nn.Module
    reduce: Optional[nn.Conv2d]
    norm_keys: Optional[nn.Module]
    memory: nn.Module


class Job(NamedTuple):
    """A block that waits for its tokens.

    Attributes:
        block: as encoder.c reads it.
        queries: (B) queries of each image, when it has run.
        kept: what the block has addresses of.
    """
    block: _Block
    queries: Tensor
    kept: tuple


def prepare(layers: Layers, heads: int, num_points: int, scale: float, tokens: Tensor, shape: Tuple[int, int],
            num_extra: int, grains: Optional[Grains] = None) -> Optional[Job]:
    """All steps of an encoder block on tokens that :func:`takes` says yes to.

    Args:
        layers: of the block.
        heads: of its attention.
        num_points: of each head, 0 in softmax attention.
        scale: of both branches.
        tokens: (B, E + H*W, C), or a tensor like those that it will run on.
        shape: (H, W).
        num_extra: E.
        grains: what the queries are; without them each token is one.

    Returns:
        None if the functions do not take the layers, or the shapes do not fit.
    """
    (images, size, dim), reduce, norm_keys = tokens.shape, layers.reduce, layers.norm_keys
    hidden, side, points = getattr(layers.fc1, 'out_features', 0), reduce.kernel_size[0] if reduce else 1, heads * num_points
    if not hidden or heads < 1 or dim % heads or size != num_extra + shape[0] * shape[1]:
        return None
    norm, square = (dim, ), (dim, dim)
    addresses = _addresses(zip(layers, (
        norm, (2 * points, dim) if points else square, (points, dim), square, norm, (hidden, dim), (dim, hidden),
        (dim, side, side, dim), norm, square if points else (2 * dim, dim))))
    if addresses is None:
        return None
    choice, sides, region, router, chosen = None, None, 0, (None, None), None
    if grains:
        choice, chosen, region = grains.choice.contiguous(), grains.chosen, grains.region
        if any(x is not None and (x.shape != (images, *grid(region, shape)) or x.dtype != torch.long)
               for x in (choice, chosen)):
            return None
        sides = _sides_of(grains.granularities)
        if grains.router is not None:
            router = _addresses_of(grains.router.weight, grains.router.bias, len(grains.granularities), dim)
            if router is None:
                return None
    queries = torch.empty(images, dtype=torch.long, device='cpu')
    block = _Block(
        dim, hidden, heads, num_points, side, layers.norm1.eps, layers.norm2.eps,
        norm_keys.eps if norm_keys else 0., scale, *addresses, _is_half() and dim % 2 == hidden % 2 == 0, None,
        Map(images, num_extra, *shape, region, 0, _start(choice)), sides and ctypes.addressof(sides), *router,
        len(sides or ()), _start(chosen), queries.data_ptr())
    return Job(block, queries, (choice, chosen))


def _start(x: Optional[Tensor]) -> Optional[int]:
    return None if x is None else x.data_ptr()


def encode(jobs: Sequence[Job], tokens: Tensor) -> Tensor:
    """Run blocks one after another on tokens, which are overwritten."""
    for job in jobs:
        job.block.tokens = tokens.data_ptr()
    _call('encode_blocks', (_Block * len(jobs))(*(job.block for job in jobs)), len(jobs))
    return tokens


@lru_cache(maxsize=None)
def _sides_of(granularities: Tuple[int, ...]) -> ctypes.Array:
    return (_NUMBER * len(granularities))(*granularities)


def project(maps: Tensor, weight: Tensor, bias: Optional[Tensor], before: Optional[nn.Module] = None,
            after: Optional[nn.Module] = None, positions: Optional[Positions] = None) -> Optional[Tensor]:
    """A linear layer of each patch of a map, (B, H, W, C_in) -> (B, H//side * W//side, C_out).

    Args:
        maps: tokens, whose channels lie side by side, or images, whose pixels of a line and channel do.
        weight: (C_out, side, side, C_in), which lies in memory in the order of the maps'.
        before, after: norms of the tokens' channels and of the results.
        positions: that are added in the end.

    Returns:
        None if the functions do not take the maps or the layers.
    """
    (images, height, width, depth), (channels, side) = maps.shape, weight.shape[:2]
    image, line, cell, channel = maps.stride()
    if channel == 1 and cell == depth:
        order, segments, strides = (0, 1, 2, 3), (side, side, depth), (line, cell)
    elif cell == 1 and before is None:
        order, segments, strides = (0, 3, 1, 2), (depth, side, side), (channel, line)
    else:
        return None
    if weight.shape[1:] != (side, side, depth) or not (is_plain_tensor(maps) and maps.dtype is torch.float32 and maps.is_cpu):
        return None
    norms = _addresses(((before, (depth, )), (after, (channels, ))))
    own = _addresses_of(weight.permute(order), bias, channels, *segments)
    if norms is None or own is None:
        return None
    position = None
    if positions is not None:
        position = _address(positions.embedding, 1, math.prod(positions.shape), channels)
        if position is None or positions.mode != 'bilinear':
            return None
    height, width = height // side, width // side
    out = maps.new_empty(images, height * width, channels)
    _call('project', ctypes.byref(_Projection(
        images, height, width, *segments, channels, 0, image, side * line, side * cell, *strides,
        *(getattr(norm, 'eps', 0.) for norm in (before, after)), *norms[:2], *own, *norms[2:], None, None,
        maps.data_ptr(), out.data_ptr(), position, *(positions.shape if positions else (0, 0)))))
    return out


def transpose_tokens(tokens: Tensor) -> Optional[Tensor]:
    """(B, N, C) -> (B, C, N); None if the functions do not take the tokens."""
    images, cells, channels = tokens.shape
    if not takes(tokens) or cells % 16:
        return None
    maps = tokens.new_empty(images, channels, cells)
    if maps.data_ptr() % 64:
        return None
    library().transpose_tokens(tokens.data_ptr(), images, cells, channels, maps.data_ptr())
    return maps
