import copy

import pytest
import torch
import torch.nn.functional as F

from mmdyn.models.layers import Attention, packed_attention
from mmdyn.models.layers import attention as attention_module
from mmdyn.models.layers.attention import attention_by_linear, class_attention, fused_is_slow, varlen_attention
from mmdyn.models.layers.linear import ONEDNN, few_sizes

LENGTHS = [[3, 3, 3], [4, 1, 2], [0, 5, 0], [0, 0, 0]]


def slow_packed_attention(query, key, value, lengths):
    """One image, head and query after the other."""
    expected, first = torch.empty_like(query), 0
    for image, length in enumerate(lengths):
        for row in range(first, first + length):
            for head in range(query.shape[1]):
                weights = (key[image, head] @ query[row, head] / query.shape[2]**0.5).softmax(0)
                expected[row, head] = weights @ value[image, head]
        first += length
    return expected


@pytest.mark.parametrize('lengths', LENGTHS)
def test_packed_attention_equals_one_image_after_the_other(lengths):
    query, (key, value) = torch.randn(sum(lengths), 2, 4), torch.randn(2, 3, 2, 6, 4)
    expected = slow_packed_attention(query, key, value, lengths)
    torch.testing.assert_close(packed_attention(query, key, value, lengths), expected, rtol=1e-5, atol=1e-6)


@pytest.fixture
def by_linear(monkeypatch):
    """Let products be large from 10 scores on. The queries of each call of :func:`attention_by_linear`."""
    calls = []

    def count(query, key, value):
        calls.append(len(query))
        return attention_by_linear(query, key, value)

    monkeypatch.setattr(attention_module, 'LARGE', 10)
    monkeypatch.setattr(attention_module, 'FUSED_IS_SLOW', True)
    monkeypatch.setattr(attention_module, 'attention_by_linear', count)
    return calls


@pytest.mark.parametrize('lengths', LENGTHS)
def test_large_attention_by_products_equals_the_fused(lengths, by_linear):
    """Without a gradient, in float32 and where there is oneDNN; [0, 0, 0] is not large."""
    query, (key, value) = torch.randn(sum(lengths), 2, 4), torch.randn(2, 3, 2, 6, 4)
    expected = slow_packed_attention(query, key, value, lengths)
    with torch.no_grad():
        torch.testing.assert_close(packed_attention(query, key, value, lengths), expected, rtol=1e-5, atol=1e-6)
        assert by_linear == (lengths if torch.backends.mkldnn.is_available() and sum(lengths) else [])
        by_linear.clear()
        with torch.backends.mkldnn.flags(enabled=False):
            torch.testing.assert_close(packed_attention(query, key, value, lengths), expected, rtol=1e-5, atol=1e-6)
        doubled = packed_attention(query.double(), key.double(), value.double(), lengths)
        torch.testing.assert_close(doubled.float(), expected, rtol=1e-5, atol=1e-6)
    assert by_linear == []


@pytest.mark.parametrize('slow', [False, True])
@torch.no_grad()
def test_large_attention_is_fused_where_that_is_fast(slow, by_linear, monkeypatch):
    monkeypatch.setattr(attention_module, 'FUSED_IS_SLOW', slow)
    packed_attention(torch.randn(7, 2, 4), *torch.randn(2, 1, 2, 6, 4), [7])
    assert by_linear == ([7] if slow and torch.backends.mkldnn.is_available() else [])


def test_fused_attention_is_slow_with_avx512_that_is_not_intels():
    assert fused_is_slow('AVX512', 'AuthenticAMD')
    for capability, vendor in (('AVX512', 'GenuineIntel'), ('AVX2', 'AuthenticAMD'), ('DEFAULT', ''), ('AVX512', '')):
        assert not fused_is_slow(capability, vendor)


@pytest.mark.parametrize('lengths', LENGTHS)
@pytest.mark.parametrize('autocast', [True, False])
@torch.no_grad()
def test_large_attention_in_bfloat16_rounds_like_its_inputs(lengths, autocast, by_linear):
    """Its softmax is computed in float32: weights and outputs are rounded once, each to eps / 2."""
    query, (key, value) = torch.randn(sum(lengths), 2, 4).bfloat16(), torch.randn(2, 3, 2, 6, 4).bfloat16()
    expected = slow_packed_attention(query.double(), key.double(), value.double(), lengths)
    with torch.autocast('cpu', torch.bfloat16, enabled=autocast):
        out = packed_attention(query, key, value, lengths)
    assert out.dtype == torch.bfloat16
    assert by_linear == (lengths if torch.bfloat16 in ONEDNN and sum(lengths) else [])
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=8 * torch.finfo(torch.bfloat16).eps)


@pytest.mark.parametrize('lengths', LENGTHS)
@pytest.mark.parametrize('needed', range(3))
def test_large_attention_has_gradients(lengths, needed, by_linear):
    """Of each of the query, the keys and the values, even if nothing else needs one."""
    tensors = [torch.randn(sum(lengths), 2, 4), *torch.randn(2, 3, 2, 6, 4)]
    tensors[needed].requires_grad_()
    gradients = [torch.autograd.grad(function(*tensors, lengths).square().sum() + 0 * tensors[needed].sum(),
                                     tensors[needed])[0] for function in (packed_attention, slow_packed_attention)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('lengths, large', [([1, 1], False), ([2, 2], True), ([1, 2], True), ([1, 0], False)])
@torch.no_grad()
def test_attention_is_large_by_its_longest_image(lengths, large, by_linear):
    packed_attention(torch.randn(sum(lengths), 2, 4), *torch.randn(2, 2, 2, 6, 4), lengths)
    assert bool(by_linear) == (large and torch.backends.mkldnn.is_available())


@pytest.mark.parametrize('num, rows', [(0, 10), (1, 10), (64, 64), (65, 64), (130, 50), (199, 70), (331, 170),
                                       (500, 7)])
@torch.no_grad()
def test_attention_by_linear_in_pieces(num, rows, monkeypatch):
    """163 of 331 queries are the last piece, rounded up to 164: one is computed twice."""
    sizes = []

    def record(x, *args):
        sizes.append(len(x))
        return F.linear(x, *args)

    monkeypatch.setattr(attention_module, 'PIECE', rows * 9)
    monkeypatch.setattr(attention_module, 'linear', record)
    query = torch.randn(num, 4, 2).transpose(1, 2)  # (num, 2, 4) that is not contiguous
    key, value = torch.randn(2, 9, 2, 4).transpose(1, 2)
    expected = F.scaled_dot_product_attention(query.transpose(0, 1), key, value).transpose(0, 1)
    torch.testing.assert_close(attention_by_linear(query, key, value), expected, rtol=1e-5, atol=1e-6)
    assert max(sizes) <= few_sizes(rows)
    if num > rows:
        assert all(few_sizes(size) == size for size in sizes)


@pytest.fixture
def varlen_attn(monkeypatch):
    """A stand-in for the kernel that needs a GPU, which is slow and checks what it is given."""

    def attend(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k):
        assert key.shape == value.shape and key.shape[1:] == query.shape[1:]
        for ends, rows, most in ((cu_seq_q, query, max_q), (cu_seq_k, key, max_k)):
            assert ends.dtype == torch.int32 and ends.device == query.device and ends.is_contiguous()
            assert ends[0] == 0 and ends[-1] == len(rows) and ends.diff().min() >= 0
            assert type(most) is int and ends.diff().max() == most
        assert cu_seq_q.shape == cu_seq_k.shape
        out = torch.empty_like(query)
        pairs = (zip(ends.tolist(), ends.tolist()[1:]) for ends in (cu_seq_q, cu_seq_k))
        for (first, last), (begin, end) in zip(*pairs):
            scores = torch.einsum('qhd,khd->hqk', query[first:last], key[begin:end]) / query.shape[2]**0.5
            out[first:last] = torch.einsum('hqk,khd->qhd', scores.softmax(-1), value[begin:end])
        return out

    monkeypatch.setattr(attention_module, 'varlen_attn', attend)


@pytest.mark.parametrize('lengths', [[4, 1, 2], [0, 5, 0], [3, 3, 3], [0, 1, 7]])
def test_varlen_attention_equals_one_image_after_the_other(lengths, varlen_attn):
    query, (key, value) = torch.randn(sum(lengths), 2, 4), torch.randn(2, 3, 2, 6, 4)
    expected = slow_packed_attention(query, key, value, lengths)
    torch.testing.assert_close(varlen_attention(query, key, value, lengths), expected, rtol=1e-5, atol=1e-6)


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
        results.append([x.double() for x in (out, *torch.autograd.grad(out.sum() + sum(0 * x.sum() for x in leaves),
                                                                       leaves))])
    for found, expected in zip(*results):
        assert (found - expected).norm() <= 4 * torch.finfo(dtype).eps * expected.norm()


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
