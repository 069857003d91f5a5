"""The compiled encoder against plain PyTorch in float64, which the tests of the layers compare with loops."""
import copy
import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn

from mmdyn.models import native
from mmdyn.models.dge import DynamicGrainedEncoder
from mmdyn.models.dge.grains import Grains
from mmdyn.models.layers import Attention, DeformableAttention, EncoderBlock, Positions
from mmdyn.models.layers.linear import Linear
from mmdyn.models.layers.patches import PatchProjection
from mmdyn.models.native import encoder as compiled

pytestmark = pytest.mark.skipif(native.library() is None or not native.library().runs(),
                                reason='mmdyn was installed without a compiler, or the processor lacks the instructions')
SHAPE = (10, 13)
# Channels, heads, hidden channels by channels.
WIDTHS = [(12, 3, 2), (64, 1, 2), (48, 3, 4), (5, 1, 3), (512, 8, 4)]
# Images and their maps: fewer cells than a vector has, a whole panel, panels with parts of images, some for each thread.
MAPS = [(1, (1, 1)), (1, (4, 4)), (1, (8, 8)), (1, (10, 13)), (4, (2, 7)), (3, (5, 10)), (2, (17, 31)), (1, (30, 50))]


@pytest.fixture(params=[1, 2, 3])
def threads(request):
    """More than one share their work in other ways than one."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def make(kind, dim=12, heads=3, ratio=2, **options):
    """A block, no parameter of which is 0 or 1."""
    attn = dict(full=lambda: Attention(dim, heads), reduced=lambda: Attention(dim, heads, 2),
                unbiased=lambda: Attention(dim, heads, qkv_bias=False), deformable=lambda: DeformableAttention(dim, heads),
                points=lambda: DeformableAttention(dim, heads, 7))[kind]()
    block = EncoderBlock(dim, attn, ratio, **options).eval()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter += (min(dim, 12) / dim)**0.5 * 0.3 * torch.randn_like(parameter)
    return block


def by_double(block, tokens, shape, *args):
    return copy.deepcopy(block).double()(tokens.double(), shape, *args)


@pytest.mark.parametrize('kind', ['full', 'unbiased', 'deformable', 'points'])
@pytest.mark.parametrize('images, shape', MAPS)
@pytest.mark.parametrize('dim, heads, ratio', WIDTHS)
@torch.no_grad()
def test_block_of_all_tokens(kind, images, shape, dim, heads, ratio, threads):
    """Each query attends to its own image, and to what the tokens were before."""
    block, tokens = make(kind, dim, heads, ratio, residual_scale=0.7, norm_eps=1e-3), torch.randn(images, math.prod(shape), dim)
    job, before = block.job(tokens, shape), tokens.clone()
    out = block(tokens, shape)
    torch.testing.assert_close(out, by_double(block, tokens, shape).float(), rtol=1e-4, atol=1e-4)
    assert torch.equal(tokens, before) and block(before, shape, inplace=True) is before and torch.equal(before, out)
    assert compiled.encode([job], tokens) is tokens and torch.equal(tokens, out)
    assert job.queries.tolist() == [math.prod(shape)] * images


@pytest.mark.parametrize('kind, dim, heads, ratio', [('full', 12, 3, 2), ('unbiased', 64, 1, 2), ('points', 48, 3, 4),
                                                     ('deformable', 6, 1, 3), ('full', 512, 8, 4)])
@pytest.mark.parametrize('images, shape', [(1, (3, 3)), (3, (4, 5)), (2, (21, 25))])
@torch.no_grad()
def test_block_under_autocast_to_bfloat16(kind, dim, heads, ratio, images, shape, threads):
    """Nearer to float64 than plain PyTorch, which rounds more; in the type of the tokens."""
    if not compiled._runs(half=True):
        pytest.skip('the processor computes in bfloat16 otherwise, or not at all')
    block, tokens = make(kind, dim, heads, ratio), torch.randn(images, math.prod(shape), dim)
    expected = by_double(block, tokens, shape)
    with torch.autocast('cpu', torch.bfloat16):
        assert block.job(tokens, shape)
        out = block(tokens, shape)
        with torch.backends.mkldnn.flags(enabled=False):
            plain = block(tokens, shape)
    error, of_plain, of_full = ((x - expected).norm() / (expected - tokens).norm()
                                for x in (out, plain, block(tokens, shape)))
    assert out.dtype == torch.float32 and of_full < 1e-5 < 1e-4 < error < 1.05 * of_plain < 0.05


@torch.no_grad()
def test_odd_channels_stay_in_float32_under_autocast():
    """There are no pairs of them."""
    block, tokens = make('full', 5, 1, 3), torch.randn(2, math.prod(SHAPE), 5)
    expected = block(tokens, SHAPE)
    if not compiled._runs(half=True):
        pytest.skip('the processor computes in bfloat16 otherwise, or not at all')
    with torch.autocast('cpu', torch.bfloat16):
        assert block.job(tokens, SHAPE)
        assert torch.equal(block(tokens, SHAPE), expected)


@pytest.mark.parametrize('kind, num_extra', [('full', 0), ('full', 2), ('reduced', 0), ('reduced', 1), ('deformable', 0)])
@pytest.mark.parametrize('batch', [1, 3])
@torch.no_grad()
def test_dense_block(kind, num_extra, batch, threads):
    block, tokens = make(kind), torch.randn(batch, num_extra + math.prod(SHAPE), 12)
    expected = by_double(block, tokens, SHAPE, num_extra).float()
    assert bool(block.job(tokens, SHAPE, num_extra)) == ((kind, num_extra) != ('reduced', 1))
    torch.testing.assert_close(block(tokens, SHAPE, num_extra), expected, rtol=1e-4, atol=1e-4)
    assert block(tokens, SHAPE, num_extra, inplace=True) is tokens
    torch.testing.assert_close(tokens, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('kind, num_extra, shape', [('full', 0, SHAPE), ('full', 2, SHAPE), ('reduced', 1, SHAPE),
                                                    ('deformable', 0, SHAPE), ('deformable', 0, (70, 66)),
                                                    ('reduced', 0, (72, 68))])
@pytest.mark.parametrize('phis, region', [((1, 2, 4), 4), ((0, 1), 1), ((0, 2, 3), 6)])
@torch.no_grad()
def test_patches(kind, num_extra, shape, phis, region, threads):
    """DGE in maps whose regions and patches hang over the edges; test_encoder.py of DGE has the loops of the paper.

    Threads share the routing of the larger maps.
    """
    block, encoder = make(kind), DynamicGrainedEncoder(12, phis, region).eval()
    nn.init.normal_(encoder.router.weight, std=5.)
    tokens = torch.randn(3, num_extra + math.prod(shape), 12)
    changed = encoder(block, tokens, shape, num_extra)
    assert encoder.decision.choice.unique().tolist() == [*range(len(phis))]
    choice, queries, double = *encoder.decision, copy.deepcopy(block).double()
    encoder.router.choose = lambda *args: choice
    expected = encoder(double, tokens.double(), shape, num_extra)
    torch.testing.assert_close(changed, expected.float(), rtol=1e-4, atol=1e-4)
    assert torch.equal(encoder.decision.queries, queries)
    del encoder.router.choose
    job = encoder.job(block, tokens, shape, num_extra)  # which chooses, too
    if (kind, num_extra) != ('reduced', 1):
        torch.testing.assert_close(compiled.encode([job], tokens.clone()), changed)
        assert torch.equal(encoder.decision.choice, choice) and torch.equal(encoder.decision.queries, queries)
    assert encoder(block, tokens, shape, num_extra, inplace=True) is tokens and torch.equal(tokens, changed)


@pytest.mark.parametrize('kind', ['full', 'reduced', 'deformable'])
@torch.no_grad()
def test_images_without_queries_stay_as_they_are(kind, threads):
    """Beside one in which all tokens are queries, and alone."""
    block, tokens = make(kind), torch.randn(3, math.prod(SHAPE), 12)
    for images in ([1], []):
        choice, expected = torch.zeros(3, *SHAPE, dtype=torch.long), tokens.clone()
        choice[images] = 1
        expected[images] = by_double(block, tokens, SHAPE)[images].float()
        job = block.job(tokens, SHAPE, grains=Grains(choice, (0, 1), 1))
        torch.testing.assert_close(compiled.encode([job], tokens.clone()), expected, rtol=1e-4, atol=1e-4)
        assert job.queries.tolist() == [math.prod(SHAPE) * (image in images) for image in range(3)]


@pytest.mark.parametrize('kind', ['full', 'reduced', 'deformable'])
@torch.no_grad()
def test_finest_granularity_is_the_dense_block_to_the_last_bit(kind, threads):
    block, encoder, tokens = make(kind), DynamicGrainedEncoder(12).eval(), torch.randn(2, math.prod(SHAPE), 12)
    assert torch.equal(encoder(block, tokens, SHAPE), block(tokens, SHAPE))
    assert (encoder.decision.choice == 0).all()


@torch.no_grad()
def test_gelu_is_exact_over_the_whole_range():
    """x P(N(0, 1) <= x), where the layer before and the one behind leave all numbers as they are."""
    block, x = make('full', 1, 1, 1), torch.linspace(-12, 12, 4001)[:, None]
    for layer, weight, bias in ((block.norm2, 0., 0.), (block.attn.proj, 0., 0.), (block.ffn.fc1, 0., 0.), (block.ffn.fc2, 1., 0.)):
        nn.init.constant_(layer.weight, weight), nn.init.constant_(layer.bias, bias)
    found = []
    for value in x[:, 0].tolist():
        block.ffn.fc1.bias.fill_(value)
        found.append(block(torch.zeros(1, 1, 1), (1, 1)).item())
    expected = x[:, 0].double() * torch.distributions.Normal(0, 1).cdf(x[:, 0].double())
    torch.testing.assert_close(torch.tensor(found), expected.float(), rtol=2e-7, atol=4e-7)


@pytest.mark.parametrize('scale', [1e-3, 1., 30., 300.])
@torch.no_grad()
def test_softmax_of_any_scores(scale):
    """From nearly even shares to one key alone."""
    block, tokens = make('full', 48, 3), torch.randn(1, math.prod(SHAPE), 48)
    block.attn.q.weight *= scale
    expected = copy.deepcopy(block).double()(tokens.double(), SHAPE).float()
    torch.testing.assert_close(block(tokens, SHAPE), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize('kind', ['full', 'deformable'])
@torch.no_grad()
def test_numbers_that_are_none_stay_in_their_image(kind):
    block, tokens = make(kind), torch.randn(2, math.prod(SHAPE), 12)
    expected = block(tokens, SHAPE)
    tokens[0] = math.nan
    out = block(tokens, SHAPE)
    assert out[0].isnan().all() and torch.equal(out[1], expected[1])


@pytest.mark.parametrize('name', ['', 'norm1', 'attn', 'attn.q', 'attn.proj', 'norm2', 'ffn', 'ffn.fc1', 'ffn.fc2'])
@pytest.mark.parametrize('register', ['register_forward_hook', 'register_forward_pre_hook'])
@torch.no_grad()
def test_layers_that_hooks_look_at_are_run(name, register):
    block, tokens, seen = make('full'), torch.randn(2, math.prod(SHAPE), 12), []
    expected = block(tokens, SHAPE)
    handle = getattr(block.get_submodule(name), register)(lambda *args: seen.append(len(args)))
    assert block.job(tokens, SHAPE) is None
    torch.testing.assert_close(block(tokens, SHAPE), expected, rtol=1e-4, atol=1e-4)
    assert bool(seen) == (name != 'attn')  # which a block calls in two steps
    handle.remove()
    assert block.job(tokens, SHAPE)


class Twice(nn.Module):
    """A layer with something new behind it, as adapters are."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.calls = layer, 0
        self.out_features, self.normalized_shape = getattr(layer, 'out_features', 0), getattr(layer, 'normalized_shape', 0)

    def forward(self, x, **options):
        self.calls += 1
        return 2 * self.layer(x, **options)


@pytest.mark.parametrize('name', ['norm1', 'attn.q', 'attn.kv', 'attn.proj', 'norm2', 'ffn.fc1', 'ffn.fc2'])
@torch.no_grad()
def test_layers_that_were_replaced_are_run(name):
    block, tokens = make('full'), torch.randn(2, math.prod(SHAPE), 12)
    parent, _, child = name.rpartition('.')
    twice = Twice(block.get_submodule(name))
    setattr(block.get_submodule(parent), child, twice)
    expected = copy.deepcopy(block).double()(tokens.double(), SHAPE).float()
    torch.testing.assert_close(block(tokens, SHAPE), expected, rtol=1e-4, atol=1e-4)
    assert twice.calls


class OtherAttention(Attention):
    """Attention that pays no attention."""

    def attend(self, queries, *args):
        return torch.zeros_like(queries)


@torch.no_grad()
def test_what_the_functions_do_not_take():
    block, tokens = make('full'), torch.randn(2, math.prod(SHAPE), 12)
    assert block.job(tokens, SHAPE)
    for others in (tokens.double(), tokens.mT.contiguous().mT, tokens[:0], tokens[:, 1:]):
        assert block.job(others, SHAPE) is None
    choice = torch.zeros(2, 3, 4, dtype=torch.long)
    assert block.job(tokens, SHAPE, grains=Grains(choice, (1, 2), 4))
    assert block.job(tokens, SHAPE, grains=Grains(choice[:, :2], (1, 2), 4)) is None
    assert block.job(tokens, SHAPE, grains=Grains(choice[:1], (1, 2), 4)) is None
    with torch.autocast('cpu', torch.float16):
        assert block.job(tokens, SHAPE) is None
    with torch.backends.mkldnn.flags(enabled=False):
        assert block.job(tokens, SHAPE) is None
    with torch.enable_grad():
        assert block.job(tokens, SHAPE) is None
    assert block.train().job(tokens, SHAPE) is None and block.eval().job(tokens, SHAPE)
    block.attn.keeps_class_attention = True
    assert block.job(tokens, SHAPE) is None
    assert EncoderBlock(12, OtherAttention(12, 3), 2).eval().job(tokens, SHAPE) is None
    for change in (lambda block: block.double(), lambda block: setattr(block, 'norm2', nn.LayerNorm(12, bias=False)),
                   lambda block: setattr(block, 'norm1', nn.LayerNorm(12, elementwise_affine=False)),
                   lambda block: setattr(block.attn.q.weight, 'data', block.attn.q.weight.mT.contiguous().mT)):
        block = make('full')
        change(block)
        assert block.job(tokens, SHAPE) is None


@torch.no_grad()
def test_weights_are_read_anew_each_time():
    """Also those that were exchanged behind autograd's back, as moving averages do it."""
    block, tokens = make('full'), torch.randn(2, math.prod(SHAPE), 12)
    before = block(tokens, SHAPE)
    for parameter in block.parameters():
        parameter.data = parameter.data * 1.5
    after = block(tokens, SHAPE)
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, copy.deepcopy(block).double()(tokens.double(), SHAPE).float(), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_callers_do_not_share_memory():
    block, images = make('full', 64, 1), torch.randn(20, 1, math.prod(SHAPE), 64)
    expected = [block(tokens, SHAPE) for tokens in images]

    def run(tokens):
        with torch.no_grad():
            return block(tokens, SHAPE)

    with ThreadPoolExecutor(4) as pool:
        for out, one in zip(pool.map(run, images), expected):
            assert torch.equal(out, one)


@torch.no_grad()
def test_memory_does_not_follow_the_defaults_of_torch():
    block, tokens = make('full'), torch.randn(2, math.prod(SHAPE), 12)
    expected = block(tokens, SHAPE)
    compiled.release()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device('meta'):
            assert torch.equal(block(tokens, SHAPE), expected)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize('has_before, has_after', [(0, 0), (1, 0), (0, 1), (1, 1)])
@pytest.mark.parametrize('side, channels, shape', [(1, 20, (1, 50)), (2, 16, (10, 13)), (8, 40, (17, 33)), (3, 5, (3, 700))])
@torch.no_grad()
def test_projection_of_patches(side, channels, shape, has_before, has_after, threads):
    """As convolution and norms, of a map whose rest is left out and that is a part of a table."""
    table = torch.randn(2, 3 + math.prod(shape), channels)
    cells, conv = table[:, 3:].unflatten(1, shape), nn.Conv2d(channels, 18, side, side)
    before, after = nn.LayerNorm(channels, 1e-3), nn.LayerNorm(18, 1e-2)
    for norm in (before, after):
        nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    layers = [layer if has else None for layer, has in ((before, has_before), (after, has_after))]
    wide = [layer and copy.deepcopy(layer).double() for layer in layers]
    expected = (wide[0] or nn.Identity())(cells.double()).movedim(3, 1)
    expected = copy.deepcopy(conv).double()(expected).flatten(2).mT
    expected = (wide[1] or nn.Identity())(expected)
    weight = conv.weight.permute(0, 2, 3, 1).contiguous()
    found = compiled.project(cells, weight, conv.bias, *layers)
    torch.testing.assert_close(found, expected.float(), rtol=1e-4, atol=1e-4)
    of_map = shape[0] // side, shape[1] // side
    for source in (of_map, (3, 5), (2 * of_map[0], 1)):
        positions = Positions(torch.randn(1, math.prod(source), 18), source, 'bilinear')
        added = compiled.project(cells, weight, conv.bias, *layers, positions)
        torch.testing.assert_close(added, found + positions.resized(of_map), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('side, shape', [(4, (17, 33)), (16, (50, 40)), (1, (3, 4))])
@torch.no_grad()
def test_projection_of_patches_of_images(side, shape, threads):
    """As a convolution, of a part of an image whose rest is left out."""
    images, conv = torch.randn(2, 4, shape[0] + 2, shape[1] + 5)[:, 1:, 2:, 5:], nn.Conv2d(3, 18, side, side)
    norm = nn.LayerNorm(18)
    for after in (None, norm, nn.Identity()):
        expected = copy.deepcopy(conv).double()(images.double()).flatten(2).mT
        expected = copy.deepcopy(after).double()(expected) if after else expected
        found = compiled.project(images.movedim(1, 3), conv.weight.movedim(1, 3), conv.bias, after=after)
        torch.testing.assert_close(found, expected.float(), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_projections_that_are_left_to_torch():
    cells, conv = torch.randn(1, 6, 8, 16), nn.Conv2d(16, 4, 2, 2)
    weight, norm = conv.weight.permute(0, 2, 3, 1).contiguous(), nn.LayerNorm(16)
    assert compiled.project(cells, weight, conv.bias) is not None
    assert compiled.project(cells, conv.weight.permute(0, 2, 3, 1), conv.bias) is None
    images = cells.movedim(3, 1).contiguous().movedim(1, 3)
    assert compiled.project(images, weight, conv.bias) is None
    assert compiled.project(images, conv.weight.movedim(1, 3), conv.bias, norm) is None
    assert compiled.project(cells[..., ::2], weight[..., ::2].contiguous(), conv.bias) is None
    assert compiled.project(cells.double(), weight, conv.bias) is None
    for mode, embedding in (('bicubic', torch.zeros(1, 6, 4)), ('bilinear', torch.zeros(1, 6, 4).double())):
        assert compiled.project(cells, weight, conv.bias, positions=Positions(embedding, (2, 3), mode)) is None
    norm.register_forward_hook(lambda *args: None)
    assert compiled.project(cells, weight, conv.bias, norm) is None


@torch.no_grad()
def test_patches_of_tokens_and_images_are_projected_by_it(monkeypatch):
    calls, project = [], compiled.project
    monkeypatch.setattr(compiled, 'project', lambda *args, **options: calls.append(1) or project(*args, **options))
    tokens = torch.randn(2, 70, 16).mT.unflatten(2, (7, 10))
    for of_tokens, maps in ((True, tokens), (False, tokens.contiguous())):
        proj = PatchProjection(16, 5, 2, of_tokens)
        expected = copy.deepcopy(proj).double()(maps.double())[0].float()
        torch.testing.assert_close(proj(maps)[0], expected, rtol=1e-4, atol=1e-5)
        assert calls.pop() and not calls


@pytest.mark.parametrize('batch, cells, channels', [(1, 16, 5), (3, 64, 48), (2, 1024, 16), (1, 17, 16), (1, 16, 1)])
@torch.no_grad()
def test_transposed_tokens(batch, cells, channels, threads):
    """Cells that do not fill vectors are left to torch."""
    tokens = torch.randn(batch, cells, channels)
    maps = compiled.transpose_tokens(tokens)
    assert maps is None if cells % 16 else torch.equal(maps, tokens.mT) and maps.is_contiguous()
    assert compiled.transpose_tokens(tokens.double()) is None


def prune_heads(block):
    """One of three, with layers that fit: legal in PyTorch."""
    attn = block.attn
    attn.num_heads, attn.q, attn.kv, attn.proj = 2, Linear(12, 8), Linear(12, 16), Linear(8, 12)


def prune_hidden(block):
    for parameter, value in ((block.ffn.fc1.weight, block.ffn.fc1.weight[:7]), (block.ffn.fc1.bias, block.ffn.fc1.bias[:7]),
                             (block.ffn.fc2.weight, block.ffn.fc2.weight[:, :7])):
        parameter.data = value.detach().clone()


@pytest.mark.parametrize('change', [prune_heads, prune_hidden])
@torch.no_grad()
def test_layers_of_other_shapes_that_fit_are_run(change):
    block, tokens = make('full'), torch.randn(2, math.prod(SHAPE), 12)
    change(block)
    assert block.job(tokens, SHAPE) is None
    torch.testing.assert_close(block(tokens, SHAPE), by_double(block, tokens, SHAPE).float(), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_no_hidden_channels():
    block, tokens = make('full', ratio=0), torch.randn(2, math.prod(SHAPE), 12)
    torch.testing.assert_close(block(tokens, SHAPE), by_double(block, tokens, SHAPE).float(), rtol=1e-4, atol=1e-4)


class Wrapped(Tensor):
    """A tensor whose numbers may lie elsewhere, as those of quantised or sharded weights."""


@pytest.mark.parametrize('kind', ['full', 'deformable', 'reduced'])
@pytest.mark.parametrize('parameter', ['weight', 'bias'])
@torch.no_grad()
def test_weights_of_another_shape_type_or_order_are_not_read(kind, parameter):
    """Of any layer: a row less, one channel alone, float64, a subclass, on another device, or with gaps."""
    tokens, names = torch.randn(2, math.prod(SHAPE), 12), [
        name for name, layer in make(kind).named_modules() if hasattr(layer, parameter)]
    assert len(names) >= 7
    changes = (lambda x: x[:-1].clone(), lambda x: x[:1].clone(), lambda x: x.double(), lambda x: x.as_subclass(Wrapped),
               lambda x: x.to('meta'), lambda x: x.to_sparse(), lambda x: torch.stack([x, x], -1)[..., 0])
    for name in names:
        for change in changes:
            block = make(kind)
            layer = block.get_submodule(name)
            layer._parameters[parameter] = change(getattr(layer, parameter).detach())
            assert block.job(tokens, SHAPE) is None, (name, change(torch.ones(2, 2)).shape)


@torch.no_grad()
def test_routers_and_positions_of_other_shapes_are_not_read():
    block, encoder, tokens = make('full'), DynamicGrainedEncoder(12).eval(), torch.randn(2, math.prod(SHAPE), 12)
    assert encoder.job(block, tokens, SHAPE)
    for name, value in (('weight', torch.zeros(3, 5)), ('weight', torch.zeros(2, 12)), ('bias', torch.zeros(2))):
        encoder = DynamicGrainedEncoder(12).eval()
        setattr(encoder.router, name, nn.Parameter(value))
        assert encoder.job(block, tokens, SHAPE) is None
    cells, conv, norm = torch.randn(1, 6, 8, 16), nn.Conv2d(16, 4, 2, 2), nn.LayerNorm(5)
    weight = conv.weight.permute(0, 2, 3, 1).contiguous()
    for positions in (Positions(torch.zeros(1, 5, 4), (2, 3), 'bilinear'), Positions(torch.zeros(1, 6, 5), (2, 3), 'bilinear')):
        assert compiled.project(cells, weight, conv.bias, positions=positions) is None
    assert compiled.project(cells, weight, conv.bias, norm) is None and compiled.project(cells, weight, conv.bias, None, norm) is None
    assert compiled.project(cells, weight, conv.bias[:3]) is None and compiled.project(cells[..., :8], weight, conv.bias) is None


@pytest.mark.parametrize('channels', [1, 2, 4])
@torch.no_grad()
def test_images_with_other_channels_raise_what_torch_raises(channels):
    """And read nothing behind the weights."""
    proj = PatchProjection(3, 5, 4, of_tokens=False)
    with pytest.raises(RuntimeError, match='could not create a primitive|cannot be multiplied'):
        proj(torch.ones(1, channels, 16, 16))


@torch.no_grad()
def test_transforms_of_functions_see_all_operators():
    """Forward derivatives, and vectorised calls."""
    block, tokens, direction = make('full'), torch.randn(2, 2, math.prod(SHAPE), 12), torch.randn(2, math.prod(SHAPE), 12)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):  # the fused one has no forward derivative
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(tokens[0], direction)
            tangent = torch.autograd.forward_ad.unpack_dual(block(dual, SHAPE)).tangent
        step = 1e-3
        expected = (by_double(block, tokens[0] + step * direction, SHAPE)
                    - by_double(block, tokens[0] - step * direction, SHAPE)) / (2 * step)
        torch.testing.assert_close(tangent, expected.float(), rtol=1e-2, atol=1e-2)
        torch.testing.assert_close(torch.func.vmap(lambda x: block(x, SHAPE))(tokens),
                                   torch.stack([block(x, SHAPE) for x in tokens]), rtol=1e-5, atol=1e-5)
