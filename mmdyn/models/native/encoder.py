"""Encoder blocks, and projections of patches, in inference on a CPU with AVX-512, by encoder.c.

Layers are taken as they are: what is replaced, or looked at by hooks, goes the way of plain PyTorch.
"""
import ctypes
import threading
from functools import lru_cache
from itertools import accumulate
from typing import List, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn

from ..layers.linear import Linear, StartLinear
from . import is_used, library
from .routing import Patches

_kept = threading.local()


def _fields(kind: type, names: str) -> List[Tuple[str, type]]:
    return [(name, kind) for name in names.split()]


_REAL, _NUMBER, _ADDRESS = ctypes.c_float, ctypes.c_int64, ctypes.c_void_p


class _Parameters(ctypes.Structure):
    """As in encoder.c."""
    _fields_ = _fields(_ADDRESS, 'weight bias')


class _Memory(ctypes.Structure):
    """As in encoder.c."""
    _fields_ = _fields(_ADDRESS, 'key value') + _fields(
        _NUMBER, 'keys key_image key_head key_row value_image value_head value_row height width points')


class _Block(ctypes.Structure):
    """As in encoder.c."""
    _fields_ = [
        *_fields(_NUMBER, 'dim hidden heads is_half'), *_fields(_REAL, 'eps1 eps2 scale'),
        *_fields(_Parameters, 'norm1 query weights proj norm2 fc1 fc2'), ('memory', _Memory),
        *_fields(_ADDRESS, 'queries places out'), ('adds', _NUMBER), ('ends', _ADDRESS), ('images', _NUMBER),
        ('patches', _ADDRESS), *_fields(_NUMBER, 'extra width tokens')
    ]


class _Projection(ctypes.Structure):
    """As in encoder.c."""
    _fields_ = [
        *_fields(_NUMBER, 'images height width outer inner length channels then_channels image_stride line_stride '
                 'patch_stride outer_stride inner_stride'),
        *_fields(_REAL, 'eps_before eps_after'), *_fields(_Parameters, 'before weights after then'),
        *_fields(_ADDRESS, 'table out'), ('adds', _NUMBER)
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


def _is_read(x: Tensor) -> bool:
    return x.dtype is torch.float32 and x.is_cpu


def _weights(weight: Tensor, bias: Optional[Tensor]) -> Optional[_Parameters]:
    """The addresses of weights, None if the functions cannot read them."""
    if not (_is_read(weight) and weight.is_contiguous()):
        return None
    if bias is None:
        return _Parameters(weight.data_ptr())
    return _Parameters(weight.data_ptr(), bias.data_ptr()) if _is_read(bias) and bias.is_contiguous() else None


def _parameters(layer: Optional[nn.Module]) -> Optional[_Parameters]:
    """The weights of a layer, none of no layer; None if the functions do not take it."""
    if layer is None or is_plain(layer, nn.Identity):
        return _Parameters()
    if not is_plain(layer, Linear, nn.LayerNorm, StartLinear):
        return None
    weight, bias = layer._parameters['weight'], layer._parameters['bias']  # quicker than attributes
    if weight is None or (bias is None and type(layer) is nn.LayerNorm):
        return None
    return _weights(weight, bias)


def release() -> None:
    """Give back the memory that the calling thread keeps for the functions; the next call takes it again."""
    _kept.memory = ()


def _call(name: str, job: ctypes.Structure) -> None:
    """Call a function with memory that the thread keeps."""
    functions, job = library(), ctypes.byref(job)
    numbers = getattr(functions, f'{name}_memory')(job) + 16
    if numbers > len(getattr(_kept, 'memory', ())):
        _kept.memory = torch.empty(numbers, dtype=torch.float32, device='cpu')
    address = _kept.memory.data_ptr()
    getattr(functions, name)(job, address + -address % 64)


class CompiledBlock(NamedTuple):
    """What the functions know of an encoder block.

    Attributes:
        parameters: of a norm, queries or offsets, weights of points, projection, another norm, both layers of the FFN.
        hidden: channels of the FFN.
        heads: of the attention.
        num_points: of each head, 0 in softmax attention.
        eps: of both norms.
        scale: of both branches.
    """
    parameters: List[_Parameters]
    hidden: int
    heads: int
    num_points: int
    eps: Tuple[float, float]
    scale: float

    def change(self, queries: Tensor, memory: Sequence[Tensor], shape: Tuple[int, int], lengths: List[int],
               points: Optional[Tensor] = None, into: Optional[Tensor] = None) -> Tensor:
        """As :meth:`~mmdyn.models.layers.EncoderBlock.update`."""
        out = torch.empty_like(queries) if into is None else into
        points = points.contiguous() if self.num_points else None
        self._encode(queries, memory, shape, lengths, out, None if points is None else points.data_ptr(),
                     adds=into is not None)
        return out

    def update_patches(self, tokens: Tensor, memory: Sequence[Tensor], patches: Patches, inplace: bool) -> Tensor:
        """The tokens (B, E + H*W, C) plus the changes of the patches' means; they are overwritten if ``inplace``."""
        out = tokens if inplace else tokens.clone()
        self._encode(tokens, memory, patches.shape, patches.lengths, out, None, True, patches.table.data_ptr(),
                     patches.num_extra, patches.shape[1], tokens.shape[1])
        return out

    def _encode(self, queries: Tensor, memory: Sequence[Tensor], shape: Tuple[int, int], lengths: List[int], out: Tensor,
                places: Optional[int], adds: bool, *patches: int) -> None:
        *keys, value = (x if _is_read(x) and x.stride(-1) == 1 else x.float().contiguous() for x in memory)
        if self.num_points:
            state = _Memory(None, value.data_ptr(), 0, 0, 0, 0, value.stride(0), 0, 0, *shape, self.num_points)
        else:
            key, = keys
            state = _Memory(key.data_ptr(), value.data_ptr(), value.shape[2], *key.stride()[:3], *value.stride()[:3])
        ends = (_NUMBER * len(lengths))(*accumulate(lengths))
        dim = queries.shape[-1]
        is_half = _is_half() and dim % 2 == self.hidden % 2 == 0  # pairs of channels
        _call('encode', _Block(
            dim, self.hidden, self.heads, is_half, *self.eps, self.scale, *self.parameters, state,
            queries.data_ptr(), places, out.data_ptr(), adds, ctypes.addressof(ends), len(lengths), *patches))


def compiled_block(layers: Sequence[Optional[nn.Module]], heads: int, num_points: int,
                   scale: float) -> Optional[CompiledBlock]:
    """A block of these layers, in the order of :class:`CompiledBlock`; None if one is not what the functions take."""
    parameters = [_parameters(layer) for layer in layers]
    if None in parameters:
        return None
    norm1, *_, norm2, fc1, _ = layers
    return CompiledBlock(parameters, fc1.out_features, heads, num_points, (norm1.eps, norm2.eps), scale)


def project(maps: Tensor, weight: Tensor, bias: Optional[Tensor], before: Optional[nn.Module] = None,
            after: Optional[nn.Module] = None, then: Optional[nn.Module] = None,
            into: Optional[Tensor] = None) -> Optional[Tensor]:
    """A linear layer of each patch of a map, (B, H, W, C_in) -> (B, H//side * W//side, C_out).

    Args:
        maps: tokens, whose channels lie side by side, or images, whose pixels of a line and channel do.
        weight: (C_out, side, side, C_in), which lies in memory in the order of the maps'.
        before, after: norms of the tokens' channels and of the results.
        then: a linear layer of what is normed.
        into: that the results are added to instead, if it is given; it is returned.

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
    parameters = _parameters(before), _weights(weight.permute(order), bias), _parameters(after), _parameters(then)
    if None in parameters or not _is_read(maps):
        return None
    height, width, then_channels = height // side, width // side, then.out_features if then else 0
    out = maps.new_empty(images, height * width, then_channels or channels) if into is None else into
    _call('project', _Projection(
        images, height, width, *segments, channels, then_channels, image, side * line, side * cell, *strides,
        *(getattr(norm, 'eps', 0.) for norm in (before, after)), *parameters, maps.data_ptr(), out.data_ptr(),
        into is not None))
    return out


def project_rows(rows: Tensor, layer: nn.Module, before: Optional[nn.Module] = None) -> Optional[Tensor]:
    """:func:`project` by a linear layer of rows (B, N, C_in), -> (B, N, C_out), if :func:`takes` them."""
    if not takes(rows) or not is_plain(layer, Linear):
        return None
    return project(rows[:, None], layer.weight[:, None, None], layer.bias, before)


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
