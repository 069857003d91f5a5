"""The compiled functions beside the stage against their plain bodies in float64."""

import copy
import math
import re

import pytest
import torch
from torch import Tensor, nn

from mmdyn.kernels.functions import choose_by_means, project_panels, sample_points, transpose_tokens
from mmdyn.models.dge.router import Router, choose
from mmdyn.models.dge.routing import grid, pool
from mmdyn.models.layers import PatchEmbed, Positions, deformable_sampling, project_patches, to_maps

# Map, queries of each image, heads, points.
LAYOUTS = [
    ((5, 7), [3, 3], 2, 4),
    ((5, 7), [4, 0, 2], 3, 2),
    ((1, 3), [1, 2], 1, 4),
    ((4, 1), [0, 5, 0], 2, 1),
    ((1, 1), [2], 2, 3),
    ((2, 9), [7], 1, 1),
    ((30, 40), [500, 700], 3, 4),
]
CLOSE = dict(rtol=1e-4, atol=1e-4)


class Wrapped(Tensor):
    """A tensor whose numbers may lie elsewhere."""


def why_not(function, *args):
    """The reason of the function's kernel for CPUs, or None."""
    reasons = {name: reason for name, reason in function.why_not(*args).items() if 'kernels.functions' in name}
    assert len(reasons) <= 1
    return next(iter(reasons.values()), None)


# A call that the kernel takes, for each function; a test changes its first tensor.
CALLS = dict(
    choose=lambda: (choose, [Router(6, (1, 2, 4)), torch.randn(2, 35, 6), (5, 7), 4, 0], 1),
    project=lambda: (project_patches, [torch.randn(2, 3, 8, 9), nn.Conv2d(3, 5, 4, 4), nn.LayerNorm(5)], 0),
    sample=lambda: (
        deformable_sampling,
        [torch.randn(2, 6, 3, 4), torch.rand(5, 3, 2, 2), torch.rand(5, 3, 2), (2, 3), [1, 4]],
        0,
    ),
    maps=lambda: (to_maps, [torch.randn(2, 32, 6), (4, 8)], 0),
)


@pytest.fixture(params=CALLS)
def call(request, avx):
    return CALLS[request.param]()


@pytest.mark.parametrize(
    'change, reason',
    [
        (lambda x: x.double(), 'is float64, not float32'),
        (lambda x: x.as_subclass(Wrapped), 'is a Wrapped, whose numbers may lie elsewhere'),
        (lambda x: x.to('meta'), 'is on meta'),
        (lambda x: x[:0], 'is empty'),
    ],
)
@torch.no_grad()
def test_tensors_that_are_not_read(change, reason, call):
    function, args, index = call
    assert why_not(function, *args) is None
    for place in range(index, 3 if function is deformable_sampling else index + 1):
        args[place] = change(args[place])
    assert re.search(reason, why_not(function, *args))


def test_contexts_in_which_nothing_is_compiled(call):
    function, args, _ = call
    with torch.no_grad():
        assert why_not(function, *args) is None
        with torch.enable_grad():
            assert why_not(function, *args).startswith('gradients are on')
        with torch.backends.mkldnn.flags(enabled=False):
            assert why_not(function, *args) == 'torch.backends.mkldnn is switched off'
        with torch.utils.flop_counter.FlopCounterMode(display=False):
            assert why_not(function, *args).startswith('a mode watches the operators')


@torch.no_grad()
def test_missing_functions(missing, call):
    """Without AVX the choice and sampling still run."""
    function, args, _ = call
    if missing.kind != 'no AVX' or function in (project_patches, to_maps):
        assert re.search(missing.reason, why_not(function, *args))
        assert torch.equal(function(*args), function.plain(*args))


@torch.no_grad()
def test_defaults_of_torch_do_not_matter(call):
    function, args, _ = call
    expected = function(*args)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device('meta'):
            found = function(*args)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found, expected) and found.dtype == expected.dtype and found.device.type == 'cpu'


@torch.no_grad()
def test_no_images(call):
    """As many numbers of each as the plain body has."""
    function, args, index = call
    args[index] = args[index][:0]
    if function is deformable_sampling:
        args[1:3], args[4] = (x[:0] for x in args[1:3]), []
    out = function(*args)
    assert (
        out.shape
        == dict(choose=(0, 2, 2), project_patches=(0, 4, 5), deformable_sampling=(0, 12), to_maps=(0, 6, 4, 8))[
            function.__name__
        ]
    )


@pytest.mark.parametrize('num_extra', [0, 2])
@pytest.mark.parametrize('side, shape', [(1, (5, 7)), (4, (8, 8)), (4, (9, 3)), (8, (1, 17)), (3, (40, 40))])
@pytest.mark.parametrize('channels', [1, 5, 64])
@pytest.mark.parametrize('options', [1, 3])
@torch.no_grad()
def test_choice_is_that_of_the_greatest_logit(side, shape, num_extra, channels, options, compiled):
    tokens, router = torch.randn(3, num_extra + math.prod(shape), channels), Router(channels, range(1, options + 1))
    nn.init.normal_(router.weight), nn.init.normal_(router.bias)
    logits = pool(tokens, shape, side, num_extra) @ router.weight.T + router.bias
    choice = choose_by_means(router, tokens, shape, side, num_extra)
    assert choice.shape == (3, *grid(side, shape)) and choice.dtype == torch.long
    # But for rounding errors between logits that are nearly alike.
    chosen = logits.gather(-1, choice[..., None]).squeeze(-1)
    torch.testing.assert_close(chosen, logits.max(-1).values, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_choice_by_numbers_that_are_none_is_an_option(compiled):
    choice = choose_by_means(Router(2, (1, 2, 4)), torch.full((1, 16, 2), math.nan), (4, 4), 2, 0)
    assert choice.unique().tolist() == [0]


@pytest.mark.parametrize(
    'change, reason',
    [
        (lambda router: router.register_forward_hook(lambda *args: None), 'router has forward hooks'),
        (
            lambda router: setattr(router, 'forward', lambda regions: regions),
            'router has a forward function of its own',
        ),
        (lambda router: setattr(router, '__class__', type('Other', (Router,), {})), 'router is a Other, not a Router'),
        (
            lambda router: setattr(router, 'weight', nn.Parameter(torch.zeros(3, 5))),
            'the tokens have 6 channels, not 5',
        ),
        (lambda router: setattr(router, 'weight', nn.Parameter(torch.zeros(6))), 'router.weight is no matrix'),
        (
            lambda router: setattr(router.weight, 'data', torch.zeros(6, 3).mT),
            'router.weight lies in memory in another order',
        ),
        (
            lambda router: setattr(router, 'bias', nn.Parameter(torch.zeros(2))),
            r'router.bias has the shape \(2,\), not \(3,\)',
        ),
        (lambda router: setattr(router, 'bias', None), 'router has no bias'),
        (lambda router: router.double(), 'router.weight is float64, not float32'),
    ],
)
@torch.no_grad()
def test_routers_that_are_run(change, reason, compiled):
    router, tokens = Router(6, (1, 2, 4)), torch.randn(2, 35, 6)
    assert why_not(choose, router, tokens, (5, 7), 4, 0) is None
    change(router)
    assert re.match(reason, why_not(choose, router, tokens, (5, 7), 4, 0))


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


@pytest.mark.parametrize(
    'kind, index, layer', [('choose', 0, 'router'), ('project', 1, 'proj'), ('project', 2, 'norm')]
)
@pytest.mark.parametrize('parameter', ['weight', 'bias'])
@torch.no_grad()
def test_any_parameter_of_another_shape_type_or_order(kind, index, layer, parameter, avx):
    """No address goes to C before what lies behind it was looked at."""
    function, args, _ = CALLS[kind]()
    kept = args[index]._parameters[parameter]
    for change in CHANGES:
        assert why_not(function, *args) is None
        args[index]._parameters[parameter] = change(kept.detach())
        reason = why_not(function, *args)
        # A router of fewer granularities or channels is one, but for tokens of other channels.
        assert reason and reason.startswith((f'{layer}.{parameter} ', 'tokens of shape', 'router.bias has the shape'))
        args[index]._parameters[parameter] = kept


@torch.no_grad()
def test_tokens_that_do_not_fit_the_map(compiled):
    router, tokens = Router(6, (1, 2)), torch.randn(2, 35, 6)
    for shape, extra in (((5, 6), 0), ((5, 7), 1)):
        assert why_not(choose, router, tokens, shape, 4, extra) == (
            f'35 tokens are no {extra} extra tokens and map of {shape[0]} x {shape[1]} cells'
        )
    assert why_not(choose, router, tokens.mT.contiguous().mT, (5, 7), 4, 0) == 'the tokens is not contiguous'


@pytest.mark.parametrize('has_norm', [False, True])
@pytest.mark.parametrize(
    'side, channels, shape', [(1, 20, (1, 50)), (2, 16, (10, 13)), (8, 40, (17, 33)), (3, 5, (3, 700))]
)
@torch.no_grad()
def test_projection_of_patches_of_tokens(side, channels, shape, has_norm, avx, threads):
    """As convolution and norm, of a map whose rest is left out and that is a part of a table."""
    table = torch.randn(2, 3 + math.prod(shape), channels)
    maps, conv = table[:, 3:].unflatten(1, shape).movedim(3, 1), nn.Conv2d(channels, 18, side, side)
    conv, norm = conv.to(memory_format=torch.channels_last), nn.LayerNorm(18, 1e-2) if has_norm else nn.Identity()
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    expected = project_patches.plain(maps.double(), copy.deepcopy(conv).double(), copy.deepcopy(norm).double())
    found = project_panels(maps, conv, norm)
    torch.testing.assert_close(found, expected.float(), **CLOSE)
    of_map = shape[0] // side, shape[1] // side
    for source in (of_map, (3, 5), (2 * of_map[0], 1)):
        positions = Positions(torch.randn(1, math.prod(source), 18), source, 'bilinear')
        added = project_panels(maps, conv, norm, positions)
        torch.testing.assert_close(added, found + positions.resized(of_map), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('has_norm', [False, True])
@pytest.mark.parametrize('side, shape', [(4, (17, 33)), (16, (50, 40)), (1, (3, 4))])
@torch.no_grad()
def test_projection_of_patches_of_images(side, shape, has_norm, avx, threads):
    """As a convolution, of a part of an image whose rest is left out."""
    images, conv = torch.randn(2, 4, shape[0] + 2, shape[1] + 5)[:, 1:, 2:, 5:], nn.Conv2d(3, 18, side, side)
    norm = nn.LayerNorm(18) if has_norm else nn.Identity()
    expected = project_patches.plain(images.double(), copy.deepcopy(conv).double(), copy.deepcopy(norm).double())
    torch.testing.assert_close(project_panels(images, conv, norm), expected.float(), **CLOSE)


@pytest.mark.parametrize('of_tokens', [False, True])
@torch.no_grad()
def test_patch_embeddings_are_projected_by_it(of_tokens, avx):
    """The layers lie in memory as it reads them."""
    embed, tokens = PatchEmbed(16, 5, 2, of_tokens=of_tokens), torch.randn(2, 70, 16)
    maps = tokens.mT.unflatten(2, (7, 10))
    maps = maps if of_tokens else maps.contiguous()
    positions = Positions(torch.randn(1, 15, 5), (3, 5), 'bilinear')
    assert why_not(project_patches, maps, embed.proj, embed.norm, positions) is None
    torch.testing.assert_close(
        embed(maps, positions)[0], project_patches.plain(maps, embed.proj, embed.norm, positions), **CLOSE
    )


def conv_of_tokens():
    return nn.Conv2d(16, 4, 2, 2).to(memory_format=torch.channels_last)


PROJECTIONS = [
    # Of the maps
    (
        lambda maps, conv, norm: (maps[..., ::2], conv, norm, None),
        'neither the channels of a pixel nor the pixels of a line',
    ),
    (lambda maps, conv, norm: (maps[0], conv, norm, None), 'there are 3 dimensions, not 4'),
    (lambda maps, conv, norm: (maps.contiguous(), conv, norm, None), 'proj.weight lies in memory in another order'),
    (
        lambda maps, conv, norm: (torch.randn(1, 6, 8, 8).permute(0, 3, 1, 2), conv, norm, None),
        'a map of 8 x 6 x 8 holds no patch, or has not 16 channels',
    ),
    (
        lambda maps, conv, norm: (torch.randn(1, 1, 8, 16).permute(0, 3, 1, 2), conv, norm, None),
        'a map of 16 x 1 x 8 holds no patch, or has not 16 channels',
    ),
    # Of the layers
    (
        lambda maps, conv, norm: (maps, nn.Conv2d(16, 4, 2, 2), norm, None),
        'proj.weight lies in memory in another order',
    ),
    (
        lambda maps, conv, norm: (maps, nn.Conv2d(16, 4, 2, 1), norm, None),
        r'proj has stride=\(1, 1\), which does not make',
    ),
    (lambda maps, conv, norm: (maps, nn.Conv2d(16, 4, 2, 2, 1), norm, None), r'proj has padding=\(1, 1\)'),
    (lambda maps, conv, norm: (maps, nn.Conv2d(16, 4, 2, 2, groups=2), norm, None), 'proj has groups=2'),
    (lambda maps, conv, norm: (maps, nn.Conv2d(16, 4, (2, 1), (2, 1)), norm, None), r'proj has kernel_size=\(2, 1\)'),
    (lambda maps, conv, norm: (maps, nn.Sequential(conv), norm, None), 'proj is a Sequential, not a Conv2d'),
    (lambda maps, conv, norm: (maps, conv, nn.LayerNorm(5), None), r'norm norms \(5,\), not 4 channels'),
    (lambda maps, conv, norm: (maps, conv, nn.Dropout(), None), 'norm is a Dropout, not a LayerNorm or Identity'),
    # Of the positions
    (
        lambda maps, conv, norm: (maps, conv, norm, Positions(torch.zeros(1, 6, 4), (2, 3), 'bicubic')),
        "position embeddings are resized by 'bicubic'",
    ),
    (
        lambda maps, conv, norm: (maps, conv, norm, Positions(torch.zeros(1, 6, 4).double(), (2, 3), 'bilinear')),
        'the position embedding is float64, not float32',
    ),
    (
        lambda maps, conv, norm: (maps, conv, norm, Positions(torch.zeros(1, 5, 4), (2, 3), 'bilinear')),
        'the position embedding has another shape than its map',
    ),
    (
        lambda maps, conv, norm: (maps, conv, norm, Positions(torch.zeros(1, 6, 5), (2, 3), 'bilinear')),
        'the position embedding has another shape than its map',
    ),
    (
        lambda maps, conv, norm: (maps, conv, norm, Positions(torch.zeros(1, 4, 6).mT, (2, 3), 'bilinear')),
        'the position embedding is not contiguous',
    ),
]


@pytest.mark.parametrize('change, reason', PROJECTIONS)
@torch.no_grad()
def test_projections_that_are_left_to_torch(change, reason, avx):
    maps, conv, norm = torch.randn(1, 6, 8, 16).movedim(3, 1), conv_of_tokens(), nn.LayerNorm(4)
    assert why_not(project_patches, maps, conv, norm) is None
    assert re.match(reason, why_not(project_patches, *change(maps, conv, norm)))


@pytest.mark.parametrize(
    'change, reason',
    [
        (lambda conv, norm: conv.register_forward_pre_hook(lambda *args: None), 'proj has forward hooks'),
        (lambda conv, norm: norm.register_forward_hook(lambda *args: None), 'norm has forward hooks'),
        (lambda conv, norm: setattr(conv, 'stride', (1, 1)), r'proj has stride=\(1, 1\)'),
        (
            lambda conv, norm: setattr(conv.weight, 'data', conv.weight.data[:3]),
            r'proj.weight has the shape \(3, 16, 2, 2\)',
        ),
        (lambda conv, norm: setattr(conv.weight, 'data', torch.zeros(4)), r'proj.weight has the shape \(4,\)'),
        (
            lambda conv, norm: setattr(conv, 'bias', nn.Parameter(torch.zeros(3))),
            r'proj.bias has the shape \(3,\), not \(4,\)',
        ),
        (lambda conv, norm: setattr(norm, 'bias', None), 'norm has no bias'),
    ],
)
@torch.no_grad()
def test_layers_of_projections_that_changed(change, reason, avx):
    """After a call that the kernel took."""
    maps, conv, norm = torch.randn(1, 6, 8, 16).movedim(3, 1), conv_of_tokens(), nn.LayerNorm(4)
    assert why_not(project_patches, maps, conv, norm) is None
    change(conv, norm)
    assert re.match(reason, why_not(project_patches, maps, conv, norm))


@torch.no_grad()
def test_epsilon_of_the_norm_is_read_anew(avx):
    maps, conv, norm = torch.randn(1, 6, 8, 16).movedim(3, 1), conv_of_tokens(), nn.LayerNorm(4)
    before = project_panels(maps, conv, norm)
    norm.eps = 1.0
    after = project_panels(maps, conv, norm)
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, project_patches.plain(maps, conv, norm), **CLOSE)


@torch.no_grad()
def test_projections_without_bias(avx):
    maps, conv = torch.randn(2, 3, 8, 8), nn.Conv2d(3, 5, 4, 4, bias=False)
    torch.testing.assert_close(
        project_panels(maps, conv, nn.Identity()), project_patches.plain(maps, conv, nn.Identity()), **CLOSE
    )


@pytest.mark.parametrize('channels', [1, 2, 4])
@torch.no_grad()
def test_images_with_other_channels_raise_what_torch_raises(channels):
    """And read nothing behind the weights."""
    embed, images = PatchEmbed(3, 5, 4), torch.ones(1, channels, 16, 16)
    with pytest.raises(RuntimeError, match=f'to have 3 channels, but got {channels} channels'):
        embed(images)


def inputs(shape, lengths, heads, num_points, dim):
    """Values, points inside of the map and up to two cells outside, and weights."""
    value = torch.randn(len(lengths), math.prod(shape), heads, dim)
    points = torch.rand(sum(lengths), heads, num_points, 2) * (torch.tensor([shape[1], shape[0]]) + 3) - 2
    return value, points, torch.randn(sum(lengths), heads, num_points)


@pytest.mark.parametrize('shape, lengths, heads, num_points', LAYOUTS)
@pytest.mark.parametrize('dim', [1, 3, 64])
@torch.no_grad()
def test_sampling(shape, lengths, heads, num_points, dim, compiled, threads):
    arguments = inputs(shape, lengths, heads, num_points, dim)
    expected = deformable_sampling.plain(*(x.double() for x in arguments), shape, lengths)
    sampled = sample_points(*arguments, shape, lengths)
    assert sampled.shape == (sum(lengths), heads * dim)
    torch.testing.assert_close(sampled, expected.float(), rtol=1e-4, atol=1e-5)
    strided = [torch.stack([x, x], -1)[..., 0] for x in arguments]
    assert torch.equal(sample_points(*strided, shape, lengths), sampled)


@pytest.mark.parametrize('x, y', [(math.nan, 0), (0, math.nan), (math.inf, 0), (1, -math.inf)])
@torch.no_grad()
def test_points_that_are_nowhere_have_no_value(x, y, compiled):
    """As in the plain body; other queries have theirs."""
    points = torch.tensor([[x, y], [1, 1]]).view(2, 1, 1, 2)
    for sample in (sample_points, deformable_sampling.plain):
        sampled = sample(torch.ones(1, 6, 1, 5), points, torch.ones(2, 1, 1), (2, 3), [2])
        assert sampled[0].isnan().all() and torch.equal(sampled[1], torch.ones(5))


@pytest.mark.parametrize(
    'change',
    [
        lambda value, points, weights, shape, lengths: (value, points, weights, (3, 3), lengths),
        lambda value, points, weights, shape, lengths: (value, points, weights, shape, [1, 3]),
        lambda value, points, weights, shape, lengths: (value, points, weights, shape, [5]),
        lambda value, points, weights, shape, lengths: (value, points[:4], weights, shape, lengths),
        lambda value, points, weights, shape, lengths: (value, points[:, :2], weights, shape, lengths),
        lambda value, points, weights, shape, lengths: (value, points[..., :1], weights, shape, lengths),
        lambda value, points, weights, shape, lengths: (value, points, weights[:, :, :1], shape, lengths),
        lambda value, points, weights, shape, lengths: (value[:, :, :2], points, weights, shape, lengths),
    ],
)
@torch.no_grad()
def test_samples_that_do_not_fit_are_not_read(change, compiled):
    args = *inputs((2, 3), [1, 4], 3, 2, 4), (2, 3), [1, 4]
    assert why_not(deformable_sampling, *args) is None
    reason = why_not(deformable_sampling, *change(*args))
    assert reason == 'values, points, weights and lengths do not fit each other'


@torch.no_grad()
def test_points_and_weights_of_another_type(compiled):
    value, points, weights = inputs((2, 3), [1, 4], 3, 2, 4)
    assert (
        why_not(deformable_sampling, value, points.double(), weights, (2, 3), [1, 4])
        == 'the points is float64, not float32'
    )
    assert (
        why_not(deformable_sampling, value, points, weights.half(), (2, 3), [1, 4])
        == 'the weights is float16, not float32'
    )


@pytest.mark.parametrize('batch, cells, channels', [(1, 16, 5), (3, 64, 48), (2, 1024, 16), (1, 16, 1)])
@torch.no_grad()
def test_transposed_tokens(batch, cells, channels, avx, threads):
    tokens = torch.randn(batch, cells, channels)
    maps = transpose_tokens(tokens, (cells // 8, 8))
    assert torch.equal(maps, tokens.mT.unflatten(2, (cells // 8, 8))) and maps.is_contiguous()


@pytest.mark.parametrize(
    'cells, shape, reason',
    [
        (17, (1, 17), '17 cells do not fill vectors of 16'),
        (16, (4, 5), '16 tokens are no 0 extra tokens and map of 4 x 5 cells'),
    ],
)
@torch.no_grad()
def test_cells_that_do_not_fill_vectors_are_left_to_torch(cells, shape, reason, avx):
    assert why_not(to_maps, torch.randn(1, cells, 3), shape) == reason
