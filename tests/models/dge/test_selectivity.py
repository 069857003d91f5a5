import numpy as np
import pytest
import torch

from mmdyn.models.dge import share_of_finest, share_within_images
from mmdyn.models.dge.encoder import Decision


def test_share_of_finest_by_hand():
    choice = torch.tensor([[[1, 1], [0, 2]], [[2, 2], [2, 2]]])
    assert share_of_finest(Decision(choice, torch.zeros(2)), (0, 1, 2)).tolist() == [0.5, 0]
    assert share_of_finest(Decision(choice, torch.zeros(2)), (1, 2, 4)).tolist() == [0.25, 0]


def test_in_training_the_logits_count_and_not_what_was_drawn():
    logits = torch.tensor([[[[1.0, 0.0], [0.0, 1.0], [2.0, 1.0]]]])
    decision = Decision(torch.ones(1, 1, 3, dtype=torch.long), torch.zeros(1), logits)
    assert share_of_finest(decision, (1, 2)).tolist() == pytest.approx([2 / 3])


@pytest.mark.parametrize(
    'shares, within',
    [
        ([0.5, 0.5, 0.5], 1),  # half of each image
        ([0, 1, 1], 0),  # one choice for each image
        ([1, 1], 0),  # nothing varies
        ([0.25, 0.75], 3 / 4),  # 3/16 of 1/4
    ],
)
def test_share_within_images_by_hand(shares, within):
    assert share_within_images(np.mean(shares), np.square(shares).mean()) == pytest.approx(within)


def test_share_within_images_is_that_of_an_analysis_of_variance():
    choices = np.random.default_rng(0).random((5, 40)) < np.linspace(0.1, 0.9, 5)[:, None]
    shares = choices.mean(1)
    found = share_within_images(shares.mean(), np.square(shares).mean())
    assert found == pytest.approx(choices.var(1).mean() / choices.var())
