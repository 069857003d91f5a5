"""Inference on a CPU by compiled functions, native.c: a few calls instead of many operators.

They do what :mod:`.grains` does, and the sampling of deformable attention.
"""
import ctypes
from bisect import bisect_right
from functools import lru_cache
from importlib.util import find_spec
from itertools import accumulate
from typing import List, Optional, Tuple

import torch
from torch import Tensor

from ..layers.linear import few_sizes, is_plain_inference, packed_pieces
from .grains import grid


class _Routing(ctypes.Structure):
    """As in native.c."""
    _fields_ = [(name, ctypes.c_void_p if name in ('choice', 'first', 'sides') else ctypes.c_int64)
                for name in ('images', 'extra', 'height', 'width', 'channels', 'side', 'choice', 'first', 'sides',
                             'begin', 'end', 'start', 'count', 'surplus')]


class _Sampling(ctypes.Structure):
    """As in native.c."""
    _fields_ = [(name, ctypes.c_int64) for name in ('height', 'width', 'heads', 'points', 'channels')]


@lru_cache(maxsize=None)
def library() -> Optional[ctypes.CDLL]:
    """The compiled functions, or None where there was no compiler when mmdyn was installed.

    Raises:
        ImportError: if they are of another version of mmdyn; it says how to compile them again.
    """
    spec = find_spec('mmdyn.models.dge._native')
    if spec is None:
        return None
    functions = ctypes.CDLL(spec.origin)
    number, address = ctypes.c_int64, ctypes.c_void_p
    try:
        for name, *types in (('choose', address, address, address, number), ('count_queries', address),
                             ('gather_queries', address, number, address), ('add_changes', address, address)):
            getattr(functions, name).argtypes = [ctypes.POINTER(_Routing), *types]
        functions.sample.argtypes = [ctypes.POINTER(_Sampling), address, address, address, address, number, address]
    except AttributeError as error:
        raise ImportError(f'{spec.origin} was compiled for another version of mmdyn: install mmdyn again, by '
                          '`make setup` or `pip install -e .`.') from error
    return functions


def is_used(tokens: Tensor) -> bool:
    """Whether the compiled functions take these tokens: in float32 on a CPU, when nothing is recorded or traced.

    Modes that watch operators, such as torch's counter of operations, would not see these functions.
    """
    return (is_plain_inference() and not torch._C._len_torch_dispatch_stack() and type(tokens) is Tensor
            and tokens.device.type == 'cpu' and tokens.dtype == torch.float32 and tokens.is_contiguous()
            and library() is not None)


def choose(tokens: Tensor, shape: Tuple[int, int], side: int, num_extra: int, weight: Tensor, bias: Tensor) -> Tensor:
    """The greatest logits of eq. 1: (B, E + H*W, C), (K, C), (K) -> (B, rows, columns) indices from 0 to K - 1."""
    choice = torch.empty(len(tokens), *grid(side, shape), dtype=torch.long, device='cpu')
    routing = _Routing(len(tokens), num_extra, *shape, tokens.shape[2], side, choice.data_ptr())
    weight, bias = weight.contiguous(), bias.contiguous()
    library().choose(routing, tokens.data_ptr(), weight.data_ptr(), bias.data_ptr(), len(bias))
    return choice


class Band:
    """The queries of some images, or of neighbouring regions of one; a surplus of zeros behind them serves no token.

    Attributes:
        packed: queries of each image, the surplus included.
    """

    def __init__(self, routing: _Routing, begin: int, end: int, start: int, lengths: List[int]):
        count = sum(lengths)
        surplus = few_sizes(count) - count
        self._routing, self._band, self._size = routing, (begin, end, start, count, surplus), count + surplus
        self.packed = [*lengths[:-1], lengths[-1] + surplus]

    def means(self, table: Tensor) -> Tensor:
        """As :meth:`.grains.Routing.means`."""
        out = table.new_empty(self._size, table.shape[-1])
        stride = table.shape[1] if table.ndim == 3 else 0
        library().gather_queries(self._select(table), table.data_ptr(), stride, out.data_ptr())
        return out

    def add_changes_(self, tokens: Tensor, change: Tensor) -> Tensor:
        """As :meth:`.grains.Routing.add_changes_`."""
        change = change.to(tokens.dtype).contiguous()
        library().add_changes(self._select(tokens), tokens.data_ptr(), change.data_ptr())
        return tokens

    def _select(self, table: Tensor) -> _Routing:
        routing = self._routing
        routing.channels = table.shape[-1]
        routing.begin, routing.end, routing.start, routing.count, routing.surplus = self._band
        return routing


class Routing:
    """As :class:`.grains.Routing`, from what :func:`.grains.route` takes."""

    def __init__(self, choice: Tensor, shape: Tuple[int, int], granularities: Tuple[int, ...], region: int,
                 num_extra: int = 0):
        choice, sides = choice.contiguous(), sides_of(granularities)
        first, queries = torch.empty_like(choice), choice.new_empty(len(choice))
        self._routing = _Routing(len(choice), num_extra, *shape, 0, region, choice.data_ptr(), first.data_ptr(),
                                 sides.data_ptr())
        self._routing.tensors = choice, first, sides  # for as long as their memory is used
        library().count_queries(self._routing, queries.data_ptr())
        self.first, self.queries, self.lengths = first, queries, queries.tolist()

    def bands(self, count: int) -> List[Tuple[slice, Band]]:
        """As :meth:`.grains.Routing.bands`, in bands of about ``count`` queries or fewer."""
        total = sum(self.lengths)
        if total <= count:
            return [(slice(None), Band(self._routing, 0, self.first.numel(), 0, self.lengths))]
        first, image_begins, bands = self.first.flatten().numpy(), [0, *accumulate(self.lengths)], []
        regions, begin, start = len(first) // len(self.lengths), 0, 0
        for rows, images, lengths in packed_pieces(self.lengths, count):
            if rows.start > image_begins[images.start]:
                continue  # a further part of an image
            most, last, image_end = rows.stop - rows.start, images.stop * regions, image_begins[images.stop]
            while start < image_end:
                end, stop = last, image_end
                if image_end - start > most + most // 16:
                    # As many regions as have no more queries than this part, so that layers meet few numbers of them.
                    end = min(max(bisect_right(first, start + most) - 1, begin + 1), last)
                    stop = image_end if end == last else int(first[end])
                bands.append((images, Band(self._routing, begin, end, start,
                                           lengths if len(lengths) > 1 else [stop - start])))
                begin, start = end, stop
            begin = last
        return bands


@lru_cache(maxsize=None)
def sides_of(granularities: Tuple[int, ...]) -> Tensor:
    return torch.tensor(granularities, device='cpu')


def sample(value: Tensor, points: Tensor, weights: Tensor, shape: Tuple[int, int], lengths: List[int]) -> Tensor:
    """As :func:`~mmdyn.models.layers.deformable.deformable_sampling`."""
    (heads, channels), num_points = value.shape[2:], points.shape[2]
    points, weights, counts = points.contiguous(), weights.contiguous(), torch.tensor(lengths, device='cpu')
    out = value.new_empty(len(points), heads * channels)
    library().sample(_Sampling(*shape, heads, num_points, channels), value.data_ptr(), points.data_ptr(),
                     weights.data_ptr(), counts.data_ptr(), len(lengths), out.data_ptr())
    return out
