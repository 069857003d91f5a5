"""The choice of granularities in inference on a CPU, by routing.c."""
import ctypes
from typing import Tuple

import torch
from torch import Tensor

from ..dge.grains import grid
from . import library


class Map(ctypes.Structure):
    """As in native.h."""
    _fields_ = [*((name, ctypes.c_int64) for name in ('images', 'extra', 'height', 'width', 'side', 'channels')),
                ('choice', ctypes.c_void_p)]


def choose(tokens: Tensor, shape: Tuple[int, int], side: int, num_extra: int, weight: Tensor, bias: Tensor) -> Tensor:
    """The greatest logits of eq. 1: (B, E + H*W, C), (K, C), (K) -> (B, rows, columns) indices from 0 to K - 1."""
    if tokens.shape[1] != num_extra + shape[0] * shape[1] or weight.shape != (len(bias), tokens.shape[2]) or bias.ndim != 1:
        raise ValueError(f'Tokens of shape {tuple(tokens.shape)} are no {num_extra} extra tokens and map of {tuple(shape)} '
                         f'cells for weights of shape {tuple(weight.shape)} and biases of shape {tuple(bias.shape)}.')
    choice = torch.empty(len(tokens), *grid(side, shape), dtype=torch.long, device='cpu')
    regions = Map(len(tokens), num_extra, *shape, side, tokens.shape[2], choice.data_ptr())
    weight, bias = weight.contiguous(), bias.contiguous()
    library().choose(ctypes.byref(regions), tokens.data_ptr(), weight.data_ptr(), bias.data_ptr(), len(bias))
    return choice
