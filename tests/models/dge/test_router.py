import math

import pytest
import torch
from mmengine.model import initialize
from torch import nn
from torch.nn.functional import one_hot

from mmdyn.models.dge.router import Router, choose, straight_through_gates
from mmdyn.models.dge.routing import grid


@pytest.mark.parametrize(
    'granularities, probabilities',
    [
        ((1, 2, 4), [0.95, 0.025, 0.025]),
        ((1, 2), [0.95, 0.05]),
        ((0, 1), [0.05, 0.95]),
        ((0, 2, 4), [0.025, 0.95, 0.025]),
        ((1,), [1.0]),
    ],
)
def test_router_starts_with_the_finest_granularity(granularities, probabilities):
    router = Router(4096, granularities)
    torch.testing.assert_close(router(torch.zeros(4096)).softmax(0), torch.tensor(probabilities))
    # The standard deviation of a sample of n has itself one of std / sqrt(2 n).
    assert abs(router.weight.std() - 0.01) < 4 * 0.01 / (2 * router.weight.numel()) ** 0.5


def test_router_keeps_its_start_where_linear_layers_are_initialised():
    router = Router(8, (1, 2, 4))
    before = [parameter.clone() for parameter in router.parameters()]
    initialize(nn.ModuleList([router, nn.Linear(3, 3)]), dict(type='Constant', layer='Linear', val=7, bias=7))
    assert all(map(torch.equal, router.parameters(), before))


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_router_computes_in_float32(dtype):
    """Under autocast, and where its weights and the regions are in half precision."""
    router, regions = Router(8, (1, 2, 4)).to(dtype), torch.randn(2, 4, 8, dtype=dtype)
    expected = regions.float() @ router.weight.float().T + router.bias.float()
    for enabled in (False, True):
        with torch.autocast('cpu', torch.bfloat16, enabled=enabled):
            logits = router(regions)
        assert logits.dtype == torch.float32
        torch.testing.assert_close(logits, expected, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize('num_extra', [0, 2])
@pytest.mark.parametrize(
    'side, shape', [(1, (5, 7)), (4, (8, 8)), (4, (9, 3)), (8, (1, 17)), (17, (1, 17)), (3, (20, 20))]
)
@pytest.mark.parametrize('grad', [False, True])
def test_choice_is_that_of_the_greatest_logit(grad, side, shape, num_extra):
    """Eq. 1 and 2, one region after the other."""
    router, tokens = Router(5, (1, 2, 4)), torch.randn(3, num_extra + math.prod(shape), 5)
    nn.init.normal_(router.weight), nn.init.normal_(router.bias)
    maps = tokens[:, num_extra:].unflatten(1, shape)
    logits = torch.stack(
        [
            maps[:, row : row + side, column : column + side].mean((1, 2)) @ router.weight.T + router.bias
            for row in range(0, shape[0], side)
            for column in range(0, shape[1], side)
        ],
        1,
    )
    for function in (choose, choose.plain):
        with torch.set_grad_enabled(grad):
            choice = function(router, tokens, shape, side, num_extra)
        assert choice.shape == (3, *grid(side, shape))
        # But for rounding errors between logits that are nearly alike.
        chosen = logits.gather(-1, choice.flatten(1)[..., None]).squeeze(-1)
        torch.testing.assert_close(chosen, logits.max(-1).values, rtol=1e-5, atol=1e-5)


def test_gates_follow_the_distribution_of_the_logits():
    """Gumbel noise makes the hard choice a sample of softmax(logits), whatever the temperature (eq. 4)."""
    logits = torch.tensor([1.0, 0.0, -2.0])
    gates, choice = straight_through_gates(logits.expand(100_000, 3), tau=0.3)
    assert torch.equal(gates, one_hot(choice, 3).float())
    frequency, expected = gates.mean(0), logits.softmax(0)
    assert ((frequency - expected).abs() < 4 * (expected * (1 - expected) / 100_000).sqrt()).all()


@pytest.mark.parametrize('noise', [0.5, 0.25])
def test_less_noise_is_a_lower_temperature_of_the_choice(noise):
    """P(argmax_k x_k + s g_k = k) = softmax(x / s)_k, because dividing by s changes no greatest."""
    logits = torch.tensor([0.3, 0.0, -0.4])
    gates, _ = straight_through_gates(logits.expand(100_000, 3), tau=1.0, noise=noise)
    frequency, expected = gates.mean(0), (logits / noise).softmax(0)
    assert ((frequency - expected).abs() < 4 * (expected * (1 - expected) / 100_000).sqrt()).all()


def test_gates_without_noise_are_those_of_inference():
    logits = torch.randn(50, 3, requires_grad=True)
    gates, choice = straight_through_gates(logits, tau=1.0, noise=0.0)
    assert torch.equal(choice, logits.argmax(-1))
    weights = torch.randn(50, 3)
    torch.testing.assert_close(
        torch.autograd.grad((weights * gates).sum(), logits),
        torch.autograd.grad((weights * logits.softmax(-1)).sum(), logits),
    )


def test_gates_have_the_gradient_of_the_soft_score():
    """d softmax(x / tau)_0 = s_0 (1[k=0] - s_k) / tau (eq. 5)."""
    logits = torch.randn(3, requires_grad=True)
    torch.manual_seed(1)
    gates, _ = straight_through_gates(logits, tau=0.5)
    torch.manual_seed(1)
    soft = ((logits.detach() - torch.empty(3).exponential_().log()) / 0.5).softmax(0)
    gates[0].backward()
    torch.testing.assert_close(
        logits.grad, soft[0] * (torch.tensor([1.0, 0.0, 0.0]) - soft) / 0.5, rtol=1e-5, atol=1e-6
    )


def test_gates_of_a_given_choice():
    """Of many regions, though all of them may share one row of logits; the gradient is that of the soft score."""
    logits, choice = torch.randn(2, 1, 3, requires_grad=True), torch.tensor([[0, 2, 2, 1], [1, 1, 0, 2]])
    torch.manual_seed(1)
    gates, given = straight_through_gates(logits, 1.0, choice)
    assert torch.equal(given, choice) and torch.equal(gates, one_hot(choice, 3).float())
    weights = torch.randn(2, 4, 3)
    torch.manual_seed(1)
    soft = (logits - torch.empty(2, 1, 3).exponential_().log()).softmax(-1)
    torch.testing.assert_close(
        torch.autograd.grad((weights * gates).sum(), logits),
        torch.autograd.grad((weights * soft).sum(), logits),
        rtol=1e-5,
        atol=1e-6,
    )
