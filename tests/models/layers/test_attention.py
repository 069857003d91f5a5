import copy

import pytest
import torch
from torch import nn

from mmdyn.models.layers import Attention, packed_attention
from mmdyn.models.layers.attention import class_attention

LENGTHS = [[3, 3, 3], [4, 1, 2], [0, 5, 0], [0, 0, 0]]


def slow_packed_attention(query, key, value, lengths):
    """One image, head and query after the other."""
    expected, first = torch.empty_like(query), 0
    for image, length in enumerate(lengths):
        for row in range(first, first + length):
            for head in range(query.shape[1]):
                weights = (key[image, head] @ query[row, head] / query.shape[2] ** 0.5).softmax(0)
                expected[row, head] = weights @ value[image, head]
        first += length
    return expected


@pytest.mark.parametrize('lengths', LENGTHS)
def test_packed_attention_equals_one_image_after_the_other(lengths):
    query, (key, value) = torch.randn(sum(lengths), 2, 4), torch.randn(2, 3, 2, 6, 4)
    expected = slow_packed_attention(query, key, value, lengths)
    torch.testing.assert_close(packed_attention(query, key, value, lengths), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('lengths', LENGTHS)
@pytest.mark.parametrize('needed', range(3))
def test_packed_attention_has_gradients(lengths, needed):
    """Of each of the query, the keys and the values, even if nothing else needs one."""
    tensors = [torch.randn(sum(lengths), 2, 4), *torch.randn(2, 3, 2, 6, 4)]
    tensors[needed].requires_grad_()
    gradients = [
        torch.autograd.grad(function(*tensors, lengths).square().sum() + 0 * tensors[needed].sum(), tensors[needed])[0]
        for function in (packed_attention, slow_packed_attention)
    ]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('lengths', LENGTHS)
@pytest.mark.parametrize('autocast', [True, False])
def test_packed_attention_in_bfloat16_rounds_like_its_inputs(lengths, autocast):
    """Its softmax is computed in float32: weights and outputs are rounded once, each to eps / 2."""
    query, (key, value) = torch.randn(sum(lengths), 2, 4).bfloat16(), torch.randn(2, 3, 2, 6, 4).bfloat16()
    expected = slow_packed_attention(query.double(), key.double(), value.double(), lengths)
    with torch.autocast('cpu', torch.bfloat16, enabled=autocast):
        out = packed_attention(query, key, value, lengths)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=8 * torch.finfo(torch.bfloat16).eps)


def test_packed_attention_of_no_images():
    assert packed_attention(torch.randn(0, 2, 4), *torch.randn(2, 0, 2, 6, 4), []).shape == (0, 2, 4)


@pytest.mark.cuda
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('lengths', [[40, 1, 23], [0, 50, 0], [30, 30, 30], [0, 0, 0]])
def test_packed_attention_on_a_gpu(lengths, dtype):
    """Values and gradients differ from those of the same numbers in float64 by the rounding of half precision."""
    tensors = [x.to('cuda', dtype) for x in (torch.randn(sum(lengths), 2, 32), *torch.randn(2, 3, 2, 60, 32))]
    results = []
    for function, to in ((packed_attention, dtype), (slow_packed_attention, torch.double)):
        leaves = [x.to(to).requires_grad_() for x in tensors]
        out = function(*leaves, lengths)
        results.append(
            [x.double() for x in (out, *torch.autograd.grad(out.sum() + sum(0 * x.sum() for x in leaves), leaves))]
        )
    for found, expected in zip(*results):
        assert (found - expected).norm() <= 4 * torch.finfo(dtype).eps * expected.norm()


@pytest.mark.parametrize('num_heads, sr_ratio, qkv_bias', [(1, 1, True), (3, 1, False), (2, 2, True), (3, 3, False)])
@pytest.mark.parametrize('shape, num_extra', [((6, 6), 0), ((5, 7), 1), ((3, 4), 2)])
def test_attention_equals_a_slow_one(num_heads, sr_ratio, qkv_bias, shape, num_extra, randomise, slow_attention):
    attn = randomise(Attention(12, num_heads, sr_ratio, qkv_bias=qkv_bias))
    tokens = torch.randn(3, num_extra + shape[0] * shape[1], 12)
    queries, lengths = torch.randn(9, 12), [2, 4, 3]
    expected = [slow_attention(attn, q, t, shape, num_extra) for q, t in zip(queries.split(lengths), tokens)]
    packed = attn(queries, tokens, shape, num_extra, lengths)
    torch.testing.assert_close(packed, torch.cat(expected), rtol=1e-5, atol=1e-5)
    dense = attn(queries.unflatten(0, (3, 3)), tokens, shape, num_extra)
    torch.testing.assert_close(dense.flatten(0, 1), attn(queries, tokens, shape, num_extra, [3, 3, 3]), rtol=0, atol=0)


def test_macs_by_hand():
    """12 channels. 5 x 7 cells and 1 extra token are 36 keys, reduced by 2 they are 2 x 3 and 1."""
    assert Attention(12, 3).macs((5, 7), 1) == (2 * 144 + 2 * 36 * 12, 36 * 288)
    assert Attention(12, 3, sr_ratio=2).macs((5, 7), 1) == (2 * 144 + 2 * 7 * 12, 7 * 288 + 6 * 4 * 144)


def test_heads_must_divide_the_channels():
    with pytest.raises(ValueError, match='12 channels do not divide into 5 heads: choose num_heads that divide 12'):
        Attention(12, 5)


def test_map_must_hold_a_reduction():
    with pytest.raises(ValueError, match='A map of 3 x 9 cells is too small for sr_ratio=4: use a larger image'):
        Attention(12, 3, sr_ratio=4)(torch.randn(1, 27, 12), torch.randn(1, 27, 12), (3, 9))


def full_matrices(attn, tokens):
    """(heads, n, n) softmax matrices of one image, in float64."""
    attn, tokens = copy.deepcopy(attn).double(), tokens.double()
    query, key = attn.q(tokens), attn.kv(tokens)[:, : tokens.shape[1]]
    return torch.stack(
        [
            (q @ k.T / q.shape[1] ** 0.5).softmax(-1)
            for q, k in zip(query.chunk(attn.num_heads, -1), key.chunk(attn.num_heads, -1))
        ]
    )


@pytest.mark.parametrize('qkv_bias', [True, False])
@pytest.mark.parametrize('num_heads', [1, 3, 4])
def test_class_attention_is_a_row_of_the_full_matrix(qkv_bias, num_heads, randomise):
    """The first token's, mean of the heads, of dense queries and of packed ones; it changes nothing else."""
    attn = randomise(Attention(12, num_heads, qkv_bias=qkv_bias), std=0.5).double()
    tokens, rows = torch.randn(3, 8, 12, dtype=torch.double), []
    before = attn(tokens, tokens, (1, 7), 1)
    assert torch.equal(attn(tokens, tokens, (1, 7), 1, class_rows=rows), before)
    packed = torch.cat([tokens[0, :2], tokens[1, :1], tokens[2]])
    attn(packed, tokens, (1, 7), 1, [2, 1, 8], class_rows=rows)
    expected = torch.stack([full_matrices(attn, image)[:, 0].mean(0) for image in tokens])
    assert len(rows) == 2
    for row in rows:
        assert row.shape == (3, 8) and not row.requires_grad
        torch.testing.assert_close(row, expected.float(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(row.sum(1), torch.ones(3))


def test_class_attention_of_no_images():
    attn, tokens, rows = Attention(12, 3), torch.randn(0, 8, 12), []
    assert attn(tokens, tokens, (1, 7), 1, class_rows=rows).shape == (0, 8, 12)
    assert [row.shape for row in rows] == [(0, 8)]


def test_class_attention_of_a_map_of_keys_is_reduced_like_them(randomise):
    attn = randomise(Attention(12, 3, sr_ratio=2), std=0.5)
    tokens, rows = torch.randn(2, 1 + 20, 12), []
    attn(tokens, tokens, (4, 5), 1, class_rows=rows)
    assert [row.shape for row in rows] == [(2, 1 + 4)]
    torch.testing.assert_close(rows[0].sum(1), torch.ones(2))


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('autocast', [True, False])
def test_class_attention_in_half_precision_is_a_softmax_in_float32(dtype, autocast, randomise):
    """Queries and keys are rounded, weights of attention are not: they sum to 1 over many keys."""
    attn, tokens, rows = randomise(Attention(12, 3), std=0.5), torch.randn(2, 1000, 12), []
    expected = torch.stack([full_matrices(attn, image)[:, 0].mean(0) for image in tokens])
    if not autocast:
        attn, tokens = attn.to(dtype), tokens.to(dtype)
    with torch.autocast('cpu', dtype, enabled=autocast), torch.no_grad():
        attn(tokens, tokens, (1, 999), 1, class_rows=rows)
    assert rows[0].dtype == torch.float32
    torch.testing.assert_close(rows[0].sum(1), torch.ones(2), rtol=1e-4, atol=0)
    error = (rows[0] - expected).abs().sum(1) / expected.sum(1)
    assert (error < 32 * torch.finfo(dtype).eps).all()


def test_class_attention_of_large_products_stays_finite_in_float16():
    """64 * 40^2 is greater than the largest float16, divided by sqrt(64) it is not, as in fused attention."""
    query, key = torch.full((1, 2, 64), 40.0, dtype=torch.half), torch.full((1, 2, 5, 64), 40.0, dtype=torch.half)
    torch.testing.assert_close(class_attention(query, key), torch.full((1, 5), 0.2))


def test_qkv_bias_may_be_left_out():
    """The projection keeps its own; multiply-adds do not count it."""
    with_bias, without = Attention(12, 3), Attention(12, 3, qkv_bias=False)
    names = [{name for name, _ in attn.named_parameters()} for attn in (with_bias, without)]
    assert names[0] - names[1] == {'q.bias', 'kv.bias'} and 'proj.bias' in names[1]
    assert with_bias.macs((5, 7), 1) == without.macs((5, 7), 1)
    tokens = torch.zeros(1, 7, 12)
    torch.testing.assert_close(without(tokens, tokens, (1, 7)), without.proj.bias.expand(1, 7, 12))


@pytest.mark.parametrize('norm_eps', [1e-5, 0.1])
def test_epsilon_is_that_of_the_norm_behind_the_reduction(norm_eps):
    """Of a map of one value the norm is 0, and near it values shrink by the epsilon alone."""
    attn = Attention(2, 1, sr_ratio=2, norm_eps=norm_eps)
    nn.init.zeros_(attn.sr.weight)
    attn.sr.bias.data = torch.tensor([0.3, -0.3])
    keys = attn.reduce(torch.randn(1, 16, 2), (4, 4), 0)
    expected = torch.tensor([0.3, -0.3]) / (0.09 + norm_eps) ** 0.5
    torch.testing.assert_close(keys, expected.expand(1, 4, 2), rtol=1e-5, atol=1e-6)
    assert Attention(2, 1, sr_ratio=2).norm.eps == 1e-5
