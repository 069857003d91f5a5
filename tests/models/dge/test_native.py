import math

import pytest
import torch

from mmdyn.models.dge import grains, native

pytestmark = pytest.mark.skipif(native.library() is None, reason='mmdyn was installed without a compiler')

# Map, granularities, side of a region, extra tokens.
LAYOUTS = [((8, 8), (1, 2, 4), 4, 0), ((5, 7), (1, 2, 4), 4, 1), ((9, 6), (0, 1), 1, 2), ((13, 3), (2, 4), 8, 0),
           ((4, 4), (1, 2, 4, 8), 8, 1), ((3, 10), (0, 2), 2, 0), ((1, 1), (1, 4), 4, 2), ((26, 19), (1, 2, 4), 4, 1),
           ((23, 24), (0, 1, 3), 6, 0), ((16, 24), (0, 1), 1, 2)]


@pytest.mark.parametrize('num_extra', [0, 2])
@pytest.mark.parametrize('side, shape', [(1, (5, 7)), (4, (8, 8)), (4, (9, 3)), (8, (1, 17)), (3, (40, 40))])
@pytest.mark.parametrize('channels', [1, 5, 64])
def test_pool_equals_the_operators(side, shape, num_extra, channels):
    tokens = torch.randn(3, num_extra + math.prod(shape), channels)
    expected = grains.pool(tokens, shape, side, num_extra)
    torch.testing.assert_close(native.pool(tokens, shape, side, num_extra), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('batch', [1, 3])
@pytest.mark.parametrize('padded', [False, True])
@pytest.mark.parametrize('channels', [1, 5, 64])
@pytest.mark.parametrize('shape, phis, region, num_extra', LAYOUTS)
@torch.no_grad()
def test_routing_equals_the_operators(shape, phis, region, num_extra, channels, padded, batch):
    """In both directions, also with a table that all images share and where a change is of another type."""
    choice = torch.randint(len(phis), (batch, *grains.grid(region, shape)))
    expected, routing = (module.route(choice, shape, phis, region, num_extra, padded) for module in (grains, native))
    assert (routing.lengths, routing.surplus, routing.packed) == (expected.lengths, expected.surplus, expected.packed)
    tokens = torch.randn(batch, num_extra + math.prod(shape), channels)
    for table in (tokens, tokens[0]):
        torch.testing.assert_close(routing.means(table), expected.means(table), rtol=1e-5, atol=1e-6)
    change = torch.randn(sum(routing.packed), channels)
    assert torch.equal(routing.add_changes(tokens, change), expected.add_changes(tokens, change))
    half = change.bfloat16()
    assert torch.equal(routing.add_changes(tokens, half), expected.add_changes(tokens, half))


@torch.no_grad()
def test_one_choice_for_all_regions():
    """As a view whose numbers lie in one place."""
    choice, tokens = torch.tensor([1, 0]).view(2, 1, 1).expand(2, 3, 2), torch.randn(2, 60, 4)
    expected, routing = (module.route(choice, (10, 6), (1, 2), 4) for module in (grains, native))
    assert routing.lengths == expected.lengths == [15, 60]
    torch.testing.assert_close(routing.means(tokens), expected.means(tokens), rtol=1e-5, atol=1e-6)


def test_is_used_in_plain_inference_alone():
    tokens = torch.randn(2, 35, 4)
    assert not native.is_used(tokens)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert native.is_used(tokens)
            assert not native.is_used(tokens.double()) and not native.is_used(tokens.bfloat16())
            assert not native.is_used(tokens.mT) and not native.is_used(tokens.to('meta'))
