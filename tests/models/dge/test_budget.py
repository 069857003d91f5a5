import itertools
import math

import pytest
import torch

from mmdyn.models.dge.budget import choose_within, queries_of_region, queries_within, share_budget
from mmdyn.models.dge.router import Router, choose
from mmdyn.models.dge.routing import count_patches, grid, pool

SHAPES = [(8, 8), (9, 7), (1, 5), (4, 13), (3, 3)]
SETS = [((1, 2, 4), 4), ((0, 1), 1), ((0, 1, 2, 4), 4), ((1, 3), 6), ((2,), 4), ((1, 2, 4, 8), 8), ((0, 2, 3), 6)]


def slow_counts(shape, phis, region):
    """Queries that each granularity makes of each region, counted cell by cell; regions in raster order."""
    counts = []
    for top, left in itertools.product(range(0, shape[0], region), range(0, shape[1], region)):
        cells = [
            (row, column)
            for row in range(top, min(top + region, shape[0]))
            for column in range(left, min(left + region, shape[1]))
        ]
        counts.append([len({(row // phi, column // phi) for row, column in cells}) if phi else 0 for phi in phis])
    return counts


def at_price(logits, costs, price):
    """argmax_k (h_k - lambda c_k), one region after the other."""
    return [max(range(len(costs)), key=lambda k: of_region[k] - price * costs[k]) for of_region in logits]


def best_price(logits, costs, counts, budget):
    """The choice at the least price that keeps the budget, or None, by a price between each two of change."""
    changes = sorted(
        {
            (of_region[j] - of_region[i]) / (costs[j] - costs[i])
            for of_region in logits
            for i, j in itertools.combinations(range(len(costs)), 2)
        }
    ) or [0.0]
    between = [changes[0] - 1, *((a + b) / 2 for a, b in itertools.pairwise(changes)), changes[-1] + 1]
    for price in between:
        choice = at_price(logits, costs, price)
        if sum(of_region[k] for of_region, k in zip(counts, choice)) <= budget:
            return choice
    return None


@pytest.mark.parametrize('phis, region', SETS)
@pytest.mark.parametrize('shape', SHAPES)
def test_choice_within_a_budget_is_that_of_the_least_price(shape, phis, region):
    """Whatever the budget: that of each number of queries from none to more than there are."""
    logits = torch.randn(2, *grid(region, shape), len(phis), dtype=torch.double)
    counts, costs = slow_counts(shape, phis, region), [(region / phi) ** 2 if phi else 0 for phi in phis]
    least, most = (sum(map(kind, counts)) for kind in (min, max))
    for budget in range(least, most + 2):
        choice = choose_within(logits, phis, count_patches(shape, phis, region), budget)
        assert choice.dtype == torch.long and choice.shape == logits.shape[:-1]
        for image, of_image in zip(choice, logits):
            assert image.flatten().tolist() == best_price(of_image.flatten(0, 1).tolist(), costs, counts, budget)


@pytest.mark.parametrize('phis, region', SETS)
@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize('alike', [False, True])
def test_all_images_spend_the_budget_but_for_a_part_of_a_region(alike, shape, phis, region):
    """Even if all regions look the same, as those of a plain image do."""
    logits = torch.randn(5, *grid(region, shape), len(phis))
    if alike:
        logits = logits[:, :1, :1].expand_as(logits)
    patches = count_patches(shape, phis, region)
    counts = slow_counts(shape, phis, region)
    least, most = (sum(map(kind, counts)) for kind in (min, max))
    of_one_region = max(max(of_region) - min(of_region) for of_region in counts)
    for budget in range(least, most + 1):
        choice = choose_within(logits, phis, patches, budget).flatten(1)
        for image in choice.tolist():
            spent = sum(of_region[k] for of_region, k in zip(counts, image))
            assert max(budget - of_one_region, least - 1) < spent <= budget or not of_one_region


def test_regions_that_look_the_same_take_turns_from_the_upper_left():
    """9 of 12 queries: two regions of 4 queries, then one of 1, which would have to make 4."""
    choice = choose_within(torch.tensor([2.0, 1.0]).expand(1, 1, 3, 2), (1, 2), count_patches((2, 6), (1, 2), 2), 9)
    assert choice.tolist() == [[[0, 0, 1]]]


def test_an_option_below_the_hull_is_never_chosen():
    """2 x 2 patches are worth less than a price between the finest and the coarsest would grant them."""
    logits, patches = torch.tensor([[[[4.0, 0.7, 0.0]]]]), count_patches((4, 4), (1, 2, 4), 4)
    for budget in range(1, 16):
        assert choose_within(logits, (1, 2, 4), patches, budget).item() == 2
    assert choose_within(logits, (1, 2, 4), patches, 16).item() == 0


def test_a_budget_below_the_least_spends_the_least():
    logits = torch.randn(1, 2, 2, 3)
    assert (choose_within(logits, (1, 2, 4), count_patches((8, 8), (1, 2, 4), 4), 3) == 2).all()
    assert (choose_within(logits, (0, 1, 2), count_patches((4, 4), (0, 1, 2), 2), -1) == 0).all()


@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize('num_extra', [0, 2])
@pytest.mark.parametrize('price', [0.07, -0.3, 2.0])
@pytest.mark.parametrize('function', [choose, choose.plain])
@torch.no_grad()
def test_choice_at_a_price(function, price, num_extra, shape):
    """Of each whole region's queries; regions that hang over the edge pay as much."""
    phis, region = (1, 2, 4), 4
    router, tokens = Router(5, phis), torch.randn(3, num_extra + math.prod(shape), 5)
    torch.nn.init.normal_(router.weight), torch.nn.init.normal_(router.bias)
    logits = router(pool(tokens, shape, region, num_extra)).flatten(1, 2)
    expected = [at_price(of_image.tolist(), [16, 4, 1], price) for of_image in logits]
    router.price = price * torch.tensor(queries_of_region(phis, region)).float()
    assert function(router, tokens, shape, region, num_extra).flatten(1).tolist() == expected


@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize('num_extra', [0, 2])
@pytest.mark.parametrize('function', [choose, choose.plain])
@torch.no_grad()
def test_choice_by_a_share(function, num_extra, shape):
    """A share of the dense block's queries, extra tokens included, which are queries in any case."""
    phis, region = (1, 2, 4), 4
    router, tokens = Router(5, phis), torch.randn(3, num_extra + math.prod(shape), 5)
    torch.nn.init.normal_(router.weight)
    logits = router(pool(tokens, shape, region, num_extra)).flatten(1, 2)
    counts, dense = slow_counts(shape, phis, region), num_extra + math.prod(shape)
    for queries in range(num_extra + sum(map(min, counts)), dense + 1):
        router.share = queries / dense
        choice = function(router, tokens, shape, region, num_extra).flatten(1).tolist()
        assert choice == [best_price(of_image.tolist(), [16, 4, 1], counts, queries - num_extra) for of_image in logits]


@pytest.mark.parametrize('share, expected', [(0.5, 8), (0.55, 9), (9 / 17, 9), (8.99 / 17, 8), (1.0, 17), (0.0, 0)])
def test_queries_within_a_share(share, expected):
    assert queries_within(share, (4, 4), 1) == expected


def test_budget_is_shared_in_proportion_as_far_as_layers_allow():
    """0.5 = (3 * x + 1 * 2 x) / 4 for x = 0.4; the third case is 0.3 = (1 * 0.25 + 1 * 0.35) / 2."""
    close = dict(abs=1e-9)
    assert share_budget(0.5, [3, 1], [1, 2], [0, 0], [1, 1]) == pytest.approx([0.4, 0.8], **close)
    assert share_budget(0.4, [3, 1], [1, 1], [0.1, 0.1], [1, 1]) == pytest.approx([0.4, 0.4], **close)
    assert share_budget(0.3, [1, 1], [1, 5], [0.25, 0], [1, 0.35]) == pytest.approx([0.25, 0.35], **close)
    assert share_budget(1.0, [2, 5], [1, 5], [0.2, 0.2], [1, 1]) == pytest.approx([1, 1], **close)
    assert share_budget(0.2, [2, 5], [0, 5], [0.2, 0.2], [1, 1]) == pytest.approx([0.2, 0.2], **close)
