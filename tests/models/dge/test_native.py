import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mmdyn.models.dge import grains, native

pytestmark = pytest.mark.skipif(native.library() is None, reason='mmdyn was installed without a compiler')

# Map, granularities, side of a region, extra tokens.
LAYOUTS = [((8, 8), (1, 2, 4), 4, 0), ((5, 7), (1, 2, 4), 4, 1), ((9, 6), (0, 1), 1, 2), ((13, 3), (2, 4), 8, 0),
           ((4, 4), (1, 2, 4, 8), 8, 1), ((3, 10), (0, 2), 2, 0), ((1, 1), (1, 4), 4, 2), ((26, 19), (1, 2, 4), 4, 1),
           ((23, 24), (0, 1, 3), 6, 0), ((16, 24), (0, 1), 1, 2)]


@pytest.mark.parametrize('num_extra', [0, 2])
@pytest.mark.parametrize('side, shape', [(1, (5, 7)), (4, (8, 8)), (4, (9, 3)), (8, (1, 17)), (3, (40, 40))])
@pytest.mark.parametrize('channels', [1, 5, 64])
@pytest.mark.parametrize('options', [1, 3])
def test_choice_is_that_of_the_greatest_logit(side, shape, num_extra, channels, options):
    tokens = torch.randn(3, num_extra + math.prod(shape), channels)
    weight, bias = torch.randn(channels, options).T, torch.randn(options)
    logits = grains.pool(tokens, shape, side, num_extra) @ weight.T + bias
    choice = native.choose(tokens, shape, side, num_extra, weight, bias)
    assert choice.shape == (3, *grains.grid(side, shape))
    # But for rounding errors between logits that are nearly alike.
    chosen = logits.gather(-1, choice.flatten(1)[..., None]).squeeze(-1)
    torch.testing.assert_close(chosen, logits.max(-1).values, rtol=1e-5, atol=1e-5)


def test_choice_by_numbers_that_are_none_is_an_option():
    choice = native.choose(torch.full((1, 16, 2), math.nan), (4, 4), 2, 0, torch.ones(3, 2), torch.zeros(3))
    assert choice.unique().tolist() == [0]


@pytest.mark.parametrize('batch', [1, 3])
@pytest.mark.parametrize('channels', [1, 5, 64])
@pytest.mark.parametrize('shape, phis, region, num_extra', LAYOUTS)
@torch.no_grad()
def test_routing_equals_the_operators(shape, phis, region, num_extra, channels, batch):
    """In both directions, also with a table that all images share and where a change is of another type."""
    choice = torch.randint(len(phis), (batch, *grains.grid(region, shape)))
    expected = grains.route(choice, shape, phis, region, num_extra, padded=True)
    routing = native.Routing(choice, shape, phis, region, num_extra)
    assert routing.lengths == expected.lengths == routing.queries.tolist()
    (images, band), = routing.bands(10**6)
    assert images == slice(None) and band.packed == expected.packed
    tokens = torch.randn(batch, num_extra + math.prod(shape), channels)
    for table in (tokens, tokens[0]):
        torch.testing.assert_close(band.means(table), expected.means(table), rtol=1e-5, atol=1e-6)
    change = torch.randn(sum(band.packed), channels)
    for values in (change, change.bfloat16()):
        added = tokens.clone()
        assert band.add_changes_(added, values) is added
        assert torch.equal(added, expected.add_changes(tokens, values))


@pytest.mark.parametrize('count', [1, 7, 20, 100, 1000])
@pytest.mark.parametrize('batch', [1, 4])
@pytest.mark.parametrize('shape, phis, region, num_extra', LAYOUTS)
@torch.no_grad()
def test_bands_are_parts_of_the_whole(shape, phis, region, num_extra, batch, count):
    """One after the other they have all queries and change all tokens; each has those of its images."""
    choice = torch.randint(len(phis), (batch, *grains.grid(region, shape)))
    choice[-1] = 0
    expected = grains.route(choice, shape, phis, region, num_extra)
    routing = native.Routing(choice, shape, phis, region, num_extra)
    tokens = torch.arange(batch).view(-1, 1, 1) * 10. + torch.rand(batch, num_extra + math.prod(shape), 3)
    change, means = torch.randn(sum(routing.lengths), 3), expected.means(tokens)
    added, first = tokens.clone(), 0
    for images, band in routing.bands(count):
        members, queries = range(batch)[images], band.means(tokens)
        assert len(band.packed) == len(members) and sum(band.packed) == len(queries)
        rows = change.new_zeros(len(queries), 3)
        owners = [image for image, length in zip(members, band.packed) for _ in range(length)]
        for row in range(len(queries)):
            if (queries[row] == 0).all():
                continue  # of the surplus
            torch.testing.assert_close(queries[row], means[first])
            assert owners[row] == int(queries[row].max() / 10)
            rows[row] = change[first]
            first += 1
        assert len(queries) <= (count + region**2) * 33 / 32 + num_extra
        band.add_changes_(added, rows)
    assert first == len(change)
    assert torch.equal(added, expected.add_changes(tokens, change))


@torch.no_grad()
def test_one_choice_for_all_regions():
    """As a view whose numbers lie in one place."""
    choice, tokens = torch.tensor([1, 0]).view(2, 1, 1).expand(2, 3, 2), torch.randn(2, 60, 4)
    expected, routing = (module(choice, (10, 6), (1, 2), 4) for module in (grains.route, native.Routing))
    assert routing.lengths == expected.lengths == [15, 60]
    (_, band), = routing.bands(75)
    torch.testing.assert_close(band.means(tokens)[:75], expected.means(tokens), rtol=1e-5, atol=1e-6)


def test_is_used_in_plain_inference_alone():
    tokens = torch.randn(2, 35, 4)
    assert not native.is_used(tokens)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert native.is_used(tokens)
            assert not native.is_used(tokens.double()) and not native.is_used(tokens.bfloat16())
            assert not native.is_used(tokens.mT) and not native.is_used(tokens.to('meta'))
            with FlopCounterMode(display=False):
                assert not native.is_used(tokens)


def test_functions_of_another_version_say_how_to_compile_them(monkeypatch):
    monkeypatch.setattr(native.ctypes, 'CDLL', lambda path: object())
    with pytest.raises(ImportError, match='_native.* another version of mmdyn: .*`make setup` or `pip install -e .`'):
        native.library.__wrapped__()
