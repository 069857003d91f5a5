import math

import pytest
import torch

from mmdyn.kernels.cuda.sampling import sample_packed
from mmdyn.models.layers import deformable_sampling
from mmdyn.models.replaceable import Refused


def inputs(shape, lengths, heads, num_points, channels):
    """Values, points on the map and beside it, and weights."""
    value = torch.randn(len(lengths), math.prod(shape), heads, channels)
    points = (torch.rand(sum(lengths), heads, num_points, 2) * 1.6 - 0.3) * torch.tensor(shape).flip(0)
    return value, points, torch.rand(sum(lengths), heads, num_points)


def with_gradients(function, tensors, shape, lengths):
    tensors = [x.clone().requires_grad_() for x in tensors]
    out = function(*tensors, shape, lengths)
    return [out, *torch.autograd.grad(out.square().sum(), tensors)]


def test_no_gpu_no_programs():
    assert sample_packed(*inputs((2, 2), [1], 1, 1, 2), (2, 2), [1]) == Refused('the tensors are on cpu, not on a GPU')


@pytest.mark.cuda
@pytest.mark.parametrize('lengths', [[30, 30], [7, 51], [0, 60]])
def test_sums_on_a_gpu(lengths):
    tensors = [x.cuda() for x in inputs((9, 12), lengths, 4, 4, 32)]
    expected = with_gradients(deformable_sampling.plain, tensors, (9, 12), lengths)
    result = with_gradients(sample_packed, tensors, (9, 12), lengths)
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)
