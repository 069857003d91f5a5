import math

import pytest
import torch

from mmdyn.models import native
from mmdyn.models.dge import grains
from mmdyn.models.native import routing

pytestmark = pytest.mark.skipif(native.library() is None, reason='mmdyn was installed without a compiler')


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
