import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mmdyn.models.layers import linear as linear_module
from mmdyn.models.layers.linear import (Linear, add_into, by_pieces, by_pieces_of_rows, cpuinfo, few_sizes,
                                        is_plain_inference, linear, packed_pieces, uses_onednn)

ONEDNN = torch.backends.mkldnn.is_available()


def weights(out=4, dim=6, grad=False):
    return torch.randn(out, dim, requires_grad=grad), torch.randn(out, requires_grad=grad)


@pytest.mark.parametrize('gelu', [False, True])
@pytest.mark.parametrize('with_bias', [True, False])
@pytest.mark.parametrize('shape', [(7, 6), (1, 6), (2, 5, 6), (2, 3, 4, 6), (0, 6), (3, 0, 6), (130, 6)])
def test_linear_equals_its_equation(shape, with_bias, gelu):
    """x W^T + b, and x P(N(0, 1) <= x) of it."""
    x, (weight, bias) = torch.randn(shape), weights()
    expected = (x[..., None, :] * weight).sum(-1) + (bias if with_bias else 0)
    if gelu:
        expected = expected * torch.distributions.Normal(0, 1).cdf(expected)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            out = linear(x, weight.requires_grad_(grad), bias if with_bias else None, gelu)
        assert out.requires_grad == grad
        torch.testing.assert_close(out.detach(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('shape, view', [
    ((6, 5), lambda x: x.T), ((5, 12), lambda x: x[:, ::2]), ((5, 8), lambda x: x[:, 1:7]), ((2, 6, 5), lambda x: x.mT),
    ((3, 2, 6), lambda x: x.transpose(0, 1)), ((6, ), lambda x: x.expand(5, 6)), ((10, 6), lambda x: x[::2])])
@pytest.mark.parametrize('gelu', [False, True])
@torch.no_grad()
def test_linear_of_strided_tensors(shape, view, gelu):
    """It reads what they hold, and leaves it as it is."""
    x, bias = view(torch.randn(shape)), torch.randn(5)
    before = x.clone()
    for weight in (torch.randn(6, 5).T, torch.randn(10, 12)[::2, 1::2], torch.randn(6).expand(5, 6)):
        expected = F.linear(x.double(), weight.double(), bias.double())
        expected = F.gelu(expected) if gelu else expected
        torch.testing.assert_close(linear(x, weight, bias, gelu), expected.float(), rtol=1e-5, atol=1e-5)
    assert torch.equal(x, before)


@torch.no_grad()
def test_linear_with_a_strided_bias():
    x, (weight, _), bias = torch.randn(5, 6), weights(), torch.randn(8)[::2]
    torch.testing.assert_close(linear(x, weight, bias), x @ weight.T + bias, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_onednn_is_used_in_types_that_it_computes_in():
    x, (weight, _) = torch.randn(3, 6), weights()
    assert uses_onednn(x, weight) == ONEDNN
    for dtype in (torch.double, torch.bfloat16, torch.half):
        native = ONEDNN and dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        assert uses_onednn(x.to(dtype), weight.to(dtype)) == native
        assert not uses_onednn(x, weight.to(dtype)) and not uses_onednn(x.to(dtype), weight)
    assert not uses_onednn(x.to('meta'), weight.to('meta'))
    for dtype in (torch.bfloat16, torch.half):
        with torch.autocast('cpu', dtype):
            assert not uses_onednn(x, weight)
    with torch.backends.mkldnn.flags(enabled=False):
        assert not uses_onednn(x, weight)
    assert uses_onednn(x, weight) == ONEDNN


@pytest.mark.parametrize('needed', ['x', 'weight'])
def test_onednn_is_not_used_for_what_needs_a_gradient(needed):
    x, (weight, _) = torch.randn(3, 6), weights()
    assert uses_onednn(x, weight) == ONEDNN
    dict(x=x, weight=weight)[needed].requires_grad_()
    assert not uses_onednn(x, weight)
    with torch.no_grad():
        assert uses_onednn(x, weight) == ONEDNN
    with torch.inference_mode():
        assert uses_onednn(x, weight) == ONEDNN


@pytest.mark.parametrize('grad, plain', [(False, [True, True, True]), (True, [False, True, False])])
def test_inference_is_plain_where_nothing_is_recorded(grad, plain):
    """Of no tensor: whatever might come."""
    x, y = torch.randn(3), torch.randn(3, requires_grad=True)
    with torch.set_grad_enabled(grad):
        assert [is_plain_inference(), is_plain_inference(x), is_plain_inference(x, y)] == plain


def test_onednn_is_not_in_a_trace():
    """A traced function may be run where there is none, or on other shapes."""
    (weight, bias), used = weights(), []

    def function(x):
        used.append(uses_onednn(x, weight))
        return linear(x, weight, bias, gelu=True)

    with torch.no_grad():
        traced = torch.jit.trace(function, torch.randn(3, 6), check_trace=False)
        x = torch.randn(5, 6)
        torch.testing.assert_close(traced(x), F.gelu(F.linear(x, weight, bias)), rtol=1e-5, atol=1e-6)
    assert used == [False] and 'mkldnn' not in str(traced.graph)


@pytest.mark.parametrize('gelu', [False, True])
@pytest.mark.parametrize('needed', [(0, ), (1, ), (2, ), (0, 1, 2)])
def test_gradients_are_those_of_a_plain_linear_layer(needed, gelu):
    """Also of a bias alone, as where a layer behind the image is frozen but for it."""
    tensors, gradients = [torch.randn(5, 6), *weights()], []
    for index in needed:
        tensors[index].requires_grad_()
    plain = F.linear(*tensors)
    for out in (linear(*tensors, gelu=gelu), F.gelu(plain) if gelu else plain):
        gradients.append(torch.autograd.grad(out.square().sum(), [tensors[index] for index in needed]))
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)


def test_module_is_a_plain_linear_layer():
    """Its weights have the same names, and hooks and initialisation take it for what it is."""
    plain, ours = nn.Linear(6, 4), Linear(6, 4)
    assert isinstance(ours, nn.Linear)
    ours.load_state_dict(plain.state_dict())
    x = torch.randn(2, 5, 6)
    assert torch.equal(ours(x), plain(x))
    with torch.no_grad():
        torch.testing.assert_close(ours(x), plain(x), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(ours(x, gelu=True), F.gelu(plain(x)), rtol=1e-5, atol=1e-6)
    assert set(Linear(6, 4, bias=False).state_dict()) == {'weight'}


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.half])
@pytest.mark.parametrize('grad', [False, True])
def test_autocast_is_that_of_a_plain_linear_layer(dtype, grad):
    layer, x = Linear(6, 4), torch.randn(5, 6)
    with torch.set_grad_enabled(grad), torch.autocast('cpu', dtype):
        out, expected = layer(x, gelu=True), F.gelu(F.linear(x, layer.weight, layer.bias))
    assert out.dtype == expected.dtype == dtype and torch.equal(out, expected)


@pytest.mark.parametrize('shape', [(7, 6), (2, 5, 6), (0, 6)])
def test_counted_operations_are_the_same_with_and_without_gradient(shape):
    """Two for each product of two numbers."""
    layer, x, counts = Linear(6, 4), torch.randn(shape), []
    for grad in (True, False):
        with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(grad):
            layer(x, gelu=True)
        counts.append(counter.get_total_flops())
    assert counts == [2 * x.numel() * 4] * 2


def test_few_sizes_are_few():
    """Between two powers of two at most 32, then every 64th."""
    sizes = [few_sizes(rows) for rows in range(100001)]
    assert sizes == sorted(sizes)
    assert all(rows <= size <= rows * 33 / 32 for rows, size in enumerate(sizes))
    assert all(few_sizes(size) == size for size in sizes)
    assert len(set(sizes)) < 100000 / 64 + 6 * 32 + 64
    assert [few_sizes(rows) for rows in (0, 1, 63, 65, 129, 4097)] == [0, 1, 63, 66, 132, 4160]


@pytest.mark.parametrize('count', [1, 3, 10, 64, 70, 1000])
@pytest.mark.parametrize('lengths', [[], [0], [5], [0, 0, 0], [4, 4, 4], [0, 7, 0], [1, 0, 9, 2, 0], [65, 3], [331],
                                     [3, 331, 4, 0, 199], [100, 200, 30, 1, 1, 1], [2] * 50])
def test_pieces_are_whole_images_or_parts_of_one(lengths, count):
    owners = [image for image, length in enumerate(lengths) for _ in range(length)]
    row, seen = 0, []
    for rows, images, of_images in packed_pieces(lengths, count):
        members = list(range(len(lengths)))[images]
        assert rows.start == row and sum(of_images) == rows.stop - rows.start and len(of_images) == len(members)
        assert owners[rows] == [image for image, length in zip(members, of_images) for _ in range(length)]
        assert of_images == [lengths[image] for image in members] or len(members) == 1
        assert rows.stop - rows.start <= few_sizes(count)
        row, seen = rows.stop, seen + members
    assert row == len(owners)
    assert sorted(set(seen)) == list(range(len(lengths))) and seen == sorted(seen)


def test_pieces_by_hand():
    """100 rows of the last image are 2 pieces of 50."""
    assert list(packed_pieces([3, 4, 0, 5, 100], 60)) == [
        (slice(0, 12), slice(0, 4), [3, 4, 0, 5]), (slice(12, 62), slice(4, 5), [50]),
        (slice(62, 112), slice(4, 5), [50])]


@pytest.mark.parametrize('ends', [[7], [3, 7], [0, 3, 3, 7], [1, 2, 7, 7]])
def test_by_pieces_puts_rows_together(ends):
    x = torch.randn(7, 2, 3)
    pieces = [(slice(start, end), factor) for factor, (start, end) in enumerate(zip([0, *ends], ends), start=1)]
    expected = torch.cat([x[rows] * factor for rows, factor in pieces])
    assert torch.equal(by_pieces(lambda rows, factor: x[rows] * factor, iter(pieces), 7), expected)


@pytest.mark.parametrize('ends', [[7], [3, 7], [0, 3, 3, 7]])
def test_pieces_are_added_into_a_tensor(ends):
    into = torch.arange(7.)[:, None].repeat(1, 2)
    pieces = [slice(start, end) for start, end in zip([0, *ends], ends)]
    expected = into + 1
    out = by_pieces(lambda rows: torch.ones(rows.stop - rows.start, 2), [(rows, ) for rows in pieces], 7, into)
    assert out is into
    assert torch.equal(into, expected)


def test_by_pieces_of_no_rows():
    assert by_pieces(lambda rows: torch.zeros(5, 3)[rows], [(slice(0, 0), )], 0).shape == (0, 3)


def test_one_piece_is_not_copied():
    x = torch.randn(7, 3)
    assert by_pieces(lambda rows: x, [(slice(0, 7), )], 7) is x


@pytest.mark.parametrize('shape', [(7, 3), (2, 5, 3), (2, 1, 5, 3), (0, 3), (2, 0, 3)])
@pytest.mark.parametrize('width, most', [(3, 4), (1, 12), (100, 1)])
def test_rows_by_pieces(shape, width, most, monkeypatch):
    """Of at most 12 numbers in inference, all at once where a gradient may be needed."""
    monkeypatch.setattr(linear_module, 'PIECE', max(12, width))
    x, rows = torch.randn(shape), []

    def function(piece):
        rows.append(piece.numel() // 3)
        return piece[..., :2].sin()

    with torch.no_grad():
        assert torch.equal(by_pieces_of_rows(function, x, width), x[..., :2].sin())
    assert max(rows) <= most and sum(rows) == x.numel() // 3
    rows.clear()
    assert torch.equal(by_pieces_of_rows(function, x, width), x[..., :2].sin())
    assert rows == [x.numel() // 3]


@pytest.mark.parametrize('dtypes, in_place', [
    ((torch.float, torch.float), True), ((torch.bfloat16, torch.float), False), ((torch.half, torch.half), True)])
def test_add_into_has_the_wider_type(dtypes, in_place):
    change, x = (torch.randn(4, 3).to(dtype) for dtype in dtypes)
    expected = change + x
    added = add_into(change, x)
    assert torch.equal(added, expected) and added.dtype == expected.dtype
    assert (added is change) == in_place


def test_add_into_has_gradients():
    change, x = (torch.randn(4, 3, dtype=torch.double, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda change, x: add_into(change.sin(), x).square(), (change, x))


def test_cpuinfo_is_of_the_first_processor(tmp_path):
    file = tmp_path / 'cpuinfo'
    file.write_text('processor\t: 0\nmodel name\t: Some: CPU @ 2.0 GHz\n\nmodel name\t: another\nflags\n')
    assert cpuinfo('model name', file) == 'Some: CPU @ 2.0 GHz'
    assert cpuinfo('model', file) == cpuinfo('flags', file) == cpuinfo('model name', tmp_path / 'missing') == ''
