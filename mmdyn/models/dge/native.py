"""The inference path of :mod:`.grains` on a CPU as compiled functions, native.c: a few calls instead of many operators."""
import ctypes
import math
from functools import lru_cache
from importlib.util import find_spec
from typing import List, Optional, Tuple

import torch
from torch import Tensor

from ..layers.linear import few_sizes, is_plain_inference
from .grains import grid


class Geometry(ctypes.Structure):
    """Numbers of images, extra rows, rows and columns of cells, channels, and the side of a region."""
    _fields_ = [(name, ctypes.c_int64) for name in ('images', 'extra', 'height', 'width', 'channels', 'side')]


@lru_cache(maxsize=None)
def library() -> Optional[ctypes.CDLL]:
    """The compiled functions, or None where there was no compiler when mmdyn was installed."""
    spec = find_spec('mmdyn.models.dge._native')
    if spec is None:
        return None
    functions = ctypes.CDLL(spec.origin)
    for name, pointers in (('region_means', 2), ('count_queries', 4), ('gather_queries', 5), ('add_changes', 6)):
        getattr(functions, name).argtypes = [ctypes.POINTER(Geometry)] + [ctypes.c_void_p] * pointers
    functions.gather_queries.argtypes += [ctypes.c_int64]
    return functions


def is_used(tokens: Tensor) -> bool:
    """Whether the compiled functions take these tokens: in float32 on a CPU, when nothing is recorded or traced."""
    return (is_plain_inference() and type(tokens) is Tensor and tokens.device.type == 'cpu'
            and tokens.dtype == torch.float32 and tokens.is_contiguous() and library() is not None)


def pool(tokens: Tensor, shape: Tuple[int, int], side: int, num_extra: int = 0) -> Tensor:
    """As :func:`.grains.pool`."""
    out = tokens.new_empty(len(tokens), math.prod(grid(side, shape)), tokens.shape[2])
    geometry = Geometry(len(tokens), num_extra, *shape, tokens.shape[2], side)
    library().region_means(geometry, tokens.data_ptr(), out.data_ptr())
    return out


class Routing:
    """As :class:`.grains.Routing`; for the arguments see :func:`route`."""

    def __init__(self, choice: Tensor, shape: Tuple[int, int], granularities: Tuple[int, ...], region: int, num_extra: int,
                 padded: bool):
        # Tensors are kept for as long as their memory is used.
        self.choice, self.sides = choice.contiguous(), sides_of(granularities)
        self.first, lengths = torch.empty_like(self.choice), choice.new_empty(len(choice))
        self.geometry = Geometry(len(choice), num_extra, *shape, 0, region)
        self.decision = self.choice.data_ptr(), self.sides.data_ptr(), self.first.data_ptr()
        library().count_queries(self.geometry, *self.decision, lengths.data_ptr())
        self.lengths: List[int] = lengths.tolist()
        self.total = sum(self.lengths)
        self.surplus = few_sizes(self.total) - self.total if padded else 0
        self.packed = [*self.lengths[:-1], self.lengths[-1] + self.surplus]

    def means(self, table: Tensor) -> Tensor:
        """As :meth:`.grains.Routing.means`."""
        self.geometry.channels = table.shape[-1]
        out = table.new_empty(self.total + self.surplus, table.shape[-1])
        if self.surplus:
            out[self.total:] = 0
        stride = table.shape[1] if table.ndim == 3 else 0
        library().gather_queries(self.geometry, *self.decision, table.data_ptr(), out.data_ptr(), stride)
        return out

    def add_changes(self, tokens: Tensor, change: Tensor) -> Tensor:
        """As :meth:`.grains.Routing.add_changes`."""
        self.geometry.channels = tokens.shape[2]
        out, change = torch.empty_like(tokens), change.to(tokens.dtype).contiguous()
        library().add_changes(self.geometry, *self.decision, tokens.data_ptr(), change.data_ptr(), out.data_ptr())
        return out


def route(choice: Tensor, shape: Tuple[int, int], granularities: Tuple[int, ...], region: int, num_extra: int = 0,
          padded: bool = False) -> Routing:
    """As :func:`.grains.route`."""
    return Routing(choice, shape, granularities, region, num_extra, padded)


@lru_cache(maxsize=None)
def sides_of(granularities: Tuple[int, ...]) -> Tensor:
    return torch.tensor(granularities, device='cpu')
