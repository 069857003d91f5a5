import itertools

import pytest
import torch

from mmdyn.models.dge.grains import (candidate_centres, candidate_of_cell, candidate_values, compress, decompress, grid,
                                     pool, route, spread)

# Map, granularities, side of a region, extra tokens.
LAYOUTS = [((8, 8), (1, 2, 4), 4, 0), ((5, 7), (1, 2, 4), 4, 1), ((9, 6), (0, 1), 1, 2), ((13, 3), (2, 4), 8, 0),
           ((4, 4), (1, 2, 4, 8), 8, 1), ((3, 10), (0, 2), 2, 0), ((1, 1), (1, 4), 4, 2)]


def patches(shape, phis):
    """(granularity, first row, first column) of each candidate of an image, in order."""
    return [(phi, row, column) for phi in phis if phi
            for row in range(0, shape[0], phi) for column in range(0, shape[1], phi)]


def random_choice(shape, phis, region, batch=3):
    return torch.randint(len(phis), (batch, *grid(region, shape)))


@pytest.mark.parametrize('side, shape, expected', [(1, (5, 7), (5, 7)), (4, (8, 4), (2, 1)), (4, (9, 3), (3, 1)),
                                                   (8, (1, 17), (1, 3))])
def test_grid_rounds_up(side, shape, expected):
    assert grid(side, shape) == expected


@pytest.mark.parametrize('shape', [(8, 8), (5, 7), (9, 6), (13, 3), (1, 1)])
@pytest.mark.parametrize('side', [1, 2, 3, 4, 8])
def test_pool_is_the_mean_of_valid_cells(shape, side):
    cells = torch.randn(2, shape[0] * shape[1], 3) + 5
    maps = cells.unflatten(1, shape)
    expected = [maps[:, row:row + side, column:column + side].mean((1, 2)) for _, row, column in patches(shape, [side])]
    torch.testing.assert_close(pool(cells, shape, side), torch.stack(expected, 1), rtol=1e-5, atol=1e-5)


def test_pool_of_side_one_copies_nothing():
    cells = torch.randn(2, 35, 3)
    assert pool(cells, (5, 7), 1) is cells


def test_spread_repeats_and_cuts():
    assert spread(torch.tensor([[[1, 2], [3, 4]]]), 2, (3, 4)).tolist() == [[1, 1, 2, 2, 1, 1, 2, 2, 3, 3, 4, 4]]


@pytest.mark.parametrize('shape, phis, region, _', LAYOUTS)
def test_candidates_have_the_value_of_their_region_and_granularity(shape, phis, region, _):
    values = torch.randn(2, *grid(region, shape), len(phis))
    expected = [values[:, row // region, column // region, phis.index(phi)]
                for phi, row, column in patches(shape, phis)]
    assert torch.equal(candidate_values(values, shape, phis, region), torch.stack(expected, 1))


@pytest.mark.parametrize('shape, phis, _, __', LAYOUTS)
def test_each_cell_lies_in_its_candidate(shape, phis, _, __):
    table, candidates = candidate_of_cell(shape, phis, torch.device('cpu')), patches(shape, phis)
    assert table.shape == (len(phis), shape[0] * shape[1])
    for k, phi in enumerate(phis):
        for cell, (row, column) in enumerate(itertools.product(*map(range, shape))):
            expected = candidates.index((phi, row - row % phi, column - column % phi)) if phi else 0
            assert table[k, cell] == expected


@pytest.mark.parametrize('shape, phis, _, __', LAYOUTS)
def test_centres_are_the_means_of_valid_cells(shape, phis, _, __):
    expected = []
    for phi, top, left in patches(shape, phis):
        rows, columns = range(top, min(top + phi, shape[0])), range(left, min(left + phi, shape[1]))
        expected.append([sum(columns) / len(columns), sum(rows) / len(rows)])
    assert candidate_centres(shape, phis, torch.device('cpu')).tolist() == expected


def test_centres_by_hand():
    """3 rows and 5 columns: patches of side 2 end in a row of height 1 and a column of width 1."""
    assert candidate_centres((3, 5), (0, 2, 4), torch.device('cpu')).tolist() == [
        [0.5, 0.5], [2.5, 0.5], [4, 0.5], [0.5, 2], [2.5, 2], [4, 2], [1.5, 1], [4, 1]]


@pytest.mark.parametrize('shape, phis, region, num_extra', LAYOUTS)
def test_routing_lists_the_chosen_candidates(shape, phis, region, num_extra):
    choice, candidates = random_choice(shape, phis, region), patches(shape, phis)
    source, lengths, query = [], [], []
    for image, chosen in enumerate(choice.tolist()):
        first, size = len(source), image * (num_extra + len(candidates))
        source += range(size, size + num_extra)
        served = dict()
        for index, (phi, row, column) in enumerate(candidates):
            if phis[chosen[row // region][column // region]] == phi:
                served[phi, row, column] = len(source)
                source.append(size + num_extra + index)
        lengths.append(len(source) - first)
        tokens = list(range(first, first + num_extra))
        for row, column in itertools.product(*map(range, shape)):
            phi = phis[chosen[row // region][column // region]]
            tokens.append(served[phi, row - row % phi, column - column % phi] if phi else None)
        query.append(tokens)
    query = [[len(source) if q is None else q for q in tokens] for tokens in query]

    routing = route(choice, shape, phis, region, num_extra)
    assert routing.lengths == lengths
    assert routing.source.tolist() == source
    assert routing.query.tolist() == query
    assert routing.skips == (0 in phis)


@pytest.mark.parametrize('shape, phis, region, num_extra', LAYOUTS)
def test_compress_and_decompress_give_each_cell_its_patch(shape, phis, region, num_extra):
    """Through both directions a cell becomes the mean of its patch, 0 if skipped; extra tokens stay."""
    choice = random_choice(shape, phis, region)
    tokens = torch.randn(3, num_extra + shape[0] * shape[1], 2)
    pooled = [pool(tokens[:, num_extra:], shape, phi) for phi in phis if phi]
    candidates = torch.cat([tokens[:, :num_extra], *pooled], 1)
    expected = tokens.clone()
    for image, (row, column) in itertools.product(range(3), itertools.product(*map(range, shape))):
        phi = phis[choice[image, row // region, column // region]]
        maps, out = (x[image, num_extra:].unflatten(0, shape) for x in (tokens, expected))
        top, left = (row - row % phi, column - column % phi) if phi else (0, 0)
        out[row, column] = maps[top:top + phi, left:left + phi].mean((0, 1)) if phi else 0

    routing = route(choice, shape, phis, region, num_extra)
    torch.testing.assert_close(decompress(compress(candidates, routing), routing), expected, rtol=1e-6, atol=1e-6)
