import itertools
import math
import random

import pytest
import torch
from torch.autograd import gradcheck

from mmdyn.models.dge.routing import centres, count_patches, grid, pool, route, unpool

GRANULARITIES = [
    ((1, 2, 4), 4),
    ((0, 1), 1),
    ((0, 1, 3), 6),
    ((2, 4), 8),
    ((1, 2, 4, 8), 8),
    ((0, 2), 2),
    ((1, 5), 5),
    ((3,), 3),
    ((1,), 1),
]
# Map, granularities, side of a region, extra tokens.
LAYOUTS = [
    ((5, 7), (1, 2, 4), 4, 1),
    ((9, 6), (0, 1), 1, 2),
    ((3, 10), (0, 2), 2, 0),
    ((1, 1), (1, 4), 4, 2),
    ((13, 3), (2, 4), 8, 0),
]


def random_choice(shape, phis, region, batch=3):
    return torch.randint(len(phis), (batch, *grid(region, shape)))


@pytest.fixture
def slow_routing(slow_areas):
    """The tokens of each query of each image, by the loops of the paper."""

    def areas(choice, shape, phis, region, num_extra):
        images = [
            slow_areas(lambda row, column, image=image: phis[image[row][column]], shape, region, num_extra)
            for image in choice.tolist()
        ]
        return [[area for area, _ in queries] for queries in images]

    return areas


@pytest.mark.parametrize('seed', range(50))
def test_both_directions_equal_the_loops_of_the_paper(seed, slow_routing):
    """Of random routings, with their gradients: queries are means of tokens, and hand their change to each of them."""
    draw = random.Random(seed)
    phis, region = draw.choice(GRANULARITIES)
    shape, num_extra, batch = (draw.randint(1, 17), draw.randint(1, 17)), draw.randint(0, 2), draw.randint(1, 4)
    choice, size = random_choice(shape, phis, region, batch), num_extra + math.prod(shape)
    arguments = choice, shape, phis, region, num_extra
    images, routing = slow_routing(*arguments), route(*arguments)
    assert routing.lengths == [len(areas) for areas in images]

    total = sum(routing.lengths)
    served = torch.full((batch, size), total)
    queries = [(image, area) for image, areas in enumerate(images) for area in areas]
    for number, (image, area) in enumerate(queries):
        served[image, area] = number
    assert torch.equal(routing.query, served)

    tokens, table, change = (
        torch.randn(*of, 3, dtype=torch.double, requires_grad=True) for of in ((batch, size), (1, size), (total,))
    )
    means, shared, outputs = [], [], list(tokens.flatten(0, 1))
    for (image, area), of_query in zip(queries, change):
        means.append(tokens[image, area].mean(0))
        shared.append(table[0, area].mean(0))
        for token in area:
            outputs[image * size + token] = outputs[image * size + token] + of_query
    empty = tokens[0, :0]
    expected = [
        torch.stack(means) if means else empty,
        torch.stack(shared) if means else empty,
        torch.stack(outputs).view_as(tokens),
    ]
    found = [routing.compress(tokens), routing.compress(table), routing.decompress(change, tokens)]
    weights, leaves = [torch.randn_like(x) for x in expected], [tokens, table, change]
    for results in (found, expected):
        loss = sum((x * weight).sum() for x, weight in zip(results, weights))
        results += torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize('layout', LAYOUTS)
def test_gradients_are_those_of_differences(layout):
    shape, phis, region, num_extra = layout
    routing = route(random_choice(shape, phis, region, batch=2), *layout)
    tokens = torch.randn(2, num_extra + math.prod(shape), 2, dtype=torch.double, requires_grad=True)
    change = torch.randn(sum(routing.lengths), 2, dtype=torch.double, requires_grad=True)
    assert gradcheck(routing.compress, tokens) and gradcheck(routing.decompress, (change, tokens))


def test_routing_by_hand():
    """3 rows and 5 columns, regions of 2: whole, cells, skipped; whole, whole, cells. One extra token before them.

    0 0 1 2 -
    0 0 3 4 -
    5 5 6 6 7
    """
    routing = route(torch.tensor([[[2, 1, 0], [2, 2, 1]]]), (3, 5), (0, 1, 2), 2, num_extra=1)
    assert routing.lengths == [9]
    assert routing.query.tolist() == [[0, 1, 1, 2, 3, 9, 1, 1, 4, 5, 9, 6, 6, 7, 7, 8]]
    tokens = torch.tensor([100.0, *range(15)])[None, :, None]
    assert routing.compress(tokens).flatten().tolist() == [100, 3, 2, 3, 7, 8, 10.5, 12.5, 14]
    change = torch.tensor([1.0, 10, 20, 30, 40, 50, 60, 70, 80])[:, None]
    assert routing.decompress(change, torch.zeros(1, 16, 1)).flatten().tolist() == [
        1,
        10,
        10,
        20,
        30,
        0,
        10,
        10,
        40,
        50,
        0,
        60,
        60,
        70,
        70,
        80,
    ]


@pytest.mark.parametrize('room', [0, 1, 5])
@pytest.mark.parametrize('layout', LAYOUTS)
def test_places_that_are_left_over_are_of_no_token(layout, room):
    """With a capacity, an image's queries are those without, and then nothing; and so are the tokens' changes."""
    shape, phis, region, num_extra = layout
    choice, tokens = random_choice(shape, phis, region), torch.randn(3, num_extra + math.prod(shape), 4)
    expected = route(choice, *layout)
    capacity = max(expected.lengths) + room
    routing = route(choice, *layout, capacity)
    assert routing.lengths == [capacity] * 3

    queries, change = routing.compress(tokens).split(capacity), torch.randn(3 * capacity, 4)
    for of_image, filled in zip(queries, expected.compress(tokens).split(expected.lengths)):
        assert torch.equal(of_image[: len(filled)], filled) and not of_image[len(filled) :].any()
    packed = torch.cat([of_image[:num] for of_image, num in zip(change.split(capacity), expected.lengths)])
    assert torch.equal(routing.decompress(change, tokens), expected.decompress(packed, tokens))


@pytest.mark.parametrize('missing', [1, 3])
@pytest.mark.parametrize('layout', LAYOUTS)
def test_what_there_is_no_place_for_has_no_query(layout, missing):
    """An image's first queries are those without a capacity; the tokens of the others stay as they are."""
    shape, phis, region, num_extra = layout
    choice = random_choice(shape, phis, region)
    expected = route(choice, *layout)
    capacity = max(max(expected.lengths) - missing, num_extra)
    query, start = route(choice, *layout, capacity).query, 0
    for image, num in enumerate(expected.lengths):
        of_image = expected.query[image] - start
        is_served = (of_image < min(num, capacity)) & (expected.query[image] < sum(expected.lengths))
        assert torch.equal(query[image], torch.where(is_served, of_image + image * capacity, 3 * capacity))
        start += num


def test_means_come_back_to_the_cells_of_their_patches():
    """What was compressed and is handed to zeros again is the un-pooled mean."""
    tokens, phis = torch.randn(2, 35, 3), (1, 2, 4)
    for k, side in enumerate(phis):
        routing = route(torch.full((2, 2, 2), k), (5, 7), phis, 4)
        back = routing.decompress(routing.compress(tokens), torch.zeros_like(tokens))
        expected = unpool(pool(tokens, (5, 7), side), side, (5, 7)).flatten(1, 2)
        torch.testing.assert_close(back, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize('skipped', [(0,), (1,), (2,), (0, 1, 2)])
def test_images_without_queries(skipped):
    choice = torch.ones(3, 2, 4, dtype=torch.long)
    choice[list(skipped)] = 0
    routing = route(choice, (3, 8), (0, 2), 2)
    assert routing.lengths == [0 if image in skipped else 8 for image in range(3)]
    tokens = torch.randn(3, 24, 5)
    queries = routing.compress(tokens)
    assert queries.shape == (8 * (3 - len(skipped)), 5)
    changed = routing.decompress(torch.ones_like(queries), tokens) - tokens
    assert [image for image in range(3) if not changed[image].any()] == list(skipped)


def test_no_images():
    routing = route(torch.zeros(0, 2, 2, dtype=torch.long), (5, 7), (1, 2, 4), 4, num_extra=1)
    tokens = torch.randn(0, 36, 3)
    assert routing.lengths == [] and routing.compress(tokens).shape == (0, 3)
    assert routing.decompress(torch.randn(0, 3), tokens).shape == (0, 36, 3)
    assert routing.compress(torch.randn(1, 36, 2)).shape == (0, 2)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('offset', [8, 2000])
def test_means_in_half_precision_are_rounded_once(offset, dtype):
    """Sums of 64 tokens would be rounded more often, and be greater than the greatest float16."""
    tokens = (torch.randn(2, 1 + 256, 3) + offset).to(dtype)
    routing = route(torch.tensor([[[0, 1], [1, 1]], [[1, 0], [1, 1]]]), (16, 16), (1, 8), 8, num_extra=1)
    found = routing.compress(tokens)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), routing.compress(tokens.double()), rtol=torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize('num_extra', [0, 1])
def test_half_precision_changes_are_added_in_that_of_the_tokens(num_extra):
    """As under autocast."""
    routing = route(random_choice((5, 4), (0, 2), 2), (5, 4), (0, 2), 2, num_extra)
    tokens, change = torch.randn(3, num_extra + 20, 3), torch.randn(sum(routing.lengths), 3, dtype=torch.bfloat16)
    assert torch.equal(routing.decompress(change, tokens), routing.decompress(change.float(), tokens))


@pytest.mark.parametrize(
    'side, shape, expected', [(1, (5, 7), (5, 7)), (4, (8, 4), (2, 1)), (4, (9, 3), (3, 1)), (8, (1, 17), (1, 3))]
)
def test_grid_rounds_up(side, shape, expected):
    assert grid(side, shape) == expected


@pytest.mark.parametrize('num_extra', [0, 2])
@pytest.mark.parametrize('shape', [(8, 8), (5, 7), (9, 6), (13, 3), (1, 1)])
@pytest.mark.parametrize('side', [1, 2, 3, 4, 8, 16])
def test_pool_is_the_mean_of_valid_cells(shape, side, num_extra):
    tokens = torch.randn(2, num_extra + math.prod(shape), 3, dtype=torch.double, requires_grad=True)
    maps = tokens[:, num_extra:].unflatten(1, shape)
    expected = torch.stack(
        [
            maps[:, row : row + side, column : column + side].mean((1, 2))
            for row in range(0, shape[0], side)
            for column in range(0, shape[1], side)
        ],
        1,
    )
    expected, weights = expected.unflatten(1, grid(side, shape)), torch.randn(2, *grid(side, shape), 3)
    results = [
        [out, *torch.autograd.grad((weights * out).sum(), tokens)]
        for out in (pool(tokens, shape, side, num_extra), expected)
    ]
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


def test_pool_of_side_one_copies_nothing():
    tokens = torch.randn(2, 1 + 35, 3)
    pooled = pool(tokens, (5, 7), 1, 1)
    assert torch.equal(pooled.flatten(1, 2), tokens[:, 1:]) and pooled.data_ptr() == tokens[:, 1:].data_ptr()


def test_pool_of_no_images():
    assert pool(torch.randn(0, 36, 3), (5, 7), 4, 1).shape == (0, 2, 2, 3)


@pytest.mark.parametrize('shape', [(8, 8), (5, 7), (9, 6), (1, 1)])
@pytest.mark.parametrize('side', [1, 2, 3, 16])
def test_unpool_gives_each_cell_the_value_of_its_patch(shape, side):
    patches = torch.randn(2, *grid(side, shape), 3)
    cells = unpool(patches, side, shape)
    assert cells.shape == (2, *shape, 3)
    for row, column in itertools.product(*map(range, shape)):
        assert torch.equal(cells[:, row, column], patches[:, row // side, column // side])


def test_centres_by_hand():
    """x goes along a row."""
    assert centres((2, 3)).tolist() == [[[0, 0], [1, 0], [2, 0], [0, 1], [1, 1], [2, 1]]]


def test_points_of_queries_by_hand():
    """3 rows and 5 columns: patches of side 2 end in a row of height 1 and a column of width 1."""
    routing = route(torch.zeros(1, 2, 3, dtype=torch.long), (3, 5), (2,), 2)
    assert routing.compress(centres((3, 5))).tolist() == [[0.5, 0.5], [2.5, 0.5], [4, 0.5], [0.5, 2], [2.5, 2], [4, 2]]


@pytest.mark.parametrize('shape, phis, region, _', [*LAYOUTS, ((17, 16), (0, 1, 2, 4, 8), 8, 0)])
def test_counts_are_those_of_the_loops(shape, phis, region, _, slow_areas):
    counts = count_patches(shape, phis, region)
    expected = torch.zeros(*grid(region, shape), len(phis), dtype=torch.long)
    for k, phi in enumerate(phis):
        for _, place in slow_areas(lambda *_, phi=phi: phi, shape, region, 0):
            expected[place][k] += 1
    assert torch.equal(counts, expected)


def test_counts_by_hand():
    """5 x 7 cells in regions of 4: 16 and 12 above, 4 and 3 below."""
    assert count_patches((5, 7), (0, 1, 2, 4), 4).tolist() == [
        [[0, 16, 4, 1], [0, 12, 4, 1]],
        [[0, 4, 2, 1], [0, 3, 2, 1]],
    ]
