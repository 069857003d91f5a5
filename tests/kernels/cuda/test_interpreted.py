"""What the programs compute, by Triton's interpreter: see conftest.py."""

import math
import random

import pytest
import torch

from mmdyn.kernels.cuda import programs
from mmdyn.kernels.cuda.blocks import encode_by_programs
from mmdyn.kernels.cuda.routing import logits_of, routing_of
from mmdyn.kernels.cuda.sampling import sampling_of
from mmdyn.models.dge import encode_queries
from mmdyn.models.dge.router import Router
from mmdyn.models.dge.routing import grid, pool, route
from mmdyn.models.layers import Attention, DeformableAttention, EncoderBlock, deformable_sampling
from mmdyn.models.replaceable import Refused

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


@pytest.mark.parametrize('missing', [1, 5])
@pytest.mark.parametrize('seed, phis, region', [(5, (0, 1, 3), 6), (6, (1, 2, 4), 4)])
def test_what_there_is_no_place_for_has_no_query(seed, phis, region, missing):
    """Each image fills its places; each query is the mean of its tokens, and the other tokens get nothing."""
    choice, shape, *_, num_extra = arguments = draw(seed, phis, region)
    lengths = route.plain(*arguments).lengths
    capacity = max(max(lengths) - missing, 0)
    routing = routing_of(programs, *arguments, capacity)
    tokens, num = torch.randn(len(choice), num_extra + math.prod(shape), 3), capacity * len(choice)
    out = routing.spread(routing.compress(tokens)) if num else torch.zeros_like(tokens)
    for image, length in enumerate(lengths):
        query = routing.query[image]
        filled = range(image * capacity, image * capacity + min(length, capacity))
        assert set(query[query != num].tolist()) == set(filled)
        for number in filled:
            mine = query == number
            torch.testing.assert_close(out[image, mine], tokens[image, mine].mean(0).expand(mine.sum(), -1))
        assert not out[image, query == num].any()


@pytest.fixture
def block_of(randomise):
    """A block of 6 channels, and its arguments: tokens, the routing of the programs, and others."""

    def make(deformable=False, dtype=torch.float32, **options):
        attn = DeformableAttention(6, 2, 3) if deformable else Attention(6, 2)
        block, num_extra = randomise(EncoderBlock(6, attn, 2, **options)).to(dtype), int(not deformable)
        layout = torch.randint(3, (2, 1, 2)), (3, 5), (1, 2, 4), 4, num_extra
        routing = routing_of(programs, *layout, None)
        return block, torch.randn(2, num_extra + 15, 6, dtype=dtype), (3, 5), num_extra, routing

    return make


@pytest.mark.parametrize(
    'is_training, deformable, options',
    [
        (False, True, dict(drop_path_rate=0.5)),
        (True, False, dict(residual_scale=0.5, norm_eps=0.1)),
        (True, True, dict(drop_path_rate=0.5)),
    ],
)
def test_norms_behind_what_makes_their_input(is_training, deformable, options, block_of):
    """The block's residual and all its derivatives, with what drops out; in inference the sum is not kept."""
    block, tokens, *rest = block_of(deformable, **options)
    block.train(is_training)
    weight, results = torch.randn(6), []
    for function in (encode_queries.plain, encode_by_programs):
        torch.manual_seed(2)
        leaves = [tokens.clone().requires_grad_(), *block.parameters()]
        with torch.set_grad_enabled(is_training):
            out = function(block, leaves[0], *rest)
        results.append([out, *(torch.autograd.grad((out * weight).sum(), leaves) if is_training else ())])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('is_training', [False, True])
def test_norms_in_half_precision_are_what_linear_layers_get(is_training, block_of):
    """Under autocast; the residual is as precise as the tokens in training alone, whose sums need it."""
    block, *rest = block_of()
    with torch.set_grad_enabled(is_training), torch.autocast('cpu', torch.bfloat16):
        expected, out = (function(block, *rest) for function in (encode_queries.plain, encode_by_programs))
    assert expected.dtype == torch.float32 and out.dtype == (torch.float32 if is_training else torch.bfloat16)
    torch.testing.assert_close(out.float(), expected, rtol=5e-2, atol=5e-2)


def change(name, value):
    return lambda block: setattr(block, name, value)


class Other(EncoderBlock):
    """Of another type."""


@pytest.mark.parametrize(
    'alter, reason',
    [
        (change('__class__', Other), 'the block is a Other, or has a forward function of its own'),
        (change('attn', torch.nn.Identity()), 'the attention or the feed-forward network of the block is another'),
        (change('with_cp', True), 'the block is computed again in the backward pass'),
        (lambda block: block.register_forward_hook(print), 'the block or its norms have hooks'),
        (lambda block: block.norm2.register_full_backward_hook(print), 'the block or its norms have hooks'),
        (change('norm2', torch.nn.Identity()), 'a norm of the block is a Identity, or not of its channels'),
        (change('norm1', torch.nn.LayerNorm(6, elementwise_affine=False)), 'a norm of the block has no weight'),
        (lambda block: block.norm1.double(), 'a norm of the block has no weight or no bias, or of another type'),
        (lambda block: setattr(block.ffn, 'fc1', torch.nn.Identity()), 'the layers behind the norms are no linear'),
    ],
)
def test_blocks_that_are_called_as_they_are(alter, reason, block_of):
    block, *rest = block_of()
    alter(block)
    found = encode_by_programs(block, *rest)
    assert isinstance(found, Refused) and found.reason.startswith(reason)


def test_routings_that_are_not_of_programs(block_of):
    block, tokens, *rest, routing = block_of()
    plain = route.plain(torch.zeros(2, 1, 2, dtype=torch.long), (3, 5), (1, 2, 4), 4, 1)
    assert encode_by_programs(block, tokens, *rest, plain).reason == 'the routing was not made by programs for a GPU'
    assert encode_by_programs(block, tokens.double(), *rest, routing).reason.startswith('the tokens are torch.float64')


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
