import itertools
import math

import pytest
import torch

from mmdyn.models.dge.grains import (add_spread_, candidate_centres, candidate_values, grid, means, patch_groups,
                                     patch_of_cell, pool, region_table, route, spread, sum_over_granularities, tile)

CPU = torch.device('cpu')
# Map, granularities, side of a region, extra tokens.
LAYOUTS = [((8, 8), (1, 2, 4), 4, 0), ((5, 7), (1, 2, 4), 4, 1), ((9, 6), (0, 1), 1, 2), ((13, 3), (2, 4), 8, 0),
           ((4, 4), (1, 2, 4, 8), 8, 1), ((3, 10), (0, 2), 2, 0), ((1, 1), (1, 4), 4, 2)]
# Routings of up to some hundred queries, with and without extra tokens and skipped regions.
PADDED = [((26, 19), (1, 2, 4), 4, 1), ((23, 24), (0, 1, 3), 6, 0), ((16, 24), (0, 1), 1, 2), ((24, 24), (1, 2), 8, 0)]


def patches(shape, phis):
    """(granularity, first row, first column) of each candidate of an image, in order."""
    return [(phi, row, column) for phi in phis if phi
            for row in range(0, shape[0], phi) for column in range(0, shape[1], phi)]


def random_choice(shape, phis, region, batch=3):
    return torch.randint(len(phis), (batch, *grid(region, shape)))


def random_routing(shape, phis, region, num_extra, padded=False, batch=3):
    """A routing, and the number of tokens of all images."""
    choice = random_choice(shape, phis, region, batch)
    return route(choice, shape, phis, region, num_extra, padded), batch * (num_extra + math.prod(shape))


def slow_queries(choice, shape, phis, region, num_extra):
    """The tokens of each query of each image, as sets of indices into the tokens of all images."""
    images = []
    for image, chosen in enumerate(choice.tolist()):
        first = image * (num_extra + math.prod(shape))
        queries = [{first + extra} for extra in range(num_extra)]
        for top, left in itertools.product(range(0, shape[0], region), range(0, shape[1], region)):
            phi = phis[chosen[top // region][left // region]]
            bottom, right = min(top + region, shape[0]), min(left + region, shape[1])
            for row, column in itertools.product(range(top, bottom, phi), range(left, right, phi)) if phi else ():
                queries.append({first + num_extra + y * shape[1] + x for y in range(row, min(row + phi, bottom))
                                for x in range(column, min(column + phi, right))})
        images.append(queries)
    return images


def slow_counts(choice, shape, phis, region, num_extra):
    """Queries of each extra token and region of each image."""
    return [[1] * num_extra + [
        math.ceil(min(region, shape[0] - top) / phi) * math.ceil(min(region, shape[1] - left) / phi) if phi else 0
        for top, left in itertools.product(range(0, shape[0], region), range(0, shape[1], region))
        for phi in [phis[chosen[top // region][left // region]]]
    ] for chosen in choice.tolist()]


def members(groups):
    """The rows of each group, as lists."""
    ends = [*groups.starts.tolist(), len(groups.rows)]
    return [groups.rows[start:end].tolist() for start, end in itertools.pairwise(ends)]


def check_routing(routing, choice, shape, phis, region, num_extra):
    """Compare with the loops, whatever the surplus. Returns the number of queries with it."""
    images = slow_queries(choice, shape, phis, region, num_extra)
    queries = [query for image in images for query in image]
    total, found = len(queries) + routing.surplus, members(routing.groups)
    assert routing.lengths == [len(image) for image in images]
    assert [set(rows) for rows in found] == queries + [set()] * routing.surplus
    assert sum(map(len, found)) == sum(map(len, queries))  # no token twice
    served = {token: index for index, query in enumerate(queries) for token in query}
    tokens = range(len(choice) * (num_extra + math.prod(shape)))
    assert routing.groups.group.tolist() == [served.get(token, total) for token in tokens]
    assert routing.groups.complete == (0 not in phis)
    assert routing.counts.tolist() == slow_counts(choice, shape, phis, region, num_extra)
    assert sum(routing.packed) == total and routing.packed[:-1] == routing.lengths[:-1]
    return total


@pytest.mark.parametrize('side, shape, expected', [(1, (5, 7), (5, 7)), (4, (8, 4), (2, 1)), (4, (9, 3), (3, 1)),
                                                   (8, (1, 17), (1, 3))])
def test_grid_rounds_up(side, shape, expected):
    assert grid(side, shape) == expected


@pytest.mark.parametrize('num_extra', [0, 2])
@pytest.mark.parametrize('shape', [(8, 8), (5, 7), (9, 6), (13, 3), (1, 1)])
@pytest.mark.parametrize('side', [1, 2, 3, 4, 8])
def test_pool_is_the_mean_of_valid_cells(shape, side, num_extra):
    tokens = torch.randn(2, num_extra + shape[0] * shape[1], 3) + 5
    maps = tokens[:, num_extra:].unflatten(1, shape)
    expected = [maps[:, row:row + side, column:column + side].mean((1, 2)) for _, row, column in patches(shape, [side])]
    torch.testing.assert_close(pool(tokens, shape, side, num_extra), torch.stack(expected, 1), rtol=1e-5, atol=1e-5)


def test_pool_of_side_one_copies_nothing():
    tokens = torch.randn(2, 1 + 35, 3)
    pooled = pool(tokens, (5, 7), 1, 1)
    assert torch.equal(pooled, tokens[:, 1:]) and pooled.data_ptr() == tokens[:, 1:].data_ptr()


@pytest.mark.parametrize('num_extra', [0, 2])
@pytest.mark.parametrize('shape, side', [((8, 8), 4), ((5, 7), 2), ((3, 10), 4), ((1, 1), 3)])
def test_patch_groups_are_the_cells_of_each_patch(shape, side, num_extra):
    groups, expected = patch_groups(3, shape, side, num_extra, CPU), []
    for image, (_, top, left) in itertools.product(range(3), patches(shape, [side])):
        first = image * (num_extra + math.prod(shape)) + num_extra
        expected.append({first + row * shape[1] + column for row in range(top, min(top + side, shape[0]))
                         for column in range(left, min(left + side, shape[1]))})
    found = members(groups)
    assert [set(rows) for rows in found] == expected and sum(map(len, found)) == 3 * math.prod(shape)
    owner = {token: index for index, patch in enumerate(expected) for token in patch}
    tokens = range(3 * (num_extra + math.prod(shape)))
    assert groups.group.tolist() == [owner.get(token, len(expected)) for token in tokens]
    assert groups.complete == (num_extra == 0)


def test_tile_repeats_and_cuts():
    assert tile(torch.tensor([[[1, 2], [3, 4]]]), 2, (3, 4)).tolist() == [[1, 1, 2, 2, 1, 1, 2, 2, 3, 3, 4, 4]]


@pytest.mark.parametrize('shape, phis, region, _', LAYOUTS)
def test_candidates_have_the_value_of_their_region_and_granularity(shape, phis, region, _):
    values = torch.randn(2, *grid(region, shape), len(phis))
    expected = [values[:, row // region, column // region, phis.index(phi)]
                for phi, row, column in patches(shape, phis)]
    assert torch.equal(candidate_values(values, shape, phis, region), torch.stack(expected, 1))


@pytest.mark.parametrize('shape, phis, _, __', LAYOUTS)
def test_each_cell_lies_in_its_patch(shape, phis, _, __):
    for phi in filter(None, phis):
        corners = patches(shape, [phi])
        expected = [corners.index((phi, row - row % phi, column - column % phi))
                    for row, column in itertools.product(*map(range, shape))]
        assert patch_of_cell(shape, phi).tolist() == expected


@pytest.mark.parametrize('shape, phis, _, __', LAYOUTS)
def test_centres_are_the_means_of_valid_cells(shape, phis, _, __):
    expected = []
    for phi, top, left in patches(shape, phis):
        rows, columns = range(top, min(top + phi, shape[0])), range(left, min(left + phi, shape[1]))
        expected.append([sum(columns) / len(columns), sum(rows) / len(rows)])
    assert candidate_centres(shape, phis, CPU).tolist() == expected


def test_centres_by_hand():
    """3 rows and 5 columns: patches of side 2 end in a row of height 1 and a column of width 1."""
    assert candidate_centres((3, 5), (0, 2, 4), CPU).tolist() == [
        [0.5, 0.5], [2.5, 0.5], [4, 0.5], [0.5, 2], [2.5, 2], [4, 2], [1.5, 1], [4, 1]]


@pytest.mark.parametrize('shape, phis, _, __', LAYOUTS)
def test_each_cell_gets_the_sum_of_its_candidates(shape, phis, _, __):
    corners = patches(shape, phis)
    candidates = torch.randn(2, len(corners), 3, dtype=torch.double)
    expected = torch.zeros(2, *shape, 3, dtype=torch.double)
    for index, (phi, row, column) in enumerate(corners):
        expected[:, row:row + phi, column:column + phi] += candidates[:, index, None, None]
    torch.testing.assert_close(sum_over_granularities(candidates, shape, phis), expected.flatten(1, 2))


@pytest.mark.parametrize('batch', [1, 3])
@pytest.mark.parametrize('shape, phis, region, num_extra', LAYOUTS + PADDED)
def test_routing_lists_the_cells_of_each_query(shape, phis, region, num_extra, batch):
    """Extra tokens, then the regions one after the other, their patches row by row."""
    choice = random_choice(shape, phis, region, batch)
    routing = route(choice, shape, phis, region, num_extra)
    assert routing.surplus == 0
    check_routing(routing, choice, shape, phis, region, num_extra)


@pytest.mark.parametrize('shape, phis, region, num_extra', LAYOUTS + PADDED)
def test_padding_adds_queries_that_serve_no_token(shape, phis, region, num_extra):
    """At most 1 of 32. Their mean is 0, and what they hold goes nowhere, be it no number."""
    for _ in range(5):
        choice = random_choice(shape, phis, region)
        routing = route(choice, shape, phis, region, num_extra, padded=True)
        num = sum(routing.lengths)
        assert 0 <= routing.surplus <= num / 32
        total = check_routing(routing, choice, shape, phis, region, num_extra)
        queries = means(torch.randn(len(routing.groups.group), 2), routing.groups)
        assert len(queries) == total and (queries[num:] == 0).all()
        queries[num:] = math.nan
        assert torch.isfinite(spread(queries, routing.groups)).all()


def test_padding_makes_totals_few():
    """About 800 of 1600 cells, with a standard deviation of 20, which is little more than 1 of 64."""
    totals = [set(), set()]
    for _ in range(60):
        choice = random_choice((40, 40), (0, 1), 1, batch=1)
        for padded, seen in enumerate(totals):
            seen.add(sum(route(choice, (40, 40), (0, 1), 1, padded=bool(padded)).packed))
    assert len(totals[0]) > 25 and len(totals[1]) < 12


@pytest.mark.parametrize('position', range(3))
def test_route_where_all_of_an_image_is_skipped(position):
    choice = torch.ones(3, 2, 4, dtype=torch.long)
    choice[position] = 0
    check_routing(route(choice, (3, 8), (0, 2), 2), choice, (3, 8), (0, 2), 2, 0)
    nothing = route(torch.zeros_like(choice), (3, 8), (0, 2), 2, padded=True)
    assert nothing.lengths == [0, 0, 0] and nothing.surplus == 0
    queries = means(torch.randn(72, 5), nothing.groups)
    assert queries.shape == (0, 5) and torch.equal(spread(queries, nothing.groups), torch.zeros(72, 5))


@pytest.mark.parametrize('shape, phis, region, num_extra', LAYOUTS)
def test_means_and_spread_give_each_cell_its_patch(shape, phis, region, num_extra):
    """Through both directions a cell becomes the mean of its patch, 0 if skipped; extra tokens stay."""
    choice = random_choice(shape, phis, region)
    tokens = torch.randn(3, num_extra + shape[0] * shape[1], 2)
    expected = tokens.clone()
    for image, (row, column) in itertools.product(range(3), itertools.product(*map(range, shape))):
        phi = phis[choice[image, row // region, column // region]]
        maps, out = (x[image, num_extra:].unflatten(0, shape) for x in (tokens, expected))
        top, left = (row - row % phi, column - column % phi) if phi else (0, 0)
        out[row, column] = maps[top:top + phi, left:left + phi].mean((0, 1)) if phi else 0

    groups = route(choice, shape, phis, region, num_extra).groups
    found = spread(means(tokens.flatten(0, 1), groups), groups).view_as(tokens)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize('padded', [False, True])
@pytest.mark.parametrize('shape, phis, region, num_extra', LAYOUTS + PADDED)
def test_routing_of_tokens_and_of_a_table_that_images_share(shape, phis, region, num_extra, padded):
    choice, size = random_choice(shape, phis, region), num_extra + math.prod(shape)
    routing, tokens = route(choice, shape, phis, region, num_extra, padded), torch.randn(3, size, 2)
    change = torch.randn(sum(routing.packed), 2)
    queries = sum(slow_queries(choice, shape, phis, region, num_extra), [])
    added = tokens.clone().flatten(0, 1)
    for query, rows in zip(change, queries):
        added[list(rows)] += query
    assert torch.equal(routing.add_changes(tokens, change), added.view_as(tokens))
    assert routing.queries.tolist() == routing.lengths
    with torch.no_grad():
        assert torch.equal(routing.add_changes_(tokens.clone(), change), added.view_as(tokens))
    for table in (tokens, tokens[0]):
        rows = table.expand(3, size, 2).flatten(0, 1)
        expected = torch.stack([rows[list(query)].mean(0) for query in queries] + [torch.zeros(2)] * routing.surplus)
        torch.testing.assert_close(routing.means(table), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('padded', [False, True])
@pytest.mark.parametrize('layout', LAYOUTS + PADDED)
def test_means_and_spread_are_adjoint(layout, padded):
    """<means(x), y> = <x, spread(y / rows of the group)>."""
    routing, size = random_routing(*layout, padded)
    rows = torch.tensor([len(group) for group in members(routing.groups)])
    x, y = torch.randn(size, 3, dtype=torch.double), torch.randn(len(rows), 3, dtype=torch.double)
    back = spread(y / rows.clamp(min=1)[:, None], routing.groups)
    torch.testing.assert_close((means(x, routing.groups) * y).sum(), (x * back).sum())


@pytest.mark.parametrize('layout', LAYOUTS)
def test_gradients_of_means_and_spread(layout):
    routing, size = random_routing(*layout, batch=2)
    x = torch.randn(size, 2, dtype=torch.double, requires_grad=True)
    y = torch.randn(sum(routing.lengths), 2, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: means(x, routing.groups), x)
    assert torch.autograd.gradcheck(lambda y: spread(y, routing.groups), y)


@pytest.mark.parametrize('shape, phis', [((16, 17), (1, 2, 4)), ((20, 20), (0, 1))])
def test_gradients_pass_by_the_surplus(shape, phis):
    """Means of the rows with a surplus have the gradients of those without, and hand on none of the surplus."""
    choice = random_choice(shape, phis, max(phis))
    plain, padded = (route(choice, shape, phis, max(phis), 1, padded) for padded in (False, True))
    num, gradients = sum(plain.lengths), []
    assert padded.surplus
    tokens = torch.randn(3 * (1 + math.prod(shape)), 2, requires_grad=True)
    weights = torch.randn(num + padded.surplus, 2)
    for routing in (plain, padded):
        queries = means(tokens, routing.groups)
        served = spread(queries.square(), routing.groups).sum()
        gradients.append(torch.autograd.grad((queries * weights[:len(queries)]).sum() + served, tokens)[0])
    assert torch.equal(*gradients) and torch.isfinite(gradients[0]).all()


@pytest.mark.parametrize('padded', [False, True])
@pytest.mark.parametrize('layout', LAYOUTS)
def test_add_spread_is_a_sum_in_place(layout, padded):
    routing, size = random_routing(*layout, padded)
    table, values = torch.randn(size, 3), torch.randn(sum(routing.packed), 3)
    expected = table + spread(values, routing.groups)
    with torch.no_grad():
        assert add_spread_(table, values, routing.groups) is table
    assert torch.equal(table, expected)


@pytest.mark.parametrize('padded', [False, True])
@pytest.mark.parametrize('layout', LAYOUTS)
def test_changes_have_gradients(layout, padded):
    """Those of the queries that serve a token; the tokens are left as they are."""
    routing, size = random_routing(*layout, padded)
    tokens = torch.randn(3, size // 3, 2, dtype=torch.double, requires_grad=True)
    change = torch.randn(sum(routing.packed), 2, dtype=torch.double, requires_grad=True)
    before = tokens.detach().clone()
    assert torch.autograd.gradcheck(routing.add_changes, (tokens, change))
    assert torch.equal(tokens, before)


@pytest.mark.parametrize('phis', [(1, 2), (0, 2)])
def test_add_spread_of_many_channels(phis):
    """18 rows of 2^17 numbers are more than are added at once."""
    routing, size = random_routing((3, 3), phis, 2, 0, batch=2)
    table, values = torch.randn(size, 2**17), torch.randn(sum(routing.lengths), 2**17)
    expected = torch.stack([
        row if group == len(values) else row + values[group] for row, group in zip(table, routing.groups.group)])
    with torch.no_grad():
        assert torch.equal(add_spread_(table, values, routing.groups), expected)


@pytest.mark.parametrize('phis', [(1, 2), (0, 2)])
def test_half_precision_is_added_in_that_of_the_tokens(phis):
    """As under autocast."""
    routing, size = random_routing((5, 4), phis, 2, 1)
    tokens, change = torch.randn(3, size // 3, 3), torch.randn(sum(routing.lengths), 3, dtype=torch.bfloat16)
    expected = tokens + spread(change.float(), routing.groups).view_as(tokens)
    assert torch.equal(routing.add_changes(tokens, change), expected)
    with torch.no_grad():
        assert torch.equal(routing.add_changes_(tokens, change), expected)


@pytest.mark.parametrize('num_extra', [0, 1])
def test_what_inference_mode_makes_first_serves_training(num_extra):
    for table in (region_table, patch_groups, candidate_centres):
        table.cache_clear()
    shape, phis = (5, 7), (0, 1, 2)
    choice, tokens = random_choice(shape, phis, 2), torch.randn(3, num_extra + 35, 4, requires_grad=True)
    candidates = torch.randn(3, 35 + 12, 4, requires_grad=True)

    def run():
        groups, centres = route(choice, shape, phis, 2, num_extra).groups, candidate_centres(shape, phis, CPU)
        served = spread(means(tokens.flatten(0, 1), groups), groups).square().sum()
        pooled = pool(tokens, shape, 2, num_extra).square().sum() * centres.sum()
        return served + pooled + sum_over_granularities(candidates, shape, phis).square().sum()

    with torch.inference_mode():
        inferred = run()
    tables = [*region_table(shape, phis, 2, CPU), candidate_centres(shape, phis, CPU),
              *vars(patch_groups(3, shape, 2, num_extra, CPU)).values()]
    assert not any(table.is_inference() for table in tables if isinstance(table, torch.Tensor))
    loss = run()
    torch.testing.assert_close(loss, inferred.clone())
    loss.backward()
    assert tokens.grad.abs().sum() > 0 and candidates.grad.abs().sum() > 0
