import math

import pytest
import torch

from mmdyn.models.layers import FFN, Attention, DeformableAttention, EncoderBlock
from mmdyn.models.layers.block import drop_path

SHAPE = (5, 7)
ATTENTIONS = dict(
    full=lambda: Attention(12, 3),
    reduced=lambda: Attention(12, 3, sr_ratio=2),
    deformable=lambda: DeformableAttention(12, 3),
)


def constant_block(dim=4, num_heads=1, **options):
    """A block whose attention adds 1 to each token, and whose FFN adds 10."""
    block = EncoderBlock(dim, Attention(dim, num_heads), 2, **options)
    for layer, value in ((block.attn.proj, 1.0), (block.ffn.fc2, 10.0)):
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.constant_(layer.bias, value)
    return block


@pytest.mark.parametrize('sr_ratio', [1, 2])
@pytest.mark.parametrize('shape, num_extra', [((4, 4), 0), ((5, 7), 1)])
def test_block_equals_a_slow_one(sr_ratio, shape, num_extra, randomise, slow_change):
    """On packed queries, on as many of each image, and on the tokens themselves."""
    block = randomise(EncoderBlock(12, Attention(12, 3, sr_ratio), mlp_ratio=2))
    tokens = torch.randn(3, num_extra + math.prod(shape), 12)
    queries, lengths = torch.randn(7, 12), [2, 0, 5]
    expected = [q + slow_change(block, q, t, shape, num_extra) for q, t in zip(queries.split(lengths), tokens)]
    packed = block(queries, tokens, shape, num_extra, lengths)
    torch.testing.assert_close(packed, torch.cat(expected), rtol=1e-5, atol=1e-5)
    for queries in (torch.randn(3, 4, 12), tokens):
        expected = torch.stack([q + slow_change(block, q, t, shape, num_extra) for q, t in zip(queries, tokens)])
        torch.testing.assert_close(block(queries, tokens, shape, num_extra), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(block(tokens.clone(), tokens, shape, num_extra), expected, rtol=1e-5, atol=1e-5)


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
    torch.testing.assert_close(block(tokens, tokens, (1, 7)), expected, rtol=1e-5, atol=1e-5)
    packed = block(tokens.flatten(0, 1), tokens, (1, 7), lengths=lengths)
    torch.testing.assert_close(packed.unflatten(0, (3, 7)), expected, rtol=1e-5, atol=1e-5)


def test_residual_scale_comes_on_top_of_stochastic_depth():
    """Branches that add 1 and 10 are halved, then dropped or doubled."""
    block = constant_block(drop_path_rate=0.5, residual_scale=0.5)
    tokens = torch.zeros(200, 6, 4)
    changes = block(tokens, tokens, (2, 3)).reshape(200, -1)
    assert (changes == changes[:, :1]).all() and set(changes[:, 0].tolist()) == {0, 1, 10, 11}
    assert (block.eval()(tokens, tokens, (2, 3)) == 5.5).all()


@pytest.mark.parametrize('lengths', [None, [3, 0, 1] * 1000])
def test_drop_path_drops_whole_images_and_keeps_the_expectation(lengths):
    """An image stays with probability 0.75 and is then scaled by 4 / 3."""
    images = (
        drop_path(torch.ones(2000, 2, 3), 0.25)
        if lengths is None
        else drop_path(torch.ones(4000, 3), 0.25, lengths).split(lengths)
    )
    factors = torch.tensor([image.flatten()[0] for image in images if len(image)])
    for image, factor in zip((image for image in images if len(image)), factors):
        assert (image == factor).all()
    torch.testing.assert_close(factors.unique(), torch.tensor([0.0, 4 / 3]), rtol=1e-6, atol=0)
    # 4 standard deviations of the mean: each factor has variance p (1 - p) / (1 - p)^2 = 1 / 3.
    assert abs(factors.mean() - 1) < 4 * (1 / 3 / len(factors)) ** 0.5


@pytest.mark.parametrize('lengths', [None, [6, 6, 6, 6]])
@pytest.mark.parametrize('grad', [False, True])
def test_both_branches_of_an_image_drop_on_their_own(lengths, grad):
    """Attention adds 1 and the FFN 10 to each token."""
    block = constant_block(drop_path_rate=0.5)
    tokens = torch.zeros(4, 6, 4)
    queries = tokens if lengths is None else tokens.flatten(0, 1)
    with torch.set_grad_enabled(grad):
        changes = torch.cat([block(queries, tokens, (2, 3), 0, lengths).reshape(4, -1) for _ in range(20)])
        assert (block.eval()(queries, tokens, (2, 3), 0, lengths) == 11).all()
    assert (changes == changes[:, :1]).all()
    assert set(changes[:, 0].tolist()) == {0, 2, 20, 22}


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


@pytest.mark.parametrize('kind', ATTENTIONS)
@pytest.mark.parametrize('mode', ['train', 'eval'])
@pytest.mark.parametrize('lengths', [None, [9, 0, 22]])
def test_with_cp_recomputes_the_block_and_changes_nothing(lengths, mode, kind):
    """Only where a backward pass may follow."""
    tokens, results, calls = torch.randn(3, 35, 12, requires_grad=True), [], []
    queries = tokens if lengths is None else torch.randn(31, 12, requires_grad=True)
    points = 3 * torch.rand(31, 2) if lengths and kind == 'deformable' else None
    for with_cp in (False, True):
        torch.manual_seed(0)
        block = EncoderBlock(12, ATTENTIONS[kind](), 2, drop_path_rate=0.3, with_cp=with_cp).train(mode == 'train')
        block.ffn.register_forward_pre_hook(lambda *_, with_cp=with_cp: calls.append(with_cp))
        output = block(queries, tokens, SHAPE, 0, lengths, points)
        leaves = [tokens, queries, *block.parameters()]
        results.append([output, *torch.autograd.grad(output.square().sum(), leaves, materialize_grads=True)])
        with torch.no_grad():
            block(queries, tokens, SHAPE, 0, lengths, points)
    torch.testing.assert_close(*results, rtol=0, atol=0)
    assert calls == 2 * [False] + 3 * [True]


@pytest.mark.parametrize('with_cp', [False, True])
def test_options_go_to_the_attention(with_cp):
    block, tokens, rows = EncoderBlock(12, Attention(12, 3), 2, with_cp=with_cp), torch.randn(3, 1 + 35, 12), []
    block(tokens, tokens, SHAPE, 1, class_rows=rows)
    assert [row.shape for row in rows] == [(3, 36)]


@pytest.mark.parametrize('kind', ATTENTIONS)
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_residual_stream_keeps_its_type_under_autocast(kind, dtype):
    """The branches round, each of a few operations in a row to eps / 2 of their results."""
    block, tokens = EncoderBlock(12, ATTENTIONS[kind](), 2), torch.randn(3, 35, 12)
    expected = block(tokens, tokens, SHAPE)
    with torch.autocast('cpu', dtype):
        output = block(tokens, tokens, SHAPE)
    assert output.dtype == torch.float32
    assert 0 < (output - expected).norm() < 4 * torch.finfo(dtype).eps * (expected - tokens).norm()


@pytest.mark.parametrize('kind', ATTENTIONS)
@pytest.mark.parametrize('grad', [False, True])
def test_block_of_no_images(kind, grad):
    block, tokens = EncoderBlock(12, ATTENTIONS[kind](), 2), torch.randn(0, 35, 12)
    points = torch.randn(0, 2) if kind == 'deformable' else None
    with torch.set_grad_enabled(grad):
        assert block(tokens, tokens, SHAPE).shape == (0, 35, 12)
        assert block(torch.randn(0, 12), tokens, SHAPE, 0, [], points).shape == (0, 12)
