import math
from fractions import Fraction

import pytest
import torch

from mmdyn.models.cfvit import fine_sequence, num_informative, select, split, update_score

# 0.07 * 100 and 0.55 * 100 are a little more than 7 and 55 in floats.
ALPHAS = [
    '0',
    '0.01',
    '0.07',
    '0.1',
    '0.2',
    '0.25',
    '0.3',
    '0.4',
    '0.5',
    '0.55',
    '0.6',
    '0.7',
    '0.75',
    '0.8',
    '0.9',
    '0.99',
    '1',
]


@pytest.mark.parametrize('num', [1, 9, 10, 16, 49, 64, 81, 100, 196])
@pytest.mark.parametrize('alpha', ALPHAS)
def test_equation_10(alpha, num):
    """With exact fractions: 4 * ceil(Nc * alpha) fine patches and floor(Nc * (1 - alpha)) coarse ones."""
    exact, count = Fraction(alpha), num_informative(float(alpha), num)
    assert 4 * count + num - count == 4 * math.ceil(num * exact) + math.floor(num * (1 - exact))


@pytest.mark.parametrize(
    'alpha, num, count',
    [
        (0.5, 49, 25),
        (0.5, 81, 41),
        (0.5, 16, 8),
        (0.7, 10, 7),
        (0.07, 100, 7),
        (0.1 * 3, 10, 3),
        (0.3, 9, 3),
        (1 / 3, 9, 3),
        (0.001, 49, 1),
        (0, 49, 0),
        (1, 49, 49),
    ],
)
def test_number_of_informative_patches_by_hand(alpha, num, count):
    assert num_informative(alpha, num) == count


@pytest.mark.parametrize('decay', [0.0, 0.5, 0.99])
def test_global_class_attention_weighs_the_blocks_from_the_last(decay):
    """Eq. 9 without recursion: block k of K has the weight (1 - decay) * decay^(K - k)."""
    rows = torch.rand(5, 2, 7, dtype=torch.double)
    score = torch.zeros(2, 7, dtype=torch.double)
    for row in rows:
        score = update_score(score, row, decay)
    expected = sum((1 - decay) * decay ** (4 - k) * row for k, row in enumerate(rows))
    torch.testing.assert_close(score, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize('count', range(7))
def test_select_takes_the_highest_scores(count):
    """Scores on both sides of 0; chosen and others are in order of place."""
    scores = torch.tensor([[0.1, -3, 5, 0, 4, 2], [6, 5, 4, 3, 2, 1], [-6, -5, -4, -3, -2, -1]])
    chosen, rest = select(scores, count)
    assert chosen.shape == (3, count) and rest.shape == (3, 6 - count)
    for image, score in enumerate(scores.tolist()):
        highest = {score.index(value) for value in sorted(score)[6 - count :]}
        assert chosen[image].tolist() == sorted(highest)
        assert rest[image].tolist() == sorted(set(range(6)) - highest)


def test_equal_scores_go_to_the_first_places():
    chosen, rest = select(torch.tensor([[1.0, 1, 1, 1, 1], [0, 2, 1, 1, 1]]).repeat(1, 1), 3)
    assert chosen.tolist() == [[0, 1, 2], [1, 2, 3]] and rest.tolist() == [[3, 4], [0, 4]]


@pytest.mark.parametrize('rows, columns', [(1, 1), (2, 2), (3, 5), (7, 7), (9, 9)])
def test_split_finds_the_four_patches_on_a_grid_of_numbers(rows, columns):
    """The fine grid is cut into squares of 2 x 2."""
    fine = torch.arange(4 * rows * columns).view(2 * rows, 2 * columns)
    squares = [
        fine[2 * row : 2 * row + 2, 2 * column : 2 * column + 2].flatten().tolist()
        for row in range(rows)
        for column in range(columns)
    ]
    everything = torch.arange(rows * columns)
    patches = torch.stack([everything, everything.flip(0), torch.randint(rows * columns, (rows * columns,))])
    expected = [sum((squares[patch] for patch in image), []) for image in patches.tolist()]
    assert split(patches, columns).tolist() == expected


def test_split_by_hand():
    """Patch 4 is the middle of 3 x 3, on 6 x 6 rows 2 and 3, columns 2 and 3."""
    assert split(torch.tensor([[4, 0], [8, 2]]), 3).tolist() == [
        [14, 15, 20, 21, 0, 1, 6, 7],
        [28, 29, 34, 35, 4, 5, 10, 11],
    ]
    assert split(torch.zeros(2, 0, dtype=torch.long), 3).shape == (2, 0)


@pytest.mark.parametrize('count', [0, 1, 5, 9])
def test_fine_sequence_is_class_token_then_splits_then_others(count):
    """Tokens tell where they come from: image, stage (2 is the class token), place."""

    def tokens(stage, places):
        return torch.tensor([[[image, stage, place] for place in range(places)] for image in range(2)])

    chosen, rest = select(torch.randn(2, 9), count)
    sequence = fine_sequence(tokens(2, 1), tokens(1, 36), tokens(0, 9), chosen, rest, 3)
    for image, order in enumerate(sequence.tolist()):
        expected = [[image, 2, 0]]
        for patch in chosen[image].tolist():
            first = patch // 3 * 12 + patch % 3 * 2
            expected += [[image, 1, place] for place in (first, first + 1, first + 6, first + 7)]
        expected += [[image, 0, patch] for patch in rest[image].tolist()]
        assert order == expected
        assert len(order) == 1 + 4 * count + 9 - count


def test_gradients_reach_the_tokens_that_are_in_the_sequence():
    class_token, fine, coarse = (torch.randn(1, n, 2, requires_grad=True) for n in (1, 16, 4))
    fine_sequence(class_token, fine, coarse, torch.tensor([[3]]), torch.tensor([[0, 1, 2]]), 2).sum().backward()
    assert fine.grad[0, :, 0].nonzero().flatten().tolist() == [10, 11, 14, 15]
    assert coarse.grad[0, :, 0].tolist() == [1, 1, 1, 0] and class_token.grad.tolist() == [[[1, 1]]]
