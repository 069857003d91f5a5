import pytest
import torch
from torch.distributions import Normal
from torch.utils.flop_counter import FlopCounterMode

from mmdyn.models.cfvit import FeatureReuse


@pytest.mark.parametrize('kind', ['mlp', 'linear'])
@pytest.mark.parametrize('norm_eps', [1e-6, 0.1])
def test_equals_its_equation(kind, norm_eps, randomise):
    """A norm with weights of its own, then fc2(gelu(fc1(x))) or one linear layer, of each token."""
    reuse, tokens = randomise(FeatureReuse(4, 3, kind, norm_eps)).double(), torch.randn(2, 5, 4, dtype=torch.double)
    normed = (tokens - tokens.mean(-1, keepdim=True)) / (tokens.var(-1, False, keepdim=True) + norm_eps).sqrt()
    expected = normed * reuse.norm.weight + reuse.norm.bias
    weights = dict(reuse.mlp.named_parameters())
    if kind == 'mlp':
        assert weights['fc1.weight'].shape == (12, 4)
        expected = expected @ weights['fc1.weight'].T + weights['fc1.bias']
        expected = expected * Normal(0, 1).cdf(expected) @ weights['fc2.weight'].T + weights['fc2.bias']
    else:
        expected = expected @ weights['weight'].T + weights['bias']
    torch.testing.assert_close(reuse(tokens), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize('kind, by_hand', [('mlp', 2 * 4 * 12), ('linear', 4 * 4)])
def test_macs_of_a_token(kind, by_hand):
    reuse = FeatureReuse(4, 3, kind)
    with FlopCounterMode(display=False) as counter:
        reuse(torch.randn(2, 5, 4))
    assert reuse.macs() == by_hand == counter.get_total_flops() / 2 / 10
