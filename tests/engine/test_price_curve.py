import pytest
import torch

from mmdyn.engine.price_curve import PRICES, PriceCurve
from mmdyn.models import PVT
from mmdyn.models.backbones.budget import encoders_of, expected_ratios, train_by

ARCH = dict(embed_dims=(16, 32), depths=(1, 2), num_heads=(1, 2), mlp_ratios=(2, 2), sr_ratios=(2, 1))


@pytest.fixture(params=['region', 'layer'])
def backbone(request):
    """On images that leave regions over the edge, and with a class token."""
    dge = dict(granularities=(1, 2, 4), routing=request.param)
    model = PVT(ARCH, img_size=64, dge=dge, out_type='cls_token').train()
    for stage in model.stages:
        for encoder in stage.dge:
            torch.nn.init.normal_(encoder.router.weight, std=0.5)
    return model


@torch.no_grad()
@pytest.mark.parametrize('noise', [1.0, 2.0])
def test_expected_ratios_are_the_means_of_what_is_drawn(backbone, noise):
    images = torch.randn(2, 3, 72, 56)
    for encoder in encoders_of(backbone):
        encoder.noise = noise
    for price in (0.0, 0.1):
        train_by(backbone, price)
        drawn, expected = [], []
        for _ in range(60):
            backbone(images)
            drawn.append(backbone.cost.query_ratio.mean())
            expected.append(expected_ratios(backbone, torch.tensor([price])))
        drawn, expected = torch.stack(drawn), torch.cat(expected)
        assert 0.3 < expected.mean() < 0.99 and expected.std() < drawn.std()
        assert (drawn - expected).mean().abs() < 4 * drawn.std() / 60**0.5


def test_expected_ratios_without_noise_are_those_of_the_gates(backbone):
    """And still tell the routers which way to go."""
    for encoder in encoders_of(backbone):
        encoder.noise = 0.0
    backbone(torch.randn(2, 3, 72, 56))
    expected = expected_ratios(backbone, torch.zeros(1))
    torch.testing.assert_close(expected, backbone.cost.query_ratio.mean()[None])
    expected.sum().backward()
    assert all(encoder.router.weight.grad.abs().max() > 0 for encoder in encoders_of(backbone))


@torch.no_grad()
def test_expected_ratios_do_not_depend_on_the_price_of_the_pass(backbone):
    """But for later layers, whose tokens come from other queries: all gates are given."""
    images, found = torch.randn(2, 3, 64, 64), []
    for stage, side in zip(backbone.stages, (4, 2)):
        for encoder in stage.dge:
            encoder.forced = torch.zeros(side, side, dtype=torch.long)
    for price in (None, 0.2):
        train_by(backbone, price)
        backbone(images)
        found.append(expected_ratios(backbone, torch.tensor([-0.1, 0.0, 0.3])))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
    assert found[0][0] > found[0][1] > found[0][2]


@torch.no_grad()
def test_frozen_layers_spend_what_they_spent(backbone):
    backbone.stages[0].eval()
    backbone(torch.randn(2, 3, 64, 64))
    first = backbone.cost.layers[0]
    total = sum(layer.per_query * layer.dense_queries for layer in backbone.cost.layers)
    # At the greatest price all others have the fewest queries: 2 x 2 and 1 class token of 64 + 1.
    wanted = first.per_query * first.queries.float().mean() + sum(
        layer.per_query * 5 for layer in backbone.cost.layers[1:]
    )
    torch.testing.assert_close(expected_ratios(backbone, torch.tensor([1e3])), (wanted / total)[None])


def test_price_is_interpolated_and_an_average():
    curve = PriceCurve(momentum=0.5)
    assert curve.price(0.5) == 0
    curve.ratios = [1 - i / (len(PRICES) - 1) for i in range(len(PRICES))]
    assert curve.price(0.5) == pytest.approx(0, abs=1e-9)
    assert curve.price(1 - 10.25 / (len(PRICES) - 1)) == pytest.approx(0.75 * PRICES[10] + 0.25 * PRICES[11])
    assert curve.price(2.0) == PRICES[0] and curve.price(-1.0) == PRICES[-1]


@torch.no_grad()
def test_update_is_a_moving_average(backbone):
    images, prices = torch.randn(2, 3, 64, 64), torch.from_numpy(PRICES).float()
    curve, expected = PriceCurve(momentum=0.75), None
    for _ in range(3):
        backbone(images)
        new = expected_ratios(backbone, prices)
        expected = new if expected is None else 0.75 * expected + 0.25 * new
        curve.update([backbone])
    assert curve.ratios == pytest.approx(expected.tolist(), rel=1e-5)
    assert PriceCurve(curve.ratios).price(0.5) == curve.price(0.5)
