import math

import pytest
import torch

from mmdyn.models.layers import FFN, Attention, EncoderBlock
from mmdyn.models.layers.block import drop_path


@pytest.mark.parametrize('sr_ratio', [1, 2])
@pytest.mark.parametrize('shape, num_extra', [((4, 4), 0), ((5, 7), 1)])
def test_block_equals_a_slow_one(sr_ratio, shape, num_extra, randomise, slow_change):
    block = randomise(EncoderBlock(12, Attention(12, 3, sr_ratio), mlp_ratio=2))
    tokens = torch.randn(3, num_extra + math.prod(shape), 12)
    queries, lengths = torch.randn(7, 12), [2, 0, 5]
    expected = [slow_change(block, q, t, shape, num_extra) for q, t in zip(queries.split(lengths), tokens)]
    packed = block.change(queries, tokens, shape, lengths, num_extra)
    torch.testing.assert_close(packed, torch.cat(expected), rtol=1e-5, atol=1e-5)
    expected = torch.stack([t + slow_change(block, t, t, shape, num_extra) for t in tokens])
    torch.testing.assert_close(block(tokens, shape, num_extra), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('scale', [1, 0.5, 0.1])
def test_residual_scale_is_that_of_both_branches(scale, randomise, slow_attention):
    """The FFN sees the attention branch scaled. Packed and dense."""
    block = randomise(EncoderBlock(12, Attention(12, 3), 2, residual_scale=scale))
    tokens, lengths = torch.randn(3, 7, 12), [7, 7, 7]
    expected = []
    for image in tokens:
        normed = block.norm1(image)
        attended = image + scale * slow_attention(block.attn, normed, normed, (1, 7), 0)
        expected.append(attended + scale * block.ffn(block.norm2(attended)))
    expected = torch.stack(expected)
    torch.testing.assert_close(block(tokens, (1, 7)), expected, rtol=1e-5, atol=1e-5)
    queries = tokens.flatten(0, 1)
    packed = queries + block.change(queries, tokens, (1, 7), lengths)
    torch.testing.assert_close(packed.unflatten(0, (3, 7)), expected, rtol=1e-5, atol=1e-5)


def test_residual_scale_comes_on_top_of_stochastic_depth():
    """Branches that add 1 and 10 are halved, then dropped or doubled."""
    block = EncoderBlock(4, Attention(4, 1), 2, drop_path_rate=0.5, residual_scale=0.5)
    for layer, value in ((block.attn.proj, 1.), (block.ffn.fc2, 10.)):
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.constant_(layer.bias, value)
    tokens = torch.randn(200, 6, 4)
    changes = block.change(tokens, tokens, (2, 3)).reshape(200, -1)
    assert (changes == changes[:, :1]).all() and set(changes[:, 0].tolist()) == {0, 1, 10, 11}
    assert (block.eval().change(tokens, tokens, (2, 3)) == 5.5).all()


@pytest.mark.parametrize('lengths', [None, [3, 0, 1] * 1000])
def test_drop_path_drops_whole_images_and_keeps_the_expectation(lengths):
    """An image stays with probability 0.75 and is then scaled by 4 / 3."""
    x = torch.ones(3000, 2, 3) if lengths is None else torch.ones(4000, 3)
    dropped = drop_path(x, 0.25, lengths)
    images = dropped.unbind() if lengths is None else dropped.split(lengths)
    factors = torch.tensor([image.flatten()[0] for image in images if len(image)])
    for image, factor in zip((image for image in images if len(image)), factors):
        assert (image == factor).all()
    torch.testing.assert_close(factors.unique(), torch.tensor([0., 4 / 3]), rtol=1e-6, atol=0)
    # 4 standard deviations of the mean: each factor has variance p (1 - p) / (1 - p)^2 = 1 / 3.
    assert abs(factors.mean() - 1) < 4 * (1 / 3 / len(factors))**0.5


@pytest.mark.parametrize('lengths', [None, [6, 6, 6, 6]])
def test_both_branches_of_an_image_drop_on_their_own(lengths):
    """Attention adds 1 and the FFN 10 to each token."""
    block = EncoderBlock(4, Attention(4, 1), 2, drop_path_rate=0.5)
    for layer, value in ((block.attn.proj, 1.), (block.ffn.fc2, 10.)):
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.constant_(layer.bias, value)
    tokens = torch.randn(4, 6, 4)
    queries = tokens if lengths is None else tokens.flatten(0, 1)
    changes = torch.cat([block.change(queries, tokens, (2, 3), lengths).reshape(4, -1) for _ in range(20)])
    assert (changes == changes[:, :1]).all()
    assert set(changes[:, 0].tolist()) == {0, 2, 20, 22}
    assert (block.eval().change(queries, tokens, (2, 3), lengths) == 11).all()


def test_ffn_equals_its_equation(randomise):
    """fc2(gelu(fc1(x))) with the exact gelu(x) = x P(N(0, 1) <= x)."""
    ffn, x = randomise(FFN(4, 6)), torch.randn(3, 4)
    hidden = x @ ffn.fc1.weight.T + ffn.fc1.bias
    hidden = hidden * torch.distributions.Normal(0, 1).cdf(hidden)
    torch.testing.assert_close(ffn(x), hidden @ ffn.fc2.weight.T + ffn.fc2.bias, rtol=1e-5, atol=1e-6)


def test_macs_by_hand():
    """The query's FFN is 2 x 12 x 24 = 576 beside the attention of test_attention."""
    assert FFN(12, 24).macs() == 576
    assert EncoderBlock(12, Attention(12, 3), 2).macs((5, 7), 1) == (2 * 144 + 2 * 36 * 12 + 576, 36 * 288)
