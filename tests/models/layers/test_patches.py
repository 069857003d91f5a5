import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mmdyn.models.layers import Positions
from mmdyn.models.layers import patches as patches_module
from mmdyn.models.layers.patches import PatchProjection
from mmdyn.models.native import encoder as compiled


@pytest.mark.parametrize('shape', [(8, 12), (9, 14), (11, 5), (4, 4)])
@pytest.mark.parametrize('side', [1, 2, 4])
@pytest.mark.parametrize('channels', [1, 3])
@pytest.mark.parametrize('of_tokens', [False, True])
@pytest.mark.parametrize('strides_of_tokens', [False, True])
def test_patches_are_those_of_a_convolution(strides_of_tokens, of_tokens, channels, side, shape):
    """Of images and of maps with the strides of tokens, with all gradients. Both leave out the rest."""
    proj, maps = PatchProjection(channels, 5, side, of_tokens), torch.randn(2, channels, *shape)
    if strides_of_tokens:
        maps = maps.flatten(2).mT.contiguous().mT.unflatten(2, shape)
    maps.requires_grad_()
    results, leaves = [], [maps, proj.weight, proj.bias]
    projected, found = proj(maps)
    convolved = F.conv2d(maps, proj.weight, proj.bias, stride=side)
    assert found == tuple(convolved.shape[2:])
    for out in (projected, convolved.flatten(2).mT):
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(proj(maps)[0], projected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('of_tokens', [False, True])
def test_patches_of_a_crop(of_tokens):
    """Neither contiguous nor like tokens."""
    proj, maps = PatchProjection(3, 5, 2, of_tokens), torch.randn(2, 4, 9, 13)[:, 1:, 1:, ::2]
    expected = F.conv2d(maps, proj.weight, proj.bias, stride=2).flatten(2).mT
    torch.testing.assert_close(proj(maps)[0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('of_tokens', [False, True])
@pytest.mark.parametrize('batch', [1, 3])
@pytest.mark.parametrize('piece', [1, 2 * 36 * 3, 4 * 36 * 3, 1000])
def test_patches_by_pieces_are_those_of_the_whole(piece, batch, of_tokens, monkeypatch):
    """Some of 5 rows of 3 patches of 36 numbers, with norms before and after, where no compiled function takes them."""
    monkeypatch.setattr(compiled, 'takes', lambda rows: False)
    proj, maps = PatchProjection(9, 4, 2, of_tokens), torch.randn(batch, 9, 11, 7)
    before, after = (nn.LayerNorm(9) if of_tokens else None), nn.LayerNorm(4)
    normed = maps if before is None else before(maps.movedim(1, 3)).movedim(3, 1)
    expected = after(F.conv2d(normed, proj.weight, proj.bias, stride=2).flatten(2).mT).detach()
    monkeypatch.setattr(patches_module, 'PIECE', piece)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            found, shape = proj(maps, before, after)
        assert shape == (5, 3)
        torch.testing.assert_close(found.detach(), expected, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        positions = Positions(torch.randn(1, 12, 4), (6, 2), 'bicubic')
        found, shape = proj(maps, before, after, positions)
    assert shape == (5, 3)
    torch.testing.assert_close(found, expected + positions.resized(shape), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('of_tokens', [False, True])
def test_weights_of_patches_are_those_of_a_convolution(of_tokens):
    """The order in memory goes with the layer, whatever is loaded, copied or converted."""
    conv, proj = nn.Conv2d(3, 5, 4, 4), PatchProjection(3, 5, 4, of_tokens)
    assert isinstance(proj, nn.Conv2d)
    proj.load_state_dict(conv.state_dict())
    assert {name: value.shape for name, value in proj.state_dict().items()} == {'weight': (5, 3, 4, 4), 'bias': (5, )}
    for layer in (proj, copy.deepcopy(proj).double()):
        assert torch.equal(layer.weight.float(), conv.weight)
        assert layer.weight.is_contiguous(memory_format=torch.channels_last if of_tokens else torch.contiguous_format)
    torch.manual_seed(0)
    fresh = nn.Conv2d(3, 5, 4, 4)
    torch.manual_seed(0)
    assert torch.equal(PatchProjection(3, 5, 4, of_tokens).weight, fresh.weight)
