import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from mmdyn.models import PVT, DeiT
from mmdyn.models.backbones.base import make_blocks
from mmdyn.models.cost import BackboneCost, CostMeter, LayerCost, stage_cost
from mmdyn.models.layers import Attention, EncoderBlock, PatchEmbed

# Sides of the maps of the blocks of the small backbones, for images of 52 x 36.
SHAPES = {'pvt': [(13, 9), (13, 9), (6, 4)], 'deit': [(13, 9)] * 3}
DGES = [
    dict(granularities=(1, 2, 4)),
    dict(granularities=(0, 1)),
    dict(granularities=(2, 4), region_size=8),
    dict(granularities=(1, 2, 4), routing='layer'),
]


@pytest.fixture
def plain_attention(monkeypatch):
    """Attention as matrix products, which every counter knows."""

    def attention(query, key, value):
        return (query @ key.transpose(-2, -1) / query.shape[-1] ** 0.5).softmax(-1) @ value

    monkeypatch.setattr(F, 'scaled_dot_product_attention', attention)


def count_queries(encoder, shape, num_extra):
    """Queries of each image, from the decision, region by region."""
    counts = []
    for image in encoder.decision.choice.tolist():
        count = num_extra
        for r, row in enumerate(image):
            for c, choice in enumerate(row):
                phi, side = encoder.granularities[choice], encoder.region
                if phi:
                    count += len(range(r * side, min((r + 1) * side, shape[0]), phi)) * len(
                        range(c * side, min((c + 1) * side, shape[1]), phi)
                    )
        counts.append(count)
    return counts


@pytest.mark.parametrize('dge', DGES)
@pytest.mark.parametrize('training', [False, True])
def test_cost_follows_from_the_decisions(name, dge, training, make_backbone, encoders):
    model = make_backbone(name, dge=dge, out_type='cls_token').train(training)
    model(3 * torch.randn(4, 3, 52, 36))
    cost, extras = model.cost, [0, 0, 1] if name == 'pvt' else [1, 1, 1]
    spent, weighted, dense = cost.stem, 0, 0
    for layer, encoder, shape, num_extra in zip(cost.layers, encoders(model), SHAPES[name], extras):
        queries = torch.tensor(count_queries(encoder, shape, num_extra))
        torch.testing.assert_close(layer.queries, queries, rtol=0, atol=0, check_dtype=False)
        spent += layer.static + layer.router + layer.per_query * queries
        weighted += layer.per_query * queries
        dense += layer.per_query * (num_extra + shape[0] * shape[1])
    assert len(cost.layers) == 3
    torch.testing.assert_close(cost.spent, spent.double(), rtol=1e-6, atol=0)
    torch.testing.assert_close(cost.query_ratio, weighted / dense, rtol=1e-6, atol=0)
    assert cost.query_ratio.requires_grad == training


@pytest.mark.parametrize('dge', DGES)
def test_cost_is_what_ran(name, dge, make_backbone, plain_attention):
    """A counter of the matrix products and convolutions that were executed, two operations for a multiply-add."""
    model = make_backbone(name, dge=dge, out_type='cls_token').eval()
    with FlopCounterMode(display=False) as counter:
        model(3 * torch.randn(4, 3, 52, 36))
    assert len(model.cost.query_ratio.unique()) > 1
    assert 2 * model.cost.spent.sum() == counter.get_total_flops()


def test_dense_cost_is_what_runs_without_dge(name, make_backbone, plain_attention):
    dense, dynamic = (make_backbone(name, dge=dge, out_type='cls_token') for dge in (None, DGES[0]))
    images = torch.randn(2, 3, 52, 36)
    with FlopCounterMode(display=False) as counter:
        dense(images)
    dynamic(images)
    assert [2 * cost for cost in dense.cost.spent.tolist()] == [counter.get_total_flops() / 2] * 2
    assert dense.cost.dense == dynamic.cost.dense == dense.cost.spent[0]
    assert dense.cost.query_ratio.tolist() == [1, 1]


@pytest.mark.parametrize('cls, arch, billions', [(PVT, 'small', 5.05), (DeiT, 'small', 6.15), (DeiT, 'tiny', 1.72)])
def test_known_models_at_256(cls, arch, billions, plain_attention):
    """What is known of them, and fvcore's count, which adds the norms."""
    model, images = cls(arch, out_type='cls_token').eval(), torch.randn(1, 3, 256, 256)
    fvcore = pytest.importorskip('fvcore.nn')  # a machine with a GPU may lack it
    counted = fvcore.FlopCountAnalysis(model, images).unsupported_ops_warnings(False).total()
    assert model.cost.dense == pytest.approx(billions * 1e9, rel=0.01)
    assert model.cost.dense == pytest.approx(counted, rel=0.01)


@pytest.mark.parametrize('dge, router', [(None, 0), (dict(granularities=(1, 2)), 3 * 4 * 2 * 12)])
def test_cost_of_a_stage_by_hand(dge, router):
    """12 channels; 5 x 7 cells, 3 x 4 regions of which have a router with 2 logits, and a class token."""
    stage, asked = SimpleNamespace(num_extra=1, patch_embed=PatchEmbed(3, 12, 4)), []
    make_blocks(stage, [EncoderBlock(12, Attention(12, 3), 2) for _ in range(2)], 12, dge)
    cost = stage_cost(stage, 'stages.0.', (5, 7), lambda encoder: asked.append(encoder) or torch.tensor([9, 20]))
    per_query, static = 2 * 144 + 2 * 36 * 12 + 2 * 12 * 24, 36 * 2 * 144
    assert asked == (list(stage.dge) if dge else [None, None]) and cost.stem == 35 * 12 * 3 * 16
    for i, layer in enumerate(cost.layers):
        assert (layer.name, layer.per_query, layer.static) == (f'stages.0.blocks.{i}', per_query, static)
        assert (layer.router, layer.dense_queries, layer.dynamic) == (router, 36, bool(dge))
    expected = [35 * 12 * 48 + 2 * (static + router + per_query * queries) for queries in (9, 20)]
    assert cost.spent.tolist() == expected


def test_bounds_by_hand(name, make_backbone):
    """Before any forward pass, on images of 32 x 32."""
    model = make_backbone(name, dge=dict(granularities=(1, 2, 4)))
    # A map of 8 x 8 has 4 patches of side 4, and DeiT's class token is always a query.
    assert model.ratio_bounds() == pytest.approx((4 / 64, 1) if name == 'pvt' else (5 / 65, 1))
    model = make_backbone(name, dge=dict(granularities=(0, 2)))
    assert model.ratio_bounds() == pytest.approx((0, 16 / 64) if name == 'pvt' else (1 / 65, 17 / 65))


def test_bounds_weigh_stages_by_the_cost_of_a_query(make_backbone):
    """16 channels, 16 keys: 2 * 16^2 + 2 * 16 * 16 + 4 * 16^2 = 2048; 24 channels, 16 keys: 8 * 24^2 + 2 * 16 * 24."""
    model = make_backbone('pvt', dge=dict(granularities=((1, 2, 4), (1, 2))))
    first, last = 2 * 2048, 5376
    assert model.ratio_bounds() == pytest.approx(((4 * first + 4 * last) / (64 * first + 16 * last), 1))


@pytest.mark.parametrize('frozen_stages', [-1, 1])
def test_training_cost_is_on_the_device_of_the_images(name, frozen_stages, make_backbone):
    """Also that of frozen layers, which are in evaluation mode. Another device than the default one, for which the meta
    device stands in here, shows what is made on the wrong one."""
    model, images = make_backbone(name, dge=DGES[0], frozen_stages=frozen_stages).train(), torch.randn(2, 3, 52, 36)
    with torch.device('meta'):
        model(images)
        assert model.cost.query_ratio.device == model.cost.spent.device == images.device
    assert model.cost.query_ratio.requires_grad
    assert model.cost.layers[0].queries.requires_grad == (frozen_stages < 0)


@pytest.fixture
def cost():
    """Two dynamic layers and a static one."""
    return BackboneCost(
        [
            LayerCost('a', 10, 100, 3, torch.tensor([4, 8]), 16, True),
            LayerCost('b', 30, 200, 5, torch.tensor([4, 2]), 8, True),
            LayerCost('c', 1000, 300, 0, torch.tensor([2, 2]), 2, False),
        ],
        stem=7,
    )


def test_sums_by_hand(cost):
    first = cost.layers[0]
    assert (first.spent.tolist(), first.dense, first.query_ratio.tolist()) == ([143, 183], 260, [0.25, 0.5])
    assert cost.spent.tolist() == [7 + 143 + 325 + 2300, 7 + 183 + 265 + 2300]
    assert cost.dense == 7 + 260 + 440 + 2300
    assert cost.query_ratio.tolist() == pytest.approx([(40 + 120) / (160 + 240), (80 + 60) / (160 + 240)])


def test_spent_at_a_ratio(cost):
    """The static layer cannot save: 7 + (100 + 3 + 80) + (200 + 5 + 120) + 2300."""
    assert cost.spent_at(0.5) == 7 + 183 + 325 + 2300
    assert [cost.spent_at(ratio) for ratio in cost.query_ratio.tolist()] == pytest.approx(cost.spent.tolist())


def test_meter_collects_its_mode_of_its_backbones(name, make_backbone):
    mine, other = make_backbone(name), make_backbone(name, dge=DGES[0])
    meters = [CostMeter(training, backbones) for training in (True, False) for backbones in (None, [mine], [])]
    mine.train()(torch.randn(1, 3, 32, 32))
    mine.eval()(torch.randn(2, 3, 32, 32))
    other.eval()(torch.randn(3, 3, 32, 32))
    seen = [[len(cost.spent) for cost in meter.take()] for meter in meters]
    assert seen == [[1], [1], [], [2, 3], [2], []]
    assert not any(meter.take() for meter in meters)


def test_meter_stops_when_it_is_dropped():
    """Costs, which hold the graph of a training step, must not pile up."""
    meter = CostMeter(training=True)
    dropped = weakref.ref(meter)
    del meter
    gc.collect()
    assert dropped() is None


def test_passes_of_a_backbone_that_is_not_counted(make_backbone):
    model, meter = make_backbone('pvt').eval(), CostMeter(training=False)
    model.is_counted = False
    model(torch.rand(1, 3, 32, 32))
    assert not meter.take()
    model.is_counted = True
    model(torch.rand(1, 3, 32, 32))
    assert len(meter.take()) == 1
