import pytest
import torch

from mmdyn.models.cfvit import coarse_targets, fine_targets

COLUMNS = 3
# Which of the 6 x 6 fine patches lie in each of the 3 x 3 coarse ones.
INSIDE = [
    [(2 * row + i) * 6 + 2 * column + j for i in (0, 1) for j in (0, 1)] for row in range(3) for column in range(3)
]


def test_a_coarse_label_is_the_mean_of_its_patches():
    labels = torch.rand(2, 36, 5)
    expected = torch.stack([sum(labels[:, place] for place in places) / 4 for places in INSIDE], 1)
    torch.testing.assert_close(coarse_targets(labels, COLUMNS), expected)


@pytest.mark.parametrize('chosen', [[[1, 4, 8], [0, 2, 3]], [list(range(9))] * 2, [[], []]])
def test_a_fine_label_is_that_of_its_token(chosen):
    labels = torch.rand(2, 36, 5)
    targets = fine_targets(labels, torch.tensor(chosen, dtype=torch.long).view(2, -1), COLUMNS)
    for target, label, patches in zip(targets, labels, chosen):
        expected = [label[place] for patch in patches for place in INSIDE[patch]]
        expected += [label[INSIDE[patch]].mean(0) for patch in range(9) if patch not in patches]
        torch.testing.assert_close(target, torch.stack(expected))


def test_labels_of_another_grid():
    with pytest.raises(ValueError, match='Token labels of 9 patches do not fit 6 x 6 fine patches'):
        fine_targets(torch.rand(2, 9, 5), torch.zeros(2, 1, dtype=torch.long), COLUMNS)
