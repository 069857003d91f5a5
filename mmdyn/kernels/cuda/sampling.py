"""Deformable sampling of packed queries, without padding images to as many queries."""

import math
from types import ModuleType

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ...models.layers import deformable_sampling
from ...models.replaceable import Refused
from ...models.tracing import image_of_each
from ..prepared import equal_lengths
from .routing import DTYPES, load_programs, power_of_two


class SamplePoints(torch.autograd.Function):
    """Values, points and weights -> weighted sums, with the derivatives of all three."""

    @staticmethod
    def forward(ctx, value: Tensor, points: Tensor, weights: Tensor, image: Tensor, shape, programs: ModuleType):
        value, points, weights = value.contiguous(), points.float().contiguous(), weights.contiguous()
        out = value.new_empty(len(points), *value.shape[2:])
        ctx.save_for_backward(value, points, weights, image)
        ctx.shape, ctx.programs = shape, programs
        programs.sample_points[points.shape[:2]](
            value,
            points,
            weights,
            image,
            out,
            *shape,
            *value.shape[2:],
            POINTS=points.shape[2],
            BLOCK=power_of_two(value.shape[3]),
        )
        return out.flatten(1)

    @staticmethod
    @once_differentiable
    def backward(ctx, of_out: Tensor):
        value, points, weights, image = ctx.saved_tensors
        gradients = [torch.zeros_like(x, dtype=torch.float32) for x in (value, points, weights)]
        ctx.programs.sample_points_backward[points.shape[:2]](
            of_out.contiguous(),
            value,
            points,
            weights,
            image,
            *gradients,
            *ctx.shape,
            *value.shape[2:],
            POINTS=points.shape[2],
            BLOCK=power_of_two(value.shape[3]),
        )
        of_value, of_points, of_weights = gradients
        return of_value.to(value.dtype), of_points, of_weights.to(weights.dtype), None, None, None


@deformable_sampling.register
def sample_packed(
    value: Tensor, points: Tensor, weights: Tensor, shape: tuple[int, int], lengths: list[int] | None = None
) -> Tensor | Refused:
    """:func:`~mmdyn.models.layers.deformable.deformable_sampling`, with sums in float32."""
    programs = load_programs(value)
    if isinstance(programs, Refused):
        return programs
    if lengths is None:
        lengths = equal_lengths(len(points), len(value))
    if value.dtype not in DTYPES or weights.dtype not in DTYPES:
        return Refused(f'the values are {value.dtype}, the weights {weights.dtype}')
    if value.shape[:2] != (len(lengths), math.prod(shape)) or sum(lengths) != len(points) or not len(points):
        return Refused('there are no queries, or values, points and lengths do not fit each other')
    return sampling_of(programs, value, points, weights, shape, lengths)


def sampling_of(
    programs: ModuleType, value: Tensor, points: Tensor, weights: Tensor, shape: tuple[int, int], lengths: list[int]
) -> Tensor:
    """Sample points of queries that fit the values."""
    image = image_of_each(lengths, len(points), value.device).int()
    return SamplePoints.apply(value, points, weights, image, shape, programs)
