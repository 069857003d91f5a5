import math

import pytest
import torch

from mmdyn.models.layers import FFN, Attention, DeformableAttention, EncoderBlock
from mmdyn.models.layers import base as base_module
from mmdyn.models.layers import linear as linear_module
from mmdyn.models.layers.block import drop_path

SHAPE = (5, 7)
ATTENTIONS = dict(full=lambda: Attention(12, 3), reduced=lambda: Attention(12, 3, sr_ratio=2),
                  deformable=lambda: DeformableAttention(12, 3))


@pytest.fixture
def small_pieces(monkeypatch):
    """Let 8 queries go through a block at once, and 3 through its FFN of 24 channels."""
    monkeypatch.setattr(base_module, 'ROWS', 8)
    monkeypatch.setattr(linear_module, 'PIECE', 3 * 24)


@pytest.fixture
def make_block(randomise):
    """A block in evaluation mode, and a list that gets the rows of each call of its attention and its FFN."""

    def make(kind):
        block, rows = randomise(EncoderBlock(12, ATTENTIONS[kind](), 2), std=0.3).eval(), dict(attn=[], ffn=[])
        block.attn.proj.register_forward_pre_hook(lambda _, args: rows['attn'].append(len(args[0])))
        block.ffn.fc2.register_forward_pre_hook(lambda _, args: rows['ffn'].append(len(args[0])))
        return block, rows

    return make


def constant_block(dim=4, num_heads=1, **options):
    """A block whose attention adds 1 to each token, and whose FFN adds 10."""
    block = EncoderBlock(dim, Attention(dim, num_heads), 2, **options)
    for layer, value in ((block.attn.proj, 1.), (block.ffn.fc2, 10.)):
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.constant_(layer.bias, value)
    return block


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
    block = constant_block(drop_path_rate=0.5, residual_scale=0.5)
    tokens = torch.randn(200, 6, 4)
    changes = block.change(tokens, tokens, (2, 3)).reshape(200, -1)
    assert (changes == changes[:, :1]).all() and set(changes[:, 0].tolist()) == {0, 1, 10, 11}
    assert (block.eval().change(tokens, tokens, (2, 3)) == 5.5).all()


def test_drop_path_drops_whole_images_and_keeps_the_expectation():
    """An image stays with probability 0.75 and is then scaled by 4 / 3."""
    lengths = [3, 0, 1] * 1000
    images = drop_path(torch.ones(4000, 3), 0.25, lengths).split(lengths)
    factors = torch.tensor([image.flatten()[0] for image in images if len(image)])
    for image, factor in zip((image for image in images if len(image)), factors):
        assert (image == factor).all()
    torch.testing.assert_close(factors.unique(), torch.tensor([0., 4 / 3]), rtol=1e-6, atol=0)
    # 4 standard deviations of the mean: each factor has variance p (1 - p) / (1 - p)^2 = 1 / 3.
    assert abs(factors.mean() - 1) < 4 * (1 / 3 / len(factors))**0.5


@pytest.mark.parametrize('lengths', [None, [6, 6, 6, 6]])
def test_both_branches_of_an_image_drop_on_their_own(lengths):
    """Attention adds 1 and the FFN 10 to each token."""
    block = constant_block(drop_path_rate=0.5)
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


@pytest.mark.parametrize('kind', ATTENTIONS)
@pytest.mark.parametrize('lengths', [[5, 1, 4], [0, 30, 0], [7, 0, 21], [3, 3, 3], [0, 0, 0]])
def test_inference_by_pieces_changes_nothing_packed(kind, lengths, make_block, small_pieces):
    """Images of up to 8 queries together, and larger ones in parts."""
    block, rows = make_block(kind)
    tokens, queries = torch.randn(3, 35, 12), torch.randn(sum(lengths), 12)
    points = 3 * torch.rand(len(queries), 2) if kind == 'deformable' else None
    at_once = block.change(queries, tokens, SHAPE, lengths, 0, points)
    assert rows['attn'] == rows['ffn'] == [sum(lengths)]
    rows['attn'].clear(), rows['ffn'].clear()
    with torch.no_grad():
        by_pieces = block.change(queries, tokens, SHAPE, lengths, 0, points)
    assert sum(rows['attn']) == sum(rows['ffn']) == len(queries)
    assert max(rows['attn']) <= 8 and max(rows['ffn']) <= 3
    torch.testing.assert_close(by_pieces, at_once.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('kind, num_extra', [('full', 0), ('full', 1), ('reduced', 1), ('deformable', 0)])
def test_inference_by_pieces_changes_nothing_dense(kind, num_extra, make_block, small_pieces):
    """The points of the cells are those of the deformable attention by default."""
    block, rows = make_block(kind)
    tokens = torch.randn(2, num_extra + 35, 12)
    with torch.no_grad():
        by_pieces = block(tokens, SHAPE, num_extra)
    assert len(rows['attn']) == 2 * 5 and len(rows['ffn']) > 20
    rows['attn'].clear()
    torch.testing.assert_close(by_pieces, block(tokens, SHAPE, num_extra).detach(), rtol=1e-5, atol=1e-5)
    assert rows['attn'] == [len(tokens.flatten(0, 1))]


@pytest.mark.parametrize('kind', ATTENTIONS)
@pytest.mark.parametrize('queries', [8, 1000])
@torch.no_grad()
def test_block_in_the_memory_of_the_tokens(kind, queries, make_block, monkeypatch):
    """All of them attend to what the tokens were before."""
    monkeypatch.setattr(base_module, 'ROWS', queries)
    block, _ = make_block(kind)
    tokens = torch.randn(2, 35, 12)
    expected = block(tokens, SHAPE)
    assert block(tokens, SHAPE, inplace=True) is tokens
    torch.testing.assert_close(tokens, expected, rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_class_attention_is_kept_of_whole_images(make_block, monkeypatch):
    """However small the pieces are."""
    block, rows = make_block('full')
    tokens, results = torch.randn(3, 1 + 35, 12), []
    for queries in (1000, 8):
        monkeypatch.setattr(base_module, 'ROWS', queries)
        block.attn.keeps_class_attention, block.attn.class_attention = True, None
        block(tokens, SHAPE, 1)
        results.append(block.attn.class_attention)
    assert rows['attn'] == [3 * 36, 3 * 36]
    assert results[0].shape == (3, 36) and torch.equal(*results)


@pytest.mark.parametrize('kind', ATTENTIONS)
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_pieces_under_autocast_are_those_of_the_whole(kind, dtype, make_block, monkeypatch):
    """Of the same type. A number of rows may round sums otherwise, in a few operations in a row."""
    block, rows = make_block(kind)
    tokens, queries, lengths, results = torch.randn(3, 35, 12), torch.randn(31, 12), [9, 0, 22], []
    for pieces in (False, True):
        if pieces:
            monkeypatch.setattr(base_module, 'ROWS', 8)
            monkeypatch.setattr(linear_module, 'PIECE', 3 * 24)
        points = torch.ones(31, 2) if kind == 'deformable' else None
        with torch.autocast('cpu', dtype):
            results.append([block.change(queries, tokens, SHAPE, lengths, 0, points), block(tokens, SHAPE)])
    assert len(rows['attn']) > 2 + 10
    for whole, by_pieces in zip(*results):
        assert whole.dtype == by_pieces.dtype
        assert (whole.float() - by_pieces.float()).norm() <= torch.finfo(dtype).eps * whole.float().norm()
    assert [out.dtype for out in results[1]] == [dtype, torch.float32]


@torch.no_grad()
def test_training_without_a_gradient_drops_whole_images(small_pieces):
    """Attention adds 1 and the FFN 10 to each token of an image, in whichever piece."""
    block = constant_block(12, 3, drop_path_rate=0.5)
    tokens = torch.randn(100, 21, 12)
    changes = block.change(tokens, tokens, (3, 7)).flatten(1)
    assert (changes == changes[:, :1]).all() and set(changes[:, 0].tolist()) == {0, 2, 20, 22}


@pytest.mark.parametrize('grad', [False, True])
def test_block_of_no_images(grad):
    block = EncoderBlock(12, Attention(12, 3), 2).eval()
    with torch.set_grad_enabled(grad):
        assert block(torch.randn(0, 35, 12), SHAPE).shape == (0, 35, 12)


@pytest.mark.parametrize('shape', [(3, 7, 12), (50, 12), (0, 12), (1, 2, 3, 12)])
def test_ffn_by_pieces_changes_nothing(shape, randomise, small_pieces):
    ffn, x = randomise(FFN(12, 24)), torch.randn(shape)
    with torch.no_grad():
        by_pieces = ffn(x)
    torch.testing.assert_close(by_pieces, ffn(x).detach(), rtol=1e-5, atol=1e-5)
