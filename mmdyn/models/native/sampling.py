"""The sampling of deformable attention in inference on a CPU, by sampling.c."""
import ctypes
from typing import List, Tuple

import torch
from torch import Tensor

from . import library


class _Sampling(ctypes.Structure):
    """As in native.h."""
    _fields_ = [(name, ctypes.c_int64) for name in ('height', 'width', 'heads', 'points', 'channels')]


def sample(value: Tensor, points: Tensor, weights: Tensor, shape: Tuple[int, int], lengths: List[int]) -> Tensor:
    """As :func:`~mmdyn.models.layers.deformable.deformable_sampling`."""
    (heads, channels), num_points = value.shape[2:], points.shape[2]
    if points.shape != (len(points), heads, num_points, 2) or weights.shape != points.shape[:3]:
        raise ValueError(f'Points of shape {tuple(points.shape)} and weights of shape {tuple(weights.shape)} do not fit '
                         f'{heads} heads: give (N, heads, P, 2) and (N, heads, P).')
    points, weights, counts = points.contiguous(), weights.contiguous(), torch.tensor(lengths, device='cpu')
    out = value.new_empty(len(points), heads * channels)
    library().sample(ctypes.byref(_Sampling(*shape, heads, num_points, channels)), value.data_ptr(), points.data_ptr(),
                     weights.data_ptr(), counts.data_ptr(), len(lengths), out.data_ptr())
    return out
