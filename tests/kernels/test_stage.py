"""The compiled stage against plain PyTorch in float64, which the tests of the models compare with loops."""

import copy
import math
import re
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.nn.utils import prune
from torch.utils.flop_counter import FlopCounterMode

from mmdyn.kernels.pieces import run_in_pieces
from mmdyn.kernels.stage import encode_blocks
from mmdyn.models.dge import DynamicGrainedEncoder
from mmdyn.models.layers import Attention
from mmdyn.models.replaceable import Refused, copy_with_strides
from mmdyn.models.stage import run_blocks

SHAPE = (10, 13)
# Kind of attention, channels, heads, hidden channels by channels.
WIDTHS = [
    ('full', 12, 3, 2),
    ('full', 64, 1, 2),
    ('full', 48, 3, 4),
    ('full', 5, 1, 3),
    ('full', 512, 8, 4),
    ('unbiased', 12, 3, 2),
    ('unbiased', 48, 3, 4),
    ('deformable', 5, 1, 3),
    ('deformable', 64, 1, 2),
    ('points', 48, 3, 4),
    ('points', 512, 8, 4),
]
# Images and their maps: fewer cells than a vector has, a whole panel, panels with parts of images, some per thread.
MAPS = [(1, (1, 1)), (1, (4, 4)), (1, (8, 8)), (1, (10, 13)), (4, (2, 7)), (3, (5, 10)), (2, (17, 31)), (1, (30, 50))]
CLOSE = dict(rtol=1e-4, atol=1e-4)


def why_not(stage, tokens, shape=SHAPE):
    """The kernel's reason, or None."""
    result = encode_blocks(stage, copy_with_strides(tokens), shape)
    return result.reason if isinstance(result, Refused) else None


def encode(stage, tokens, shape=SHAPE):
    """What the kernel leaves in a copy of the tokens."""
    tokens = tokens.clone()
    out = encode_blocks(stage, tokens, shape)
    assert out is tokens, out
    return out


def by_double(stage, tokens, shape=SHAPE):
    """Plain PyTorch in float64, rounded in the end; routers choose as they do in float64 or as they are forced to."""
    stage = SimpleNamespace(
        blocks=copy.deepcopy(stage.blocks).double(), dge=copy.deepcopy(stage.dge).double(), num_extra=stage.num_extra
    )
    return run_blocks.plain(stage, tokens.double(), shape).float()


@pytest.fixture
def one(make_block, stage_of):
    """A stage of one block, and tokens of two images."""

    def make(kind='full', **options):
        return stage_of(make_block(kind, **options)), torch.randn(2, math.prod(SHAPE), options.get('dim', 12))

    return make


@pytest.fixture
def one_with_router(one):
    """The same with an encoder that chooses by the image."""

    def make(kind='full', **options):
        stage, tokens = one(kind)
        stage.dge.append(DynamicGrainedEncoder(12, **options).eval())
        nn.init.normal_(stage.dge[0].router.weight, std=5.0)
        return stage, tokens

    return make


@pytest.mark.usefixtures('avx')
class TestValues:
    @pytest.mark.parametrize('images, shape', MAPS)
    @pytest.mark.parametrize('kind, dim, heads, ratio', WIDTHS)
    @torch.no_grad()
    def test_block_of_all_tokens(self, kind, dim, heads, ratio, images, shape, make_block, stage_of, threads):
        """Each query attends to its own image, and to what the tokens were before."""
        stage = stage_of(make_block(kind, dim, heads, ratio, residual_scale=0.7, norm_eps=1e-3))
        tokens = torch.randn(images, math.prod(shape), dim)
        torch.testing.assert_close(encode(stage, tokens, shape), by_double(stage, tokens, shape), **CLOSE)

    @pytest.mark.parametrize('kind, num_extra', [('full', 0), ('full', 2), ('reduced', 0), ('deformable', 0)])
    @pytest.mark.parametrize('images', [1, 3])
    @torch.no_grad()
    def test_blocks_one_after_another(self, kind, num_extra, images, make_block, stage_of, threads):
        """All of a stage, and a slice of it."""
        stage = stage_of(*(make_block(kind) for _ in range(3)), num_extra=num_extra)
        tokens = torch.randn(images, num_extra + math.prod(SHAPE), 12)
        torch.testing.assert_close(encode(stage, tokens), by_double(stage, tokens), **CLOSE)
        parts = encode_blocks(stage, encode_blocks(stage, tokens.clone(), SHAPE, stop=1), SHAPE, start=1)
        assert torch.equal(parts, encode(stage, tokens))

    @torch.no_grad()
    def test_blocks_that_stay_dense_beside_others(self, make_block, stage_of):
        encoder = DynamicGrainedEncoder(12).eval()
        nn.init.normal_(encoder.router.weight, std=5.0)
        stage = stage_of(*(make_block('full') for _ in range(3)), dge=[None, encoder, None])
        tokens = torch.randn(1, math.prod(SHAPE), 12)
        out = encode(stage, tokens)
        encoder.forced = encoder.decision.choice[0]
        torch.testing.assert_close(out, by_double(stage, tokens), **CLOSE)

    @pytest.mark.parametrize(
        'kind, num_extra, shape',
        [
            ('full', 0, SHAPE),
            ('full', 2, SHAPE),
            ('deformable', 0, SHAPE),
            ('deformable', 0, (70, 66)),
            ('reduced', 0, (72, 68)),
        ],
    )
    @pytest.mark.parametrize('phis, region', [((1, 2, 4), 4), ((0, 1), 1), ((0, 2, 3), 6)])
    @torch.no_grad()
    def test_dge(self, kind, num_extra, shape, phis, region, make_block, stage_of, threads):
        """In maps whose regions and patches hang over the edges; threads share the routing of the larger ones."""
        encoder = DynamicGrainedEncoder(12, phis, region).eval()
        nn.init.normal_(encoder.router.weight, std=5.0)
        stage = stage_of(make_block(kind), dge=[encoder], num_extra=num_extra)
        tokens = torch.randn(3, num_extra + math.prod(shape), 12)
        out = encode(stage, tokens, shape)
        choice, queries, _ = encoder.decision
        assert choice.unique().tolist() == [*range(len(phis))]
        # But for rounding errors between logits that are nearly alike.
        logits = encoder.router(
            torch.stack(
                [
                    torch.stack(
                        [
                            image[num_extra:]
                            .unflatten(0, shape)[row : row + region, column : column + region]
                            .mean((0, 1))
                            for column in range(0, shape[1], region)
                        ]
                    )
                    for image in tokens
                    for row in range(0, shape[0], region)
                ]
            )
        )
        chosen = logits.gather(-1, choice.flatten(0, 1)[..., None])[..., 0]
        torch.testing.assert_close(chosen, logits.max(-1).values, rtol=1e-4, atol=1e-4)
        for image in range(3):
            encoder.forced = choice[image]
            alone = tokens[image : image + 1]
            torch.testing.assert_close(out[image : image + 1], by_double(stage, alone, shape), **CLOSE)
            assert torch.equal(encode(stage, alone, shape), out[image : image + 1])
            assert torch.equal(encoder.decision.choice, choice[image : image + 1])
            assert encoder.decision.queries.tolist() == [queries[image]]
            run_blocks.plain(stage, alone, shape)
            assert encoder.decision.queries.tolist() == [queries[image]]

    @pytest.mark.parametrize('kind', ['full', 'reduced', 'deformable'])
    @torch.no_grad()
    def test_images_without_queries_stay_as_they_are(self, kind, one, threads):
        stage, tokens = one(kind)
        encoder = DynamicGrainedEncoder(12, (0, 1), 1).eval()
        # Only the second image has tokens whose first channel is great.
        tokens[0, :, 0], tokens[1, :, 0] = -50, 50
        nn.init.zeros_(encoder.router.weight), nn.init.zeros_(encoder.router.bias)
        encoder.router.weight[1, 0] = 1
        expected = torch.stack([tokens[0], by_double(stage, tokens)[1]])
        stage.dge.append(encoder)
        torch.testing.assert_close(encode(stage, tokens), expected, **CLOSE)
        assert encoder.decision.queries.tolist() == [0, math.prod(SHAPE)]
        assert torch.equal(encode(stage, tokens[:1]), tokens[:1]) and encoder.decision.queries.tolist() == [0]

    @pytest.mark.parametrize('kind', ['full', 'reduced', 'deformable'])
    @torch.no_grad()
    def test_finest_granularity_is_the_dense_block_to_the_last_bit(self, kind, one, threads):
        stage, tokens = one(kind)
        dense = encode(stage, tokens)
        stage.dge.append(DynamicGrainedEncoder(12).eval())
        assert torch.equal(encode(stage, tokens), dense) and (stage.dge[0].decision.choice == 0).all()

    @torch.no_grad()
    def test_forced_choice_counts_in_place_of_the_routers(self, one_with_router):
        stage, tokens = one_with_router()
        stage.dge[0].forced = torch.randint(3, (3, 4))
        torch.testing.assert_close(encode(stage, tokens), by_double(stage, tokens), **CLOSE)
        assert all(torch.equal(choice, stage.dge[0].forced) for choice in stage.dge[0].decision.choice)

    @torch.no_grad()
    def test_gelu_is_exact_over_the_whole_range(self, make_block, stage_of):
        """x P(N(0, 1) <= x), where the layer before and the one behind leave all numbers as they are."""
        block, x = make_block('full', 1, 1, 1), torch.linspace(-12, 12, 2001)
        for layer, weight, bias in (
            (block.norm2, 0.0, 0.0),
            (block.attn.proj, 0.0, 0.0),
            (block.ffn.fc1, 0.0, 0.0),
            (block.ffn.fc2, 1.0, 0.0),
        ):
            nn.init.constant_(layer.weight, weight), nn.init.constant_(layer.bias, bias)
        found, stage = [], stage_of(block)
        for value in x.tolist():
            block.ffn.fc1.bias.fill_(value)
            found.append(encode(stage, torch.zeros(1, 1, 1), (1, 1)).item())
        expected = x.double() * torch.distributions.Normal(0, 1).cdf(x.double())
        torch.testing.assert_close(torch.tensor(found), expected.float(), rtol=2e-7, atol=4e-7)

    @pytest.mark.parametrize('scale', [1e-3, 1.0, 30.0, 300.0])
    @torch.no_grad()
    def test_softmax_of_any_scores(self, scale, one):
        """From nearly even shares to one key alone."""
        stage, tokens = one(dim=48)
        stage.blocks[0].attn.q.weight *= scale
        torch.testing.assert_close(encode(stage, tokens), by_double(stage, tokens), rtol=1e-3, atol=1e-3)

    @pytest.mark.parametrize('kind', ['full', 'reduced', 'deformable'])
    @torch.no_grad()
    def test_numbers_that_are_none_stay_in_their_image(self, kind, one):
        stage, tokens = one(kind)
        expected = encode(stage, tokens)
        tokens[0] = math.nan
        out = encode(stage, tokens)
        assert out[0].isnan().all() and torch.equal(out[1], expected[1])

    @torch.no_grad()
    def test_weights_are_read_anew_each_time(self, one):
        """Also those that were exchanged behind autograd's back, as moving averages do it, and in place."""
        stage, tokens = one()
        seen = [encode(stage, tokens)]
        for change in (lambda x: setattr(x, 'data', x.data * 1.5), lambda x: x.mul_(1.5)):
            for parameter in stage.blocks.parameters():
                change(parameter)
            seen.append(encode(stage, tokens))
            torch.testing.assert_close(seen[-1], by_double(stage, tokens), rtol=1e-3, atol=1e-3)
        assert not torch.allclose(seen[0], seen[1]) and not torch.allclose(seen[1], seen[2])

    @pytest.mark.parametrize(
        'owner, name, value',
        [
            ('attn', 'num_heads', 4),
            ('norm1', 'eps', 0.5),
            ('norm2', 'eps', 0.5),
            ('', 'residual_scale', 0.1),
            ('attn.norm', 'eps', 0.5),
        ],
    )
    @torch.no_grad()
    def test_numbers_of_layers_are_read_anew_each_time(self, owner, name, value, one):
        stage, tokens = one('reduced')
        before = encode(stage, tokens)
        setattr(stage.blocks[0].get_submodule(owner), name, value)
        after = encode(stage, tokens)
        assert not torch.allclose(before, after)
        torch.testing.assert_close(after, by_double(stage, tokens), **CLOSE)

    @torch.no_grad()
    def test_granularities_are_read_anew_each_time(self, one_with_router):
        stage, tokens = one_with_router(granularities=(1, 2), region_size=4)
        encode(stage, tokens)
        stage.dge[0].granularities, stage.dge[0].forced = (2, 4), torch.ones(3, 4, dtype=torch.long)
        torch.testing.assert_close(encode(stage, tokens), by_double(stage, tokens), **CLOSE)

    @torch.no_grad()
    def test_threads_do_not_share_memory_nor_decisions(self, one_with_router):
        stage, _ = one_with_router()
        images = torch.randn(20, 1, math.prod(SHAPE), 12)

        @torch.no_grad()
        def run(tokens):
            return encode(stage, tokens), stage.dge[0].decision[:2]

        expected = list(map(run, images))
        with ThreadPoolExecutor(4) as pool:
            for (out, decision), (one, of_one) in zip(pool.map(run, images), expected):
                assert torch.equal(out, one) and all(map(torch.equal, decision[:2], of_one[:2]))

    @torch.no_grad()
    def test_order_of_weights_in_memory_does_not_matter_to_the_result(self, one):
        """The plain way takes what the kernel does not."""
        stage, tokens = one()
        expected = by_double(stage, tokens)
        weight = stage.blocks[0].attn.q.weight
        weight.data = weight.data.mT.contiguous().mT
        assert why_not(stage, tokens) == 'blocks.0.attn.q.weight lies in memory in another order'
        torch.testing.assert_close(run_blocks(stage, tokens.clone(), SHAPE), expected, **CLOSE)


@pytest.mark.parametrize(
    'kind, dim, heads, ratio',
    [('full', 12, 3, 2), ('unbiased', 64, 1, 2), ('points', 48, 3, 4), ('deformable', 6, 1, 3), ('full', 512, 8, 4)],
)
@pytest.mark.parametrize('images, shape', [(1, (3, 3)), (3, (4, 5)), (2, (21, 25))])
@torch.no_grad()
def test_autocast_to_bfloat16(kind, dim, heads, ratio, images, shape, make_block, stage_of, half, threads):
    """Nearer to float64 than plain PyTorch, which rounds more; in the type of the tokens."""
    stage, tokens = stage_of(make_block(kind, dim, heads, ratio)), torch.randn(images, math.prod(shape), dim)
    expected = by_double(stage, tokens, shape)
    with torch.autocast('cpu', torch.bfloat16):
        out, plain = encode(stage, tokens, shape), run_blocks.plain(stage, tokens, shape)
    error, of_plain, of_full = (
        (x - expected).norm() / (expected - tokens).norm() for x in (out, plain, encode(stage, tokens, shape))
    )
    assert out.dtype == torch.float32 and of_full < 1e-5 < 1e-4 < error < 1.05 * of_plain < 0.05


@torch.no_grad()
def test_odd_channels_stay_in_float32_under_autocast(one, half):
    """There are no pairs of them."""
    stage, tokens = one(dim=5, heads=1, ratio=3)
    expected = encode(stage, tokens)
    with torch.autocast('cpu', torch.bfloat16):
        assert torch.equal(encode(stage, tokens), expected)


@torch.no_grad()
def test_autocast_to_bfloat16_without_its_instructions_goes_the_plain_way(one, avx, monkeypatch):
    stage, tokens = one()
    monkeypatch.setattr('mmdyn.kernels.stage.runs', lambda half: Refused('no instructions') if half else None)
    with torch.autocast('cpu', torch.bfloat16):
        assert why_not(stage, tokens) == 'no instructions'
        assert torch.equal(run_blocks(stage, tokens, SHAPE), run_blocks.plain(stage, tokens, SHAPE))
    assert why_not(stage, tokens) is None


LAYERS = [
    '',
    '.norm1',
    '.attn',
    '.attn.q',
    '.attn.kv',
    '.attn.proj',
    '.attn.sr',
    '.attn.norm',
    '.norm2',
    '.ffn',
    '.ffn.fc1',
    '.ffn.act',
    '.ffn.fc2',
]


@pytest.mark.usefixtures('avx')
class TestRefusedLayers:
    """Each change comes after a call that the kernel took, which it remembers."""

    @pytest.mark.parametrize('name', LAYERS)
    @pytest.mark.parametrize('register', ['register_forward_hook', 'register_forward_pre_hook'])
    @torch.no_grad()
    def test_hooks(self, name, register, one):
        (stage, tokens), seen = one('reduced'), []
        assert why_not(stage, tokens) is None
        handle = getattr(stage.blocks.get_submodule(f'0{name}'), register)(lambda *args: seen.append(len(args)))
        assert why_not(stage, tokens) == f'blocks.0{name} has forward hooks'
        torch.testing.assert_close(run_blocks(stage, tokens.clone(), SHAPE), by_double(stage, tokens), **CLOSE)
        assert seen
        handle.remove()
        assert why_not(stage, tokens) is None

    @pytest.mark.parametrize('name', LAYERS)
    @torch.no_grad()
    def test_forward_of_its_own(self, name, one):
        """As some wrappers give it to an instance."""
        (stage, tokens), seen = one('reduced'), []
        assert why_not(stage, tokens) is None
        layer = stage.blocks.get_submodule(f'0{name}')
        forward = layer.forward
        layer.forward = lambda *args: seen.append(args) or forward(*args)
        assert why_not(stage, tokens) == f'blocks.0{name} has a forward function of its own'
        run_blocks(stage, tokens, SHAPE)
        assert seen

    @pytest.mark.parametrize('name', LAYERS)
    @torch.no_grad()
    def test_class_swapped_in_place(self, name, one):
        """As parametrizations do it."""
        stage, tokens = one('reduced')
        assert why_not(stage, tokens) is None
        layer = stage.blocks.get_submodule(f'0{name}')
        layer.__class__ = type('Other', (type(layer),), {})
        assert f'blocks.0{name} is a Other, not a ' in why_not(stage, tokens)

    @pytest.mark.parametrize('name', [name for name in LAYERS if name and name != '.attn'])
    @torch.no_grad()
    def test_replaced_layers(self, name, one):
        """By one with something new behind it, as adapters are."""

        class Twice(nn.Module):
            def __init__(self, layer):
                super().__init__()
                self.layer = layer

            def forward(self, x):
                return 2 * self.layer(x)

        stage, tokens = one('reduced')
        assert why_not(stage, tokens) is None
        before = encode(stage, tokens)
        stage.blocks.set_submodule(f'0{name}', Twice(stage.blocks.get_submodule(f'0{name}')))
        assert f'blocks.0{name} is a Twice, not a ' in why_not(stage, tokens)
        out = run_blocks(stage, tokens.clone(), SHAPE)
        torch.testing.assert_close(out, by_double(stage, tokens), **CLOSE)
        assert not torch.allclose(out, before)

    @torch.no_grad()
    def test_why_not_names_kernel_and_module(self, one):
        stage, tokens = one()
        kernel, before = 'mmdyn.kernels.stage.encode_blocks', tokens.clone()
        assert kernel not in run_blocks.why_not(stage, tokens, SHAPE) and torch.equal(tokens, before)
        stage.blocks[0].attn.q.register_forward_hook(lambda *args: None)
        assert run_blocks.why_not(stage, tokens, SHAPE)[kernel] == 'blocks.0.attn.q has forward hooks'

    @torch.no_grad()
    def test_other_attention(self, one):

        class None_(Attention):
            def forward(self, queries, *args):
                return torch.zeros_like(queries)

        stage, tokens = one()
        assert why_not(stage, tokens) is None
        stage.blocks[0].attn = None_(12, 3)
        assert why_not(stage, tokens) == 'blocks.0.attn is a None_, not a Attention or DeformableAttention'

    @torch.no_grad()
    def test_parametrized_and_pruned_weights(self, one):
        """By torch's own tools."""
        for change in (
            lambda layer: nn.utils.parametrizations.weight_norm(layer),
            lambda layer: prune.l1_unstructured(layer, 'weight', 0.5),
            lambda layer: nn.utils.spectral_norm(layer),
        ):
            stage, tokens = one()
            assert why_not(stage, tokens) is None
            change(stage.blocks[0].ffn.fc1)
            stage.blocks.eval()
            assert why_not(stage, tokens).startswith('blocks.0.ffn.fc1 ')
            torch.testing.assert_close(run_blocks(stage, tokens.clone(), SHAPE), by_double(stage, tokens), **CLOSE)

    @torch.no_grad()
    def test_weight_that_is_no_parameter(self, one):
        stage, tokens = one()
        assert why_not(stage, tokens) is None
        layer = stage.blocks[0].attn.q
        weight = layer.weight.detach().clone()
        del layer.weight
        layer.weight = weight
        assert why_not(stage, tokens) == 'blocks.0.attn.q.weight is not what it was when the layer was made'
        torch.testing.assert_close(
            run_blocks(stage, tokens.clone(), SHAPE), run_blocks.plain(stage, tokens, SHAPE), **CLOSE
        )

    @torch.no_grad()
    def test_number_that_is_a_tensor(self, one):
        """Its value may change without anybody noticing; as a parameter it is not where it was."""
        for scale in (torch.tensor(0.5), nn.Parameter(torch.tensor(0.5))):
            stage, tokens = one()
            assert why_not(stage, tokens) is None
            block = stage.blocks[0]
            del block.residual_scale
            block.residual_scale = scale
            assert 'blocks.0.residual_scale' in why_not(stage, tokens)
            torch.testing.assert_close(run_blocks(stage, tokens.clone(), SHAPE), by_double(stage, tokens), **CLOSE)

    @pytest.mark.parametrize(
        'change, reason',
        [
            (lambda block: block.train(), 'blocks.0 is in training mode'),
            (lambda block: setattr(block.ffn, 'act', nn.GELU('tanh')), 'blocks.0.ffn.act approximates the GELU'),
            (lambda block: setattr(block.ffn, 'act', nn.ReLU()), 'blocks.0.ffn.act is a ReLU, not a GELU'),
            (lambda block: setattr(block.attn, 'num_heads', 5), 'blocks.0.attn has 5 heads for 12 channels'),
            (lambda block: setattr(block.attn, 'num_heads', 0), 'blocks.0.attn has 0 heads for 12 channels'),
            (
                lambda block: setattr(block.attn, 'sr_ratio', 3),
                'blocks.0.attn.sr makes patches of another side than sr_ratio=3',
            ),
            (
                lambda block: setattr(block.attn.sr, 'stride', (1, 1)),
                r'blocks.0.attn.sr has stride=\(1, 1\), which does not make patches',
            ),
            (lambda block: setattr(block.attn.sr, 'padding', (1, 1)), r'blocks.0.attn.sr has padding=\(1, 1\)'),
            (lambda block: setattr(block.attn.sr, 'groups', 2), r'blocks.0.attn.sr has groups=2'),
            (lambda block: setattr(block, 'norm2', nn.LayerNorm(12, bias=False)), 'blocks.0.norm2 has no bias'),
            (
                lambda block: setattr(block, 'norm1', nn.LayerNorm(12, elementwise_affine=False)),
                'blocks.0.norm1 has no weight',
            ),
            (
                lambda block: setattr(block, 'norm2', nn.LayerNorm((10, 12))),
                r'blocks.0.norm2 norms \(10, 12\), not 12 channels',
            ),
            (lambda block: block.double(), 'blocks.0.norm1.weight is float64, not float32'),
        ],
    )
    @torch.no_grad()
    def test_other_layers(self, change, reason, one):
        stage, tokens = one('reduced')
        assert why_not(stage, tokens) is None
        change(stage.blocks[0])
        assert re.match(reason, why_not(stage, tokens))


def prune_heads(block):
    """One of three, with layers that fit: legal in PyTorch."""
    attn = block.attn
    attn.num_heads, attn.q, attn.kv, attn.proj = 2, nn.Linear(12, 8), nn.Linear(12, 16), nn.Linear(8, 12)


def prune_hidden(block):
    for parameter, value in (
        (block.ffn.fc1.weight, block.ffn.fc1.weight[:7]),
        (block.ffn.fc1.bias, block.ffn.fc1.bias[:7]),
        (block.ffn.fc2.weight, block.ffn.fc2.weight[:, :7]),
    ):
        parameter.data = value.detach().clone()


class Wrapped(Tensor):
    """A tensor whose numbers may lie elsewhere, as those of quantised or sharded weights."""


# A row less, one channel alone, float64, a subclass, another device, no strides, gaps.
CHANGES = [
    lambda x: x[:-1].clone(),
    lambda x: x[:1].clone(),
    lambda x: x.double(),
    lambda x: x.as_subclass(Wrapped),
    lambda x: x.to('meta'),
    lambda x: x.to_sparse(),
    lambda x: torch.stack([x, x], -1)[..., 0],
]


@pytest.mark.usefixtures('avx')
class TestRefusedWeights:
    """No address goes to C before what lies behind it was looked at."""

    @pytest.mark.parametrize(
        'change, reason',
        [
            (prune_heads, 'blocks.0.attn.proj.weight has the shape (12, 8), not (12, 12)'),
            (prune_hidden, 'blocks.0.ffn.fc1.weight has the shape (7, 12), not (24, 12)'),
        ],
    )
    @torch.no_grad()
    def test_layers_of_other_shapes_that_fit_are_run(self, change, reason, one):
        stage, tokens = one()
        assert why_not(stage, tokens) is None
        change(stage.blocks[0])
        assert why_not(stage, tokens) == reason
        torch.testing.assert_close(run_blocks(stage, tokens.clone(), SHAPE), by_double(stage, tokens), **CLOSE)

    @torch.no_grad()
    def test_no_hidden_channels(self, one):
        stage, tokens = one(ratio=0)
        assert why_not(stage, tokens) == 'blocks.0.ffn has no hidden channels'
        torch.testing.assert_close(run_blocks(stage, tokens.clone(), SHAPE), by_double(stage, tokens), **CLOSE)

    @pytest.mark.parametrize('kind', ['full', 'deformable', 'reduced'])
    @pytest.mark.parametrize('parameter', ['weight', 'bias'])
    @torch.no_grad()
    def test_any_parameter_of_another_shape_type_or_order(self, kind, parameter, one_with_router):
        stage, tokens = one_with_router(kind)
        modules = {
            **{f'blocks.0.{name}': layer for name, layer in stage.blocks[0].named_modules()},
            'dge.0.router': stage.dge[0].router,
        }
        layers = {name: layer for name, layer in modules.items() if hasattr(layer, parameter)}
        assert len(layers) >= 8
        for name, layer in layers.items():
            kept = layer._parameters[parameter]
            for change in CHANGES:
                assert why_not(stage, tokens) is None
                layer._parameters[parameter] = change(kept.detach())
                reason = why_not(stage, tokens)
                assert reason and reason.startswith(f'{name}.{parameter} '), (name, reason)
                layer._parameters[parameter] = kept

    @pytest.mark.parametrize(
        'name, view, reason',
        [
            ('ffn.fc1.weight', lambda x: x[:, :6], 'has the shape (24, 6), not (24, 12)'),
            ('ffn.fc1.weight', lambda x: x[:12], 'has the shape (12, 12), not (24, 12)'),
            ('ffn.fc1.bias', lambda x: x[:5], 'has the shape (5,), not (24,)'),
            ('norm1.weight', lambda x: x.view(torch.int32), 'is int32, not float32'),
            ('attn.q.weight', lambda x: x.mT, 'lies in memory in another order'),
            ('attn.q.weight', lambda x: x.as_strided((12, 12), (0, 1)), 'lies in memory in another order'),
        ],
    )
    @torch.no_grad()
    def test_data_exchanged_for_a_view_at_the_same_address(self, name, view, reason, one):
        stage, tokens = one()
        stage.blocks.requires_grad_(False)
        assert why_not(stage, tokens) is None
        parameter = stage.blocks[0].get_parameter(name)
        address = parameter.data_ptr()
        parameter.data = view(parameter.data)
        assert parameter.data_ptr() == address and why_not(stage, tokens) == f'blocks.0.{name} {reason}'

    @torch.no_grad()
    def test_weights_whose_memory_was_given_back(self, one):
        """As sharded training does it between two passes."""
        stage, tokens = one()
        assert why_not(stage, tokens) is None
        stage.blocks[0].ffn.fc2.weight.untyped_storage().resize_(0)
        assert why_not(stage, tokens) == 'blocks.0.ffn.fc2.weight is empty'

    @torch.no_grad()
    def test_parameters_that_are_others_for_one_call(self, one):
        """As torch.func.functional_call lends them."""
        stage, tokens = one()
        before, block = encode(stage, tokens), stage.blocks[0]
        others = {name: 2 * parameter for name, parameter in block.named_parameters()}

        class Run(nn.Module):
            def __init__(self):
                super().__init__()
                self.block = block

            def forward(self, x):
                return encode(stage, x)

        found = torch.func.functional_call(Run(), {f'block.{name}': value for name, value in others.items()}, tokens)
        assert torch.equal(encode(stage, tokens), before)
        block.load_state_dict(others)
        torch.testing.assert_close(found, by_double(stage, tokens), **CLOSE)

    @torch.no_grad()
    def test_what_is_illegal_raises_what_torch_raises(self, one):
        stage, tokens = one()
        stage.blocks[0].ffn.fc1.bias = nn.Parameter(torch.zeros(3))
        with pytest.raises(RuntimeError, match='size|shape'):
            run_blocks(stage, tokens, SHAPE)


@pytest.mark.usefixtures('avx')
class TestRefusedRouters:
    @pytest.mark.parametrize(
        'change, reason',
        [
            (lambda encoder: encoder.train(), 'dge.0 is in training mode, or decides by layer'),
            (lambda encoder: setattr(encoder, 'routing', 'layer'), 'dge.0 is in training mode, or decides by layer'),
            (lambda encoder: encoder.register_forward_hook(lambda *args: None), 'dge.0 has forward hooks'),
            (
                lambda encoder: encoder.router.register_forward_hook(lambda *args: None),
                'dge.0.router has forward hooks',
            ),
            (lambda encoder: setattr(encoder, 'router', nn.Linear(12, 3)), 'dge.0.router is a Linear, not a Router'),
            (lambda encoder: setattr(encoder.router, 'bias', None), 'dge.0.router has no bias'),
            (
                lambda encoder: setattr(encoder, 'granularities', (1, 4)),
                'dge.0.router.weight has the shape (3, 12), not (2, 12)',
            ),
        ],
    )
    @torch.no_grad()
    def test_other_encoders(self, change, reason, one_with_router):
        stage, tokens = one_with_router()
        assert why_not(stage, tokens) is None
        change(stage.dge[0])
        assert why_not(stage, tokens) == reason

    @pytest.mark.parametrize(
        'forced',
        [
            torch.zeros(2, 4, dtype=torch.long),
            torch.zeros(2, 3, 4, dtype=torch.long),
            torch.full((3, 4), 3),
            torch.full((3, 4), -1),
            torch.zeros(3, 4),
            torch.zeros(3, 4, dtype=torch.long, device='meta'),
        ],
        ids=str,
    )
    @torch.no_grad()
    def test_forced_choice_that_is_none(self, forced, one_with_router):
        """Of another shape or type, or with indices that the granularities have not."""
        stage, tokens = one_with_router()
        assert why_not(stage, tokens) is None
        stage.dge[0].forced = forced
        assert why_not(stage, tokens) == 'dge.0.forced is no choice of 3 x 4 regions on the CPU'

    @torch.no_grad()
    def test_decisions_are_noted_after_they_were_made(self, make_block, stage_of):
        """Not those of a stage of which a later block is refused."""
        encoders = [DynamicGrainedEncoder(12).eval() for _ in range(2)]
        stage = stage_of(make_block(), make_block(), dge=encoders)
        stage.blocks[1].attn.register_forward_hook(lambda *args: None)
        reason = encode_blocks(stage, torch.randn(2, math.prod(SHAPE), 12), SHAPE)
        assert reason == Refused('blocks.1.attn has forward hooks')
        assert encoders[0].decision is None and encoders[1].decision is None


def under(context):
    """What the kernel says inside of a context, and what it says outside before."""

    def ask(stage, tokens):
        with torch.no_grad():
            assert why_not(stage, tokens) is None
            with context():
                return why_not(stage, tokens)

    return ask


def under_vmap(stage, tokens):
    reasons = []
    with torch.no_grad():
        torch.func.vmap(lambda image: reasons.append(why_not(stage, image[None])) or image)(tokens)
    return reasons[0]


def with_tangent(stage, tokens):
    with torch.no_grad(), forward_ad.dual_level():
        return why_not(stage, forward_ad.make_dual(tokens, torch.ones_like(tokens)))


def with_fake_tokens(stage, tokens):
    """Which are around after their mode has ended."""
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(tokens)
    with torch.no_grad():
        return why_not(stage, fake)


def under_global_hook(stage, tokens):
    handle = nn.modules.module.register_module_forward_hook(lambda *args: None)
    try:
        with torch.no_grad():
            return why_not(stage, tokens)
    finally:
        handle.remove()


@pytest.mark.usefixtures('avx')
class TestRefusedCalls:
    @pytest.mark.parametrize(
        'ask, reason',
        [
            (
                under(torch.enable_grad),
                r'gradients are on: call the model in torch.no_grad\(\) or torch.inference_mode\(\)',
            ),
            (under(lambda: torch.autocast('cpu', torch.float16)), 'autocast to float16 is on'),
            (under(lambda: torch.backends.mkldnn.flags(enabled=False)), 'torch.backends.mkldnn is switched off'),
            (under(lambda: FlopCounterMode(display=False)), 'a mode watches the operators'),
            (under(lambda: FakeTensorMode(allow_non_fake_inputs=True)), 'a mode watches the operators'),
            (under_vmap, 'a transform of functions, such as torch.func.vmap, is on'),
            (with_tangent, 'forward-mode derivatives are on'),
            (with_fake_tokens, 'the tokens is a FakeTensor, whose numbers may lie elsewhere'),
            (under_global_hook, 'there are forward hooks for all modules'),
        ],
    )
    def test_contexts(self, ask, reason, one):
        assert re.match(reason, ask(*one()))

    @pytest.mark.parametrize(
        'change, reason',
        [
            (lambda x: x.double(), 'the tokens is float64, not float32'),
            (lambda x: x.mT.contiguous().mT, 'the tokens is not contiguous'),
            (lambda x: x[:0], 'the tokens is empty'),
            (lambda x: x[:, 1:].contiguous(), '129 tokens are no 0 extra tokens and map of 10 x 13 cells'),
            (lambda x: x.repeat(1, 1, 2), 'the tokens have 24 channels, not 12'),
            (lambda x: x.as_subclass(Wrapped), 'the tokens is a Wrapped, whose numbers may lie elsewhere'),
            (lambda x: x.to('meta'), 'the tokens is on meta'),
        ],
    )
    @torch.no_grad()
    def test_other_tokens(self, change, reason, one):
        stage, tokens = one()
        assert why_not(stage, tokens) is None
        assert why_not(stage, change(tokens)) == reason

    @pytest.mark.parametrize(
        'kind, num_extra, shape, reason',
        [
            ('reduced', 1, SHAPE, 'there are extra tokens, which the kernel does not put beside keys of patches'),
            ('deformable', 1, SHAPE, 'blocks.0.attn takes no extra tokens'),
            ('reduced', 0, (1, 8), 'blocks.0.attn takes no map of 1 x 8 cells'),
        ],
    )
    @torch.no_grad()
    def test_maps_that_attention_does_not_take(self, kind, num_extra, shape, reason, make_block, stage_of):
        stage = stage_of(make_block(kind), num_extra=num_extra)
        assert why_not(stage, torch.randn(2, num_extra + math.prod(shape), 12), shape) == reason

    @torch.no_grad()
    def test_missing_functions(self, missing, one):
        stage, tokens = one()
        assert re.search(missing.reason, why_not(stage, tokens))
        torch.testing.assert_close(run_blocks(stage, tokens.clone(), SHAPE), by_double(stage, tokens), **CLOSE)

    @torch.no_grad()
    def test_no_images(self, one_with_router):
        stage, tokens = one_with_router()
        assert run_blocks(stage, tokens[:0], SHAPE).shape == (0, math.prod(SHAPE), 12)
        assert stage.dge[0].decision.queries.shape == (0,) and stage.dge[0].decision.choice.shape == (0, 3, 4)

    @torch.no_grad()
    def test_defaults_of_torch_do_not_matter(self, one_with_router):
        stage, tokens = one_with_router()
        expected = encode(stage, tokens)
        torch.set_default_dtype(torch.float64)
        try:
            with torch.device('meta'):
                assert torch.equal(encode(stage, tokens), expected)
        finally:
            torch.set_default_dtype(torch.float32)


@torch.no_grad()
def test_transforms_of_functions_have_the_right_values(one):
    """Forward derivatives, and vectorised calls."""
    (stage, _), tokens, direction = one(), torch.randn(2, 2, math.prod(SHAPE), 12), torch.randn(2, math.prod(SHAPE), 12)

    def run(x):
        return run_blocks(stage, x.clone(), SHAPE)

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):  # the fused one has no forward derivative
        with forward_ad.dual_level():
            tangent = forward_ad.unpack_dual(run(forward_ad.make_dual(tokens[0], direction))).tangent
        step, wide = 1e-3, SimpleNamespace(blocks=copy.deepcopy(stage.blocks).double(), dge=[], num_extra=0)
        ends = [run_blocks.plain(wide, tokens[0].double() + sign * step * direction, SHAPE) for sign in (1, -1)]
        torch.testing.assert_close(tangent, ((ends[0] - ends[1]) / (2 * step)).float(), rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(
            torch.func.vmap(run)(tokens), torch.stack(list(map(run, tokens))), rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize('kind, num_extra, dim, heads', [('full', 1, 12, 3), ('full', 2, 64, 1), ('reduced', 0, 48, 3)])
@pytest.mark.parametrize('images, shape', [(1, (1, 1)), (1, (10, 13)), (4, (3, 7)), (3, (5, 10))])
@pytest.mark.parametrize('kernel', ['encode_blocks', 'run_in_pieces'])
@torch.no_grad()
def test_class_attention(kernel, kind, num_extra, dim, heads, images, shape, make_block, stage_of, avx, threads):
    """Of each block, what the first query of each image attends to; as the plain body has it in float64."""
    if kind == 'reduced' and min(shape) < 2:
        shape = (2, 3)
    function = dict(encode_blocks=encode_blocks, run_in_pieces=run_in_pieces)[kernel]
    blocks = [make_block(kind, dim, heads) for _ in range(3)]
    stage, tokens = stage_of(*blocks, num_extra=num_extra), torch.randn(images, num_extra + math.prod(shape), dim)
    double = stage_of(*(copy.deepcopy(block).double() for block in blocks), num_extra=num_extra)
    expected, rows = [], []
    result = run_blocks.plain(double, tokens.double(), shape, 1, class_rows=expected)
    assert function(double, tokens.double(), shape, 1, class_rows=rows) and not rows  # refused: nothing was written
    out = function(stage, tokens.clone(), shape, 1, class_rows=rows)
    torch.testing.assert_close(out, result.float(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(rows, [row.float() for row in expected], rtol=1e-4, atol=1e-5)
    assert len(rows) == 2 and all(torch.allclose(row.sum(1), torch.ones(images)) for row in rows)


@torch.no_grad()
def test_class_attention_of_other_blocks(make_block, stage_of, avx):
    tokens, rows = torch.randn(2, math.prod(SHAPE), 12), []
    for stage in (stage_of(make_block('deformable')), stage_of(make_block(), dge=[DynamicGrainedEncoder(12).eval()])):
        for function in (encode_blocks, run_in_pieces):
            reason = 'blocks.0 has DGE or deformable attention, beside which there is no class attention'
            assert function(stage, tokens, SHAPE, class_rows=rows) == Refused(reason) and not rows
