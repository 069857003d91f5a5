import copy

import pytest
import torch

from mmdyn.models.layers import Attention, packed_attention
from mmdyn.models.layers.attention import class_attention


@pytest.mark.parametrize('lengths', [[3, 3, 3], [4, 1, 2], [0, 5, 0], [0, 0, 0]])
def test_packed_attention_equals_one_image_after_the_other(lengths):
    query, (key, value) = torch.randn(sum(lengths), 2, 4), torch.randn(2, 3, 2, 6, 4)
    expected, first = torch.empty_like(query), 0
    for image, length in enumerate(lengths):
        for row in range(first, first + length):
            for head in range(2):
                weights = (key[image, head] @ query[row, head] / 2).softmax(0)  # sqrt(4) = 2
                expected[row, head] = weights @ value[image, head]
        first += length
    torch.testing.assert_close(packed_attention(query, key, value, lengths), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('num_heads, sr_ratio, qkv_bias', [(1, 1, True), (3, 1, False), (2, 2, True), (3, 3, False)])
@pytest.mark.parametrize('shape, num_extra', [((6, 6), 0), ((5, 7), 1), ((3, 4), 2)])
def test_attention_equals_a_slow_one(num_heads, sr_ratio, qkv_bias, shape, num_extra, randomise, slow_attention):
    attn = randomise(Attention(12, num_heads, sr_ratio, qkv_bias=qkv_bias))
    tokens = torch.randn(3, num_extra + shape[0] * shape[1], 12)
    queries, lengths = torch.randn(9, 12), [2, 4, 3]
    expected = [slow_attention(attn, q, t, shape, num_extra) for q, t in zip(queries.split(lengths), tokens)]
    packed = attn(queries, tokens, shape, lengths, num_extra)
    torch.testing.assert_close(packed, torch.cat(expected), rtol=1e-5, atol=1e-5)
    dense = attn(queries.unflatten(0, (3, 3)), tokens, shape, None, num_extra)
    torch.testing.assert_close(dense.flatten(0, 1), attn(queries, tokens, shape, [3, 3, 3], num_extra), rtol=0, atol=0)


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
    query, key = attn.q(tokens), attn.kv(tokens)[:, :tokens.shape[1]]
    return torch.stack([(q @ k.T / q.shape[1]**0.5).softmax(-1)
                        for q, k in zip(query.chunk(attn.num_heads, -1), key.chunk(attn.num_heads, -1))])


@pytest.mark.parametrize('qkv_bias', [True, False])
@pytest.mark.parametrize('num_heads', [1, 3, 4])
def test_class_attention_is_a_row_of_the_full_matrix(qkv_bias, num_heads, randomise):
    """The first token's, mean of the heads; it changes nothing else."""
    attn = randomise(Attention(12, num_heads, qkv_bias=qkv_bias), std=0.5).double()
    tokens = torch.randn(3, 8, 12, dtype=torch.double)
    before = attn(tokens, tokens, (1, 7), None, 1)
    assert attn.class_attention is None
    attn.keeps_class_attention = True
    assert torch.equal(attn(tokens, tokens, (1, 7), None, 1), before)
    expected = torch.stack([full_matrices(attn, image)[:, 0].mean(0) for image in tokens])
    assert attn.class_attention.shape == (3, 8) and not attn.class_attention.requires_grad
    torch.testing.assert_close(attn.class_attention, expected.float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(attn.class_attention.sum(1), torch.ones(3))
    attn.keeps_class_attention, attn.class_attention = False, None
    attn(tokens, tokens, (1, 7), None, 1)
    assert attn.class_attention is None


def test_class_attention_of_a_map_of_keys_is_reduced_like_them(randomise):
    attn = randomise(Attention(12, 3, sr_ratio=2), std=0.5)
    attn.keeps_class_attention, tokens = True, torch.randn(2, 1 + 20, 12)
    attn(tokens, tokens, (4, 5), None, 1)
    assert attn.class_attention.shape == (2, 1 + 4)
    torch.testing.assert_close(attn.class_attention.sum(1), torch.ones(2))


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('autocast', [True, False])
def test_class_attention_in_half_precision_is_a_softmax_in_float32(dtype, autocast, randomise):
    """Queries and keys are rounded, weights of attention are not: they sum to 1 over many keys."""
    attn, tokens = randomise(Attention(12, 3), std=0.5), torch.randn(2, 1000, 12)
    expected = torch.stack([full_matrices(attn, image)[:, 0].mean(0) for image in tokens])
    attn.keeps_class_attention = True
    if not autocast:
        attn, tokens = attn.to(dtype), tokens.to(dtype)
    with torch.autocast('cpu', dtype, enabled=autocast), torch.no_grad():
        attn(tokens, tokens, (1, 999), None, 1)
    assert attn.class_attention.dtype == torch.float32
    torch.testing.assert_close(attn.class_attention.sum(1), torch.ones(2), rtol=1e-4, atol=0)
    error = (attn.class_attention - expected).abs().sum(1) / expected.sum(1)
    assert (error < 32 * torch.finfo(dtype).eps).all()


def test_class_attention_of_large_products_stays_finite_in_float16():
    """64 * 40^2 is greater than the largest float16, divided by sqrt(64) it is not, as in fused attention."""
    query, key = torch.full((1, 2, 64), 40., dtype=torch.half), torch.full((1, 2, 5, 64), 40., dtype=torch.half)
    torch.testing.assert_close(class_attention(query, key), torch.full((1, 5), 0.2))


def test_qkv_bias_may_be_left_out():
    """The projection keeps its own; multiply-adds do not count it."""
    with_bias, without = Attention(12, 3), Attention(12, 3, qkv_bias=False)
    names = [{name for name, _ in attn.named_parameters()} for attn in (with_bias, without)]
    assert names[0] - names[1] == {'q.bias', 'kv.bias'} and 'proj.bias' in names[1]
    assert with_bias.macs((5, 7), 1) == without.macs((5, 7), 1)
    tokens = torch.zeros(1, 7, 12)
    torch.testing.assert_close(without(tokens, tokens, (1, 7)), without.proj.bias.expand(1, 7, 12))
