"""What the programs compute, by Triton's interpreter: see conftest.py."""

import math
import random

import pytest
import torch

from mmdyn.kernels.cuda import programs
from mmdyn.kernels.cuda.routing import logits_of, routing_of
from mmdyn.kernels.cuda.sampling import sampling_of
from mmdyn.models.dge.router import Router
from mmdyn.models.dge.routing import grid, pool, route
from mmdyn.models.layers import deformable_sampling

GRANULARITIES = [((1, 2, 4), 4), ((0, 1), 1), ((0, 1, 3), 6), ((2, 4), 8)]


def draw(seed, phis, region):
    """The arguments of a routing of some images."""
    draw = random.Random(seed)
    shape, num_extra = (draw.randint(1, 9), draw.randint(1, 9)), draw.randint(0, 2)
    choice = torch.randint(len(phis), (draw.randint(1, 3), *grid(region, shape)))
    return choice, shape, phis, region, num_extra


@pytest.fixture
def pair():
    """Both routings of a choice: the plain one, and that of the programs. Odd seeds have a capacity."""

    def make(seed, phis, region):
        arguments = draw(seed, phis, region)
        lengths = route.plain(*arguments).lengths
        capacity = max(lengths) + 2 if seed % 2 else None
        return arguments, route.plain(*arguments, capacity), routing_of(programs, *arguments, capacity)

    return make


@pytest.mark.parametrize('seed, phis, region', [(seed, *pair) for seed, pair in enumerate(GRANULARITIES)])
def test_both_directions_and_their_derivatives_are_those_of_the_plain_routing(seed, phis, region, pair):
    """Through a function of each query, since their order is another."""
    (choice, shape, *_, num_extra), *routings = pair(seed, phis, region)
    assert routings[0].lengths == routings[1].lengths
    size, matrix, results = num_extra + math.prod(shape), torch.randn(5, 5), []
    tokens, shared = torch.randn(len(choice), size, 5), torch.randn(1, size, 5)
    for routing in routings:
        inputs = [x.clone().requires_grad_() for x in (tokens, shared)]
        queries, of_shared = map(routing.compress, inputs)
        change = (queries @ matrix + of_shared).tanh()
        out = routing.decompress(change, inputs[0]) + routing.spread(change**2)
        results.append([out, *torch.autograd.grad(out.square().sum(), inputs)])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('dtype, rounding', [(torch.float16, 0), (torch.bfloat16, 2**-7)])
def test_half_precision_is_rounded_once(dtype, rounding, pair):
    """To the nearest number; but the interpreter cuts the digits that bfloat16 has not."""
    (choice, shape, *_, num_extra), *routings = pair(1, (1, 2, 4), 4)
    tokens = torch.randn(len(choice), num_extra + math.prod(shape), 3) + 100
    means = [routing.compress(tokens.to(dtype)) for routing in routings]
    of_tokens = [of_all[routing.query] for of_all, routing in zip(means, routings)]
    sums = [routing.decompress(of_all, tokens) for of_all, routing in zip(means, routings)]
    for pair_of in (of_tokens, sums):
        torch.testing.assert_close(*pair_of, rtol=rounding, atol=0)


def test_other_types_go_the_plain_way(pair):
    (choice, shape, *_, num_extra), plain, routing = pair(0, (1, 2, 4), 4)
    tokens = torch.randn(len(choice), num_extra + math.prod(shape), 3, dtype=torch.double)
    out = [r.decompress(r.compress(tokens).sin(), tokens) for r in (plain, routing)]
    torch.testing.assert_close(*out, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize('shape, num_extra, side', [((7, 9), 1, 4), ((4, 4), 0, 2), ((5, 3), 2, 8)])
def test_logits_are_those_of_the_router(shape, num_extra, side):
    router, tokens = Router(6, (1, 2, 4)), torch.randn(2, num_extra + math.prod(shape), 6)
    with torch.no_grad():
        expected = router(pool(tokens, shape, side, num_extra))
        logits = logits_of(programs, router, tokens, shape, side, num_extra)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


def inputs(shape, lengths, heads, num_points, channels):
    """Values, points on the map and beside it, and weights."""
    value = torch.randn(len(lengths), math.prod(shape), heads, channels)
    points = (torch.rand(sum(lengths), heads, num_points, 2) * 1.6 - 0.3) * torch.tensor(shape).flip(0)
    return value, points, torch.rand(sum(lengths), heads, num_points)


def with_gradients(function, tensors, shape, lengths):
    tensors = [x.clone().requires_grad_() for x in tensors]
    out = function(*tensors, shape, lengths)
    return [out, *torch.autograd.grad(out.square().sum(), tensors)]


@pytest.mark.parametrize(
    'shape, lengths, heads, num_points, channels',
    [((5, 7), [3, 2], 2, 3, 5), ((1, 1), [4, 4], 1, 2, 4), ((3, 6), [0, 5], 3, 1, 1), ((4, 2), [1], 2, 4, 8)],
)
def test_sums_and_their_derivatives(shape, lengths, heads, num_points, channels):
    tensors = inputs(shape, lengths, heads, num_points, channels)
    expected = with_gradients(deformable_sampling.plain, tensors, shape, lengths)
    result = with_gradients(lambda *arguments: sampling_of(programs, *arguments), tensors, shape, lengths)
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)


def test_half_precision_sums_in_float32():
    value, points, weights = inputs((4, 4), [2, 3], 2, 3, 4)
    value, weights = value.bfloat16(), weights.bfloat16()
    result = sampling_of(programs, value, points, weights, (4, 4), [2, 3])
    expected = deformable_sampling.plain(value.float(), points, weights.float(), (4, 4), [2, 3]).bfloat16()
    assert result.dtype == torch.bfloat16
    torch.testing.assert_close(result, expected, rtol=1e-2, atol=1e-2)
