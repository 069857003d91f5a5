import math

import pytest
import torch

from mmdyn.models import native
from mmdyn.models.dge import grains
from mmdyn.models.native import routing

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
    choice = routing.choose(tokens, shape, side, num_extra, weight, bias)
    assert choice.shape == (3, *grains.grid(side, shape))
    # But for rounding errors between logits that are nearly alike.
    chosen = logits.gather(-1, choice.flatten(1)[..., None]).squeeze(-1)
    torch.testing.assert_close(chosen, logits.max(-1).values, rtol=1e-5, atol=1e-5)


def test_choice_by_numbers_that_are_none_is_an_option():
    choice = routing.choose(torch.full((1, 16, 2), math.nan), (4, 4), 2, 0, torch.ones(3, 2), torch.zeros(3))
    assert choice.unique().tolist() == [0]


def rows_of(patches):
    """The tokens of each patch, as places in the table of all images."""
    rows = []
    for row, size in patches.table[:sum(patches.lengths)].tolist():
        lines, columns = size & 0xffffffff, size >> 32
        rows.append([row + line * patches.shape[1] + column for line in range(lines) for column in range(columns)])
    return rows


@pytest.mark.parametrize('batch', [1, 3])
@pytest.mark.parametrize('shape, phis, region, num_extra', LAYOUTS)
def test_patches_are_the_groups_of_the_operators(shape, phis, region, num_extra, batch):
    """In the same order, also of a choice that is a view."""
    choice = torch.randint(len(phis), (*grains.grid(region, shape), batch)).movedim(-1, 0)
    expected = grains.route(choice, shape, phis, region, num_extra)
    patches = routing.route(choice, shape, phis, region, num_extra)
    assert patches.lengths == expected.lengths == patches.queries.tolist()
    assert (patches.shape, patches.num_extra) == (shape, num_extra)
    groups, starts = expected.groups, [*expected.groups.starts.tolist(), len(expected.groups.rows)]
    assert rows_of(patches) == [
        groups.rows[start:end].tolist() for start, end in zip(starts, starts[1:])]
