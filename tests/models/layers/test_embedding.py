import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mmdyn.models.layers import ConvStem, PatchEmbed, Positions, project_patches, to_maps


@pytest.mark.parametrize('norm, options, eps', [(False, {}, None), (True, {}, 1e-5), (True, dict(norm_eps=0.1), 0.1)])
def test_patches_are_projected_one_by_one(norm, options, eps, randomise):
    """What is left at the bottom and on the right of a 9 x 14 map is no patch of 4 x 4."""
    embed, x = randomise(PatchEmbed(2, 5, 4, norm, **options)), torch.randn(3, 2, 9, 14)
    tokens, shape = embed(x)
    assert shape == (2, 3)
    patches = [x[:, :, row : row + 4, column : column + 4].flatten(1) for row in (0, 4) for column in (0, 4, 8)]
    expected = torch.stack([patch @ embed.proj.weight.flatten(1).T + embed.proj.bias for patch in patches], 1)
    if norm:
        expected = (expected - expected.mean(-1, keepdim=True)) / (expected.var(-1, False, keepdim=True) + eps).sqrt()
        expected = expected * embed.norm.weight + embed.norm.bias
    torch.testing.assert_close(tokens, expected, rtol=1e-5, atol=1e-5)
    assert embed.macs(shape) == 2 * 3 * 5 * 2 * 4 * 4
    embedding = torch.randn(1, 6, 5)
    added, shape = embed(x, Positions(embedding, (2, 3), 'bilinear'))
    torch.testing.assert_close(added, embedding + expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('shape', [(8, 12), (9, 14), (11, 5), (4, 4)])
@pytest.mark.parametrize('side', [1, 2, 4])
@pytest.mark.parametrize('kind', ['image', 'tokens', 'crop'])
@pytest.mark.parametrize('of_tokens', [False, True])
def test_projected_patches_are_those_of_a_convolution(of_tokens, kind, side, shape):
    """Of images, of tokens in the form of maps, and of what is neither, with all gradients; also without them."""
    embed = PatchEmbed(3, 5, side, of_tokens=of_tokens)
    proj, norm, positions = embed.proj, embed.norm, Positions(torch.randn(1, 6, 5), (2, 3), 'bilinear')
    height, width = shape
    maps = dict(
        image=lambda: torch.randn(2, 3, *shape),
        tokens=lambda: torch.randn(2, height * width, 3).mT.unflatten(2, shape),
        crop=lambda: torch.randn(2, 4, height, 2 * width)[:, 1:, :, ::2],
    )[kind]()
    maps.requires_grad_()
    projected = project_patches(maps, proj, norm, positions)
    convolved = F.conv2d(maps, proj.weight, proj.bias, stride=side)
    expected = norm(convolved.flatten(2).mT) + positions.resized(tuple(convolved.shape[2:]))
    leaves, weights = [maps, *proj.parameters(), *norm.parameters()], torch.randn_like(expected)
    results = [[out, *torch.autograd.grad((weights * out).sum(), leaves)] for out in (projected, expected)]
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(project_patches(maps, proj, norm, positions), expected, rtol=1e-4, atol=1e-5)
        bare = project_patches(maps, proj, nn.Identity())
        torch.testing.assert_close(bare, convolved.flatten(2).mT, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('of_tokens', [False, True])
def test_weights_of_patches_are_those_of_a_convolution(of_tokens):
    """Their order in memory is that of what they are multiplied with, whatever is loaded, copied or converted."""
    conv, proj = nn.Conv2d(3, 5, 4, 4), PatchEmbed(3, 5, 4, of_tokens=of_tokens).proj
    proj.load_state_dict(conv.state_dict())
    for layer in (proj, copy.deepcopy(proj).double()):
        assert torch.equal(layer.weight.float(), conv.weight)
        assert layer.weight.is_contiguous(memory_format=torch.channels_last if of_tokens else torch.contiguous_format)


@pytest.mark.parametrize('shape', [(5, 7), (4, 8), (1, 16)])
@pytest.mark.parametrize('grad', [False, True])
def test_maps_hold_the_tokens_row_by_row(grad, shape):
    """Contiguous, also if there is one cell too much in front of the tokens."""
    tokens = torch.randn(2, 1 + shape[0] * shape[1], 3)
    for cells in (tokens[:, 1:], tokens[:, 1:].clone()):
        with torch.set_grad_enabled(grad):
            maps = to_maps(cells, shape)
        assert maps.shape == (2, 3, *shape) and maps.is_contiguous()
        for row in range(shape[0]):
            for column in range(shape[1]):
                assert torch.equal(maps[:, :, row, column], cells[:, row * shape[1] + column])


@pytest.mark.parametrize('height, width', [(3, 16), (16, 3)])
def test_image_must_hold_a_patch(height, width):
    with pytest.raises(ValueError, match=f'An input of {height} x {width} is smaller than one patch of 4 x 4: use'):
        PatchEmbed(2, 5, 4)(torch.randn(1, 2, height, width))


def slow_conv(weight, x, stride):
    """Each output pixel from its own window of a map (C, H, W) with a border of zeros."""
    kernel, (height, width) = weight.shape[2], x.shape[1:]
    padded = torch.zeros(len(x), height + kernel, width + kernel, dtype=x.dtype)
    padded[:, kernel // 2 : kernel // 2 + height, kernel // 2 : kernel // 2 + width] = x
    return torch.stack(
        [
            torch.stack(
                [
                    (weight * padded[:, row : row + kernel, column : column + kernel]).sum((1, 2, 3))
                    for column in range(0, width, stride)
                ],
                -1,
            )
            for row in range(0, height, stride)
        ],
        1,
    )


@pytest.mark.parametrize('training', [False, True])
@pytest.mark.parametrize('patch, size', [(4, (8, 12)), (2, (4, 6)), (4, (9, 14)), (8, (16, 8))])
def test_stem_equals_a_slow_one(training, patch, size, randomise):
    """7 x 7 with stride 2, twice 3 x 3, each with batch norm and ReLU, then patches of half the side."""
    stem = randomise(ConvStem(2, 5, patch, width=3)).double().train(training)
    convs, norms = stem.convs[0::3], stem.convs[1::3]
    assert [tuple(conv.weight.shape) for conv in convs] == [(3, 2, 7, 7), (3, 3, 3, 3), (3, 3, 3, 3)]
    x = torch.randn(2, 2, *size, dtype=torch.double)
    maps = x
    for conv, norm, stride in zip(convs, norms, (2, 1, 1)):
        torch.nn.init.normal_(norm.running_mean)
        torch.nn.init.uniform_(norm.running_var, 0.5, 2)
        maps = torch.stack([slow_conv(conv.weight, image, stride) for image in maps])
        mean, var = norm.running_mean.clone(), norm.running_var.clone()
        if training:
            mean, var = maps.mean((0, 2, 3)), maps.var((0, 2, 3), unbiased=False)
        maps = (maps - mean[:, None, None]) / (var[:, None, None] + 1e-5).sqrt()
        maps = (maps * norm.weight[:, None, None] + norm.bias[:, None, None]).clamp(min=0)
    side, shape = patch // 2, (size[0] // patch, size[1] // patch)
    patches = [
        maps[:, None, :, side * row : side * (row + 1), side * column : side * (column + 1)]
        for row in range(shape[0])
        for column in range(shape[1])
    ]
    expected = torch.stack([(patch * stem.proj.weight).sum((2, 3, 4)) for patch in patches], 1) + stem.proj.bias
    tokens, found = stem(x)
    assert found == shape
    torch.testing.assert_close(tokens, expected, rtol=1e-9, atol=1e-9)


def test_stem_macs_are_what_the_librarys_counter_sees():
    """By hand: the convolutions run on half the side, 64 channels."""
    stem = ConvStem(3, 10)
    with FlopCounterMode(display=False) as counter:
        stem(torch.randn(2, 3, 32, 48))
    by_hand = 16 * 24 * 64 * (3 * 49 + 2 * 64 * 9) + 2 * 3 * 10 * 64 * 64
    assert stem.macs((2, 3)) == by_hand == counter.get_total_flops() / 2 / 2


@pytest.mark.parametrize('side', [32, 33, 38, 39, 40])
def test_stem_has_as_many_patches_as_fit_into_the_image(side):
    assert ConvStem(3, 4, 8, width=2)(torch.randn(1, 3, side, 16))[1] == (side // 8, 2)


@pytest.mark.parametrize('height, width', [(3, 16), (16, 3)])
def test_image_must_hold_a_patch_of_the_stem(height, width):
    with pytest.raises(ValueError, match=f'An input of {height} x {width} is smaller than one patch of 4 x 4: use'):
        ConvStem(2, 5, 4)(torch.randn(1, 2, height, width))


def test_stem_needs_an_even_patch():
    with pytest.raises(ValueError, match='patch_size=7: the stem halves the resolution first, give an even number'):
        ConvStem(3, 5, 7)
