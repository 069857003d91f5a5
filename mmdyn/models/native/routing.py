"""The routing of dynamic grained queries in inference on a CPU, by routing.c."""
import ctypes
from dataclasses import dataclass
from functools import lru_cache
from typing import List, Tuple

import torch
from torch import Tensor

from ..dge.grains import grid
from . import library


class _Map(ctypes.Structure):
    """As in routing.c."""
    _fields_ = [*((name, ctypes.c_int64) for name in ('images', 'extra', 'height', 'width', 'side', 'channels')),
                ('choice', ctypes.c_void_p)]


def choose(tokens: Tensor, shape: Tuple[int, int], side: int, num_extra: int, weight: Tensor, bias: Tensor) -> Tensor:
    """The greatest logits of eq. 1: (B, E + H*W, C), (K, C), (K) -> (B, rows, columns) indices from 0 to K - 1."""
    choice = torch.empty(len(tokens), *grid(side, shape), dtype=torch.long, device='cpu')
    regions = _Map(len(tokens), num_extra, *shape, side, tokens.shape[2], choice.data_ptr())
    weight, bias = weight.contiguous(), bias.contiguous()
    library().choose(ctypes.byref(regions), tokens.data_ptr(), weight.data_ptr(), bias.data_ptr(), len(bias))
    return choice


@dataclass(frozen=True)
class Patches:
    """The patches of cells that packed queries are means of, as encoder.c reads them; an extra token is one of its own.

    Attributes:
        table: (B * (E + H*W), 2) their places and sizes, as many rows as there are queries.
        shape: (H, W) of the map.
        num_extra: E.
        queries: (B,) queries of each image, extra tokens included.
        lengths: the same as a list.
    """
    table: Tensor
    shape: Tuple[int, int]
    num_extra: int
    queries: Tensor
    lengths: List[int]


def route(choice: Tensor, shape: Tuple[int, int], granularities: Tuple[int, ...], region: int,
          num_extra: int = 0) -> Patches:
    """As :func:`~mmdyn.models.dge.grains.route`."""
    choice, images = choice.contiguous(), len(choice)
    table = choice.new_empty(images * (num_extra + shape[0] * shape[1]), 2)
    queries = choice.new_empty(images)
    regions = _Map(images, num_extra, *shape, region, 0, choice.data_ptr())
    library().route(ctypes.byref(regions), _sides_of(granularities).data_ptr(), table.data_ptr(), queries.data_ptr())
    return Patches(table, shape, num_extra, queries, queries.tolist())


@lru_cache(maxsize=None)
def _sides_of(granularities: Tuple[int, ...]) -> Tensor:
    return torch.tensor(granularities, device='cpu')
