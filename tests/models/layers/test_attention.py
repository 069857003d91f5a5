import pytest
import torch

from mmdyn.models.layers import Attention, packed_attention


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


@pytest.mark.parametrize('num_heads, sr_ratio', [(1, 1), (3, 1), (2, 2), (3, 3)])
@pytest.mark.parametrize('shape, num_extra', [((6, 6), 0), ((5, 7), 1), ((3, 4), 2)])
def test_attention_equals_a_slow_one(num_heads, sr_ratio, shape, num_extra, randomise, slow_attention):
    attn = randomise(Attention(12, num_heads, sr_ratio))
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
