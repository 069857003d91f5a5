import math

import pytest
import torch
from torch.autograd import gradcheck
from torch.utils.flop_counter import FlopCounterMode

from mmdyn.models.layers import DeformableAttention, EncoderBlock, deformable_sampling
from mmdyn.models.layers.deformable import scale_gradient

# Map, queries of each image, heads, points.
LAYOUTS = [
    ((5, 7), [3, 3], 2, 4),
    ((5, 7), [4, 0, 2], 3, 2),
    ((1, 3), [1, 2], 1, 4),
    ((4, 1), [0, 5, 0], 2, 1),
    ((1, 1), [2], 2, 3),
    ((6, 6), [0, 0], 2, 2),
    ((2, 9), [7], 1, 1),
]


def by_hand(value, points, weights, shape, lengths):
    """One point and one of its four neighbours after the other, in Python's floats."""
    (height, width), outputs = shape, []
    images = [image for image, length in enumerate(lengths) for _ in range(length)]
    for image, query_points, query_weights in zip(images, points.tolist(), weights.tolist()):
        output = []
        for head, (places, shares) in enumerate(zip(query_points, query_weights)):
            cells = value[image, :, head].tolist()
            channels = [0.0] * value.shape[-1]
            for (x, y), share in zip(places, shares):
                left, top = math.floor(x), math.floor(y)
                for column, row in ((left, top), (left + 1, top), (left, top + 1), (left + 1, top + 1)):
                    if 0 <= column < width and 0 <= row < height:
                        area = (1 - abs(x - column)) * (1 - abs(y - row))
                        for channel, number in enumerate(cells[row * width + column]):
                            channels[channel] += share * area * number
            output += channels
        outputs.append(output)
    return torch.tensor(outputs, dtype=value.dtype).view(len(images), value.shape[2] * value.shape[3])


def inputs(shape, lengths, heads, num_points, dim=3, dtype=torch.double):
    """Values, points inside of the map and up to two cells outside, and weights; all of them take gradients."""
    value = torch.randn(len(lengths), math.prod(shape), heads, dim, dtype=dtype)
    sides = torch.tensor([shape[1], shape[0]])
    points = torch.rand(sum(lengths), heads, num_points, 2, dtype=dtype) * (sides + 3) - 2
    weights = torch.randn(sum(lengths), heads, num_points, dtype=dtype)
    return [x.requires_grad_() for x in (value, points, weights)]


@pytest.mark.parametrize('shape, lengths, heads, num_points', LAYOUTS)
@pytest.mark.parametrize('dtype', [torch.double, torch.float])
@pytest.mark.parametrize('grad', [False, True])
def test_sampling_equals_a_loop_by_hand(grad, dtype, shape, lengths, heads, num_points):
    arguments = inputs(shape, lengths, heads, num_points, dtype=dtype)
    with torch.set_grad_enabled(grad):
        sampled = deformable_sampling(*arguments, shape, lengths)
    expected = by_hand(*arguments, shape, lengths)
    assert sampled.shape == (sum(lengths), heads * 3)
    tolerance = 1e-9 if dtype == torch.double else 1e-5
    torch.testing.assert_close(sampled.detach(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    'x, y, expected',
    [
        (0, 0, 1),
        (2, 0, 3),
        (0, 1, 10),
        (2, 1, 30),  # the corners themselves
        (1, 1, 20),
        (0.5, 0, 1.5),
        (2, 0.5, 16.5),
        (1.25, 0.5, 0.5 * 2.25 + 0.5 * 22.5),
        (-0.5, 0, 0.5),
        (2.5, 1, 15),
        (1, -0.25, 1.5),
        (0, 1.75, 2.5),
        (-0.5, -0.5, 0.25),
        (2.5, 1.5, 7.5),
        (-1, 0, 0),
        (3, 1, 0),
        (1, -1, 0),
        (1, 2, 0),
        (-1, -1, 0),
        (3, 2, 0),
        (-1.5, 0.5, 0),
        (3.001, 0, 0),
        (1, 2.5, 0),
        (1e4, -1e4, 0),
        (1e12, 1, 0),
        (1, -1e12, 0),
    ],
)
def test_points_by_hand(x, y, expected):
    """A map of 1 2 3 and 10 20 30, which goes to 0 within a cell's side of the outermost centres."""
    value = torch.tensor([1.0, 2, 3, 10, 20, 30]).view(1, 6, 1, 1)
    points, weights = torch.tensor([x, y]).view(1, 1, 1, 2), torch.ones(1, 1, 1)
    for sampling in (deformable_sampling, deformable_sampling.plain):
        assert sampling(value, points, weights, (2, 3), [1]).item() == pytest.approx(expected, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize('x, y', [(math.nan, 0), (0, math.nan), (math.inf, 0), (1, -math.inf)])
def test_points_that_are_nowhere_have_no_value(x, y):
    """Other queries have theirs."""
    points = torch.tensor([[x, y], [1, 1]]).view(2, 1, 1, 2)
    sampled = deformable_sampling(torch.ones(1, 6, 1, 5), points, torch.ones(2, 1, 1), (2, 3), [2])
    assert sampled[0].isnan().all() and torch.equal(sampled[1], torch.ones(5))


@pytest.mark.parametrize('shape, lengths, heads, num_points', LAYOUTS)
def test_sampling_has_the_gradients_of_mmcvs_function(shape, lengths, heads, num_points):
    """Which samples one image after the other, at places in shares of the map."""
    mmcv_ops = pytest.importorskip('mmcv.ops.multi_scale_deform_attn')
    arguments = inputs(shape, lengths, heads, num_points)
    value, points, weights = arguments
    sides = torch.tensor([shape])
    places = (points + 0.5) / sides.flip(1)
    expected = torch.cat(
        [
            mmcv_ops.multi_scale_deformable_attn_pytorch(
                value[i : i + 1], sides, p[None, :, :, None], w[None, :, :, None]
            )[0]
            for i, (p, w) in enumerate(zip(places.split(lengths), weights.split(lengths)))
            if lengths[i]
        ]
        or [value.new_zeros(0, 3 * heads) * (value.sum() + points.sum() + weights.sum())]
    )
    loss_weights, results = torch.randn_like(expected), []
    for sampled in (deformable_sampling(*arguments, shape, lengths), expected):
        results.append([sampled, *torch.autograd.grad((loss_weights * sampled).sum(), arguments)])
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize('shape, lengths, heads, num_points', LAYOUTS[:4])
def test_gradients_are_those_of_differences(shape, lengths, heads, num_points):
    """Away from integers, where the interpolation bends."""
    value, points, weights = inputs(shape, lengths, heads, num_points, dim=2)
    points = (points.detach().floor() + 0.1 + 0.8 * torch.rand_like(points)).requires_grad_()
    assert gradcheck(lambda *args: deformable_sampling(*args, shape, lengths), (value, points, weights))


def test_sampling_of_no_images():
    sampled = deformable_sampling(torch.randn(0, 6, 2, 3), torch.randn(0, 2, 4, 2), torch.randn(0, 2, 4), (2, 3), [])
    assert sampled.shape == (0, 6)


@pytest.mark.parametrize('shape, lengths', [((2, 4), [2]), ((2, 3), [1]), ((2, 3), [1, 1]), ((2, 3), [])])
def test_values_points_and_lengths_must_fit(shape, lengths):
    arguments = inputs((2, 3), [2], 1, 4)
    with pytest.raises(
        ValueError,
        match=r'1 images with 6 cells and points of 2 queries do not fit lengths=\[.*'
        r'shape=\(2, .\): give the queries of each image',
    ):
        deformable_sampling(*arguments, shape, lengths)


@pytest.fixture
def make_attention(randomise):
    """Attention whose points and weights depend on the query."""
    return lambda *args, **options: randomise(DeformableAttention(*args, **options), std=0.5)


@pytest.mark.parametrize('num_heads, num_points', [(1, 1), (3, 4), (4, 2)])
@pytest.mark.parametrize('shape', [(6, 6), (5, 7), (1, 3)])
def test_attention_equals_a_slow_one(num_heads, num_points, shape, make_attention, slow_deformable_attention):
    attn = make_attention(12, num_heads, num_points)
    tokens = torch.randn(3, shape[0] * shape[1], 12)
    queries, points = torch.randn(9, 12), 7 * torch.rand(9, 2) - 1
    for lengths in ([2, 0, 7], [3, 3, 3]):
        expected = torch.cat(
            [
                slow_deformable_attention(attn, q, t, shape, p)
                for q, t, p in zip(queries.split(lengths), tokens, points.split(lengths))
            ]
        )
        packed = attn(queries, tokens, shape, lengths=lengths, points=points)
        torch.testing.assert_close(packed, expected, rtol=1e-5, atol=1e-5)
    dense = attn(queries.unflatten(0, (3, 3)), tokens, shape, points=points)
    torch.testing.assert_close(dense.flatten(0, 1), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('shape', [(5, 7), (1, 3), (1, 1)])
def test_cells_are_their_own_reference_points(shape, make_attention, slow_deformable_attention):
    attn, tokens = make_attention(12, 3), torch.randn(2, shape[0] * shape[1], 12)
    points = torch.tensor([[column, row] for row in range(shape[0]) for column in range(shape[1])])
    expected = [slow_deformable_attention(attn, image, image, shape, points) for image in tokens]
    torch.testing.assert_close(attn(tokens, tokens, shape), torch.stack(expected), rtol=1e-5, atol=1e-5)


def test_block_equals_a_slow_one(make_attention, slow_change, randomise):
    block = randomise(EncoderBlock(12, make_attention(12, 3), mlp_ratio=2))
    tokens, queries, lengths, points = torch.randn(3, 35, 12), torch.randn(7, 12), [2, 0, 5], 5 * torch.rand(7, 2)
    expected = [
        q + slow_change(block, q, t, (5, 7), 0, p)
        for q, t, p in zip(queries.split(lengths), tokens, points.split(lengths))
    ]
    packed = block(queries, tokens, (5, 7), 0, lengths, points)
    torch.testing.assert_close(packed, torch.cat(expected), rtol=1e-5, atol=1e-5)
    assert block.uses_points


def test_starts_in_a_ring_with_equal_weights():
    """4 heads look right, down, left and up."""
    attn, queries = DeformableAttention(8, 4, 3), torch.randn(2, 5, 8)
    offsets = attn.offsets(queries).view(2, 5, 4, 3, 2)
    expected = torch.tensor([[1.0, 0], [0, 1], [-1, 0], [0, -1]])[:, None] * torch.tensor([1.0, 2, 3])[:, None]
    torch.testing.assert_close(offsets, expected.expand_as(offsets), rtol=0, atol=1e-6)
    # 6 heads stand at angles of 60 degrees.
    ring = DeformableAttention(12, 6, 2).offsets.bias.view(6, 2, 2)
    torch.testing.assert_close(ring[1], torch.tensor([[0.5, 3**0.5 / 2], [1, 3**0.5]]), rtol=0, atol=1e-6)
    torch.testing.assert_close(ring[5], torch.tensor([[0.5, -(3**0.5) / 2], [1, -(3**0.5)]]), rtol=0, atol=1e-6)
    # Far from the border each head's output is thus the mean of its three values.
    tokens = torch.randn(1, 49, 8)
    value = attn.v(tokens).view(7, 7, 4, 2)
    means = [value[3, 4:7, 0], value[4:7, 3, 1], value[3, 0:3, 2], value[0:3, 3, 3]]
    expected = attn.proj(torch.cat([mean.mean(0) for mean in means]))
    torch.testing.assert_close(attn(tokens, tokens, (7, 7))[0, 3 * 7 + 3], expected, rtol=1e-5, atol=1e-6)


def test_a_start_after_another_initialisation_is_the_first_one():
    attn = DeformableAttention(8, 4, 3)
    expected = {name: parameter.clone() for name, parameter in attn.named_parameters()}
    for layer in (attn.offsets, attn.attn_weight):
        torch.nn.init.normal_(layer.weight), torch.nn.init.normal_(layer.bias)
    attn.start()
    assert all(torch.equal(parameter, expected[name]) for name, parameter in attn.named_parameters())


def test_offsets_learn_at_a_tenth_and_nothing_else_does(make_attention, monkeypatch):
    attn = make_attention(12, 3)
    queries, tokens, points = torch.randn(4, 12), torch.randn(2, 35, 12, requires_grad=True), torch.rand(4, 2)
    points.requires_grad_()

    def run():
        output = attn(queries, tokens, (5, 7), lengths=[1, 3], points=points)
        names, parameters = zip(*attn.named_parameters())
        gradients = torch.autograd.grad(output.square().sum(), [tokens, points, *parameters])
        return output, dict(zip(('tokens', 'points', *names), gradients))

    output, gradients = run()
    monkeypatch.setattr('mmdyn.models.layers.deformable.scale_gradient', lambda x, scale: x)
    reference, expected = run()
    assert torch.equal(output, reference)
    assert set(gradients) >= {'offsets.weight', 'offsets.bias', 'attn_weight.weight', 'v.weight', 'proj.bias'}
    for name, gradient in gradients.items():
        assert expected[name].abs().max() > 1e-3
        factor = 0.1 if name.startswith('offsets') else 1
        torch.testing.assert_close(gradient, factor * expected[name], rtol=1e-5, atol=1e-6)


def test_scale_gradient_changes_no_bit_of_the_value():
    x = torch.cat([torch.randn(1000), 1e30 * torch.randn(1000), 1e-40 * torch.randn(1000)]).requires_grad_()
    scaled = scale_gradient(x, 0.1)
    assert torch.equal(scaled, x)
    scaled.sum().backward()
    torch.testing.assert_close(x.grad, torch.full_like(x, 0.1), rtol=1e-6, atol=0)


DTYPES = [torch.float16, torch.bfloat16]
# Cells next to each other differ as much as any: a place that is rounded to the next one has another value.
LONG = (4, 600)


def long_map(make_attention, dtype):
    """Attention, queries and points at the right end of a long map; all of them fit into ``dtype`` exactly."""
    attn = make_attention(8, 2)
    queries, tokens = torch.randn(4, 8), torch.randn(2, math.prod(LONG), 8)
    attn.load_state_dict({name: value.to(dtype).float() for name, value in attn.state_dict().items()})
    points = torch.tensor([[597.5, 1.5], [590.5, 2.0], [581.0, 0.5], [593.0, 1.0]])
    return attn, queries.to(dtype).float(), tokens.to(dtype).float(), points


@pytest.mark.parametrize('dtype', DTYPES)
def test_half_precision_places_points_as_float32(dtype, make_attention):
    """Only sums and products are rounded: some eps of the values' size, where a wrong place would change all of it."""
    attn, queries, tokens, points = long_map(make_attention, dtype)
    expected = attn(queries, tokens, LONG, lengths=[1, 3], points=points)
    with torch.autocast('cpu', dtype):
        autocast = attn(queries, tokens, LONG, lengths=[1, 3], points=points)
    half = attn.to(dtype)(queries.to(dtype), tokens.to(dtype), LONG, lengths=[1, 3], points=points)
    for output in (autocast, half):
        assert output.dtype == dtype
        error = (output.float() - expected).norm() / (expected - attn.proj.bias.float()).norm()
        assert error < 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('grad', [False, True])
def test_sampling_in_half_precision_takes_places_in_float32(dtype, grad):
    """Of cells that are powers of two only the result is rounded."""
    value = torch.zeros(1, math.prod(LONG), 1, 1, dtype=dtype)
    value[0, 2 * 600 + 597], value[0, 2 * 600 + 598] = 1, 4
    points, weights = torch.tensor([[[[597.25, 2.0]]]]), torch.ones(1, 1, 1, dtype=dtype)
    with torch.autocast('cpu', dtype), torch.set_grad_enabled(grad):
        sampled = deformable_sampling(value, points, weights, LONG, [1])
    assert sampled.dtype == dtype
    torch.testing.assert_close(sampled.item(), 1.75, rtol=torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize('dtype', DTYPES)
def test_half_precision_takes_gradients(dtype, make_attention):
    """As float32 has them, but for the rounding, which must not take a point to another cell, where gradients jump."""
    distance, gradients = 0, []
    while distance < 0.02:
        attn, queries, tokens, points = long_map(make_attention, dtype)
        places = points[:, None] + attn.offsets(queries).unflatten(1, (8, 2))
        distance = (places - places.round()).abs().min()
    for enabled in (False, True):
        with torch.autocast('cpu', dtype, enabled=enabled):
            output = attn(queries, tokens, LONG, lengths=[1, 3], points=points)
        gradients.append(torch.autograd.grad(output.float().sum(), list(attn.parameters())))
    for expected, gradient in zip(*gradients):
        assert (gradient - expected).norm() <= 16 * torch.finfo(dtype).eps * expected.norm()


def test_float64_stays(make_attention):
    attn, tokens = make_attention(8, 2).double(), torch.randn(1, 12, 8, dtype=torch.double)
    assert attn(tokens, tokens, (3, 4)).dtype == torch.double


@pytest.mark.parametrize('dim, num_heads, num_points', [(12, 3, 4), (8, 2, 1)])
def test_macs_are_the_linear_layers_and_the_neighbours(dim, num_heads, num_points):
    """The library's counter sees the former; each of a head's points weighs the channels of 4 cells for the latter."""
    attn = DeformableAttention(dim, num_heads, num_points)
    query, static = attn.macs((5, 7), 0)
    with FlopCounterMode(display=False) as counter:
        attn(torch.randn(9, dim), torch.randn(2, 35, dim), (5, 7), lengths=[2, 7], points=torch.rand(9, 2))
    neighbours = sum(4 * dim // num_heads for _ in range(num_heads * num_points))
    assert 9 * query + 2 * static == counter.get_total_flops() / 2 + 9 * neighbours
    assert static == 35 * dim * dim


def test_macs_by_hand():
    """12 channels, 3 heads, 4 points: offsets 12 * 24, weights 12 * 12, output 144, neighbours 4 * 4 * 12."""
    assert DeformableAttention(12, 3).macs((5, 7), 0) == (288 + 144 + 144 + 192, 35 * 144)


def test_heads_must_divide_the_channels():
    with pytest.raises(ValueError, match='12 channels do not divide into 5 heads: choose num_heads that divide 12'):
        DeformableAttention(12, 5)


def test_extra_tokens_have_no_place():
    attn, tokens = DeformableAttention(12, 3), torch.randn(1, 36, 12)
    with pytest.raises(ValueError, match='there are 1 extra tokens, which have no place on it: use a model without'):
        attn(tokens, tokens, (5, 7), 1)
