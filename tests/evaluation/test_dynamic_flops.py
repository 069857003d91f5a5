import pytest
import torch

import mmdyn  # noqa: F401
from mmdyn.evaluation import DynamicFLOPs
from mmdyn.models import PVT

ARCH = dict(embed_dims=(16, 32), depths=(1, 1), num_heads=(1, 2), mlp_ratios=(2, 2), sr_ratios=(2, 1))


def backbone():
    torch.manual_seed(0)
    model = PVT(ARCH, img_size=32, dge=dict(granularities=(1, 2, 4))).eval()
    for stage in model.stages:
        torch.nn.init.normal_(stage.dge[0].router.weight)
        torch.nn.init.zeros_(stage.dge[0].router.bias)
    return model


def images(count, side=32):
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(count))


@torch.no_grad()
def expected(model, batches):
    """Means over all images, each run alone."""
    costs = []
    for image in torch.cat(batches):
        model(image[None])
        costs.append(model.cost)
    return {
        'flops/gflops': sum(cost.spent.item() for cost in costs) / len(costs) / 1e9,
        'flops/gflops_dense': costs[0].dense / 1e9,
        'flops/query_ratio': sum(cost.query_ratio.item() for cost in costs) / len(costs),
        'flops/query_ratio/stages.1.blocks.0': sum(cost.layers[1].query_ratio.item() for cost in costs) / len(costs)
    }


@torch.no_grad()
def test_means_over_the_images():
    model, batches = backbone(), [images(3), images(1)]
    metric = DynamicFLOPs()
    for batch in batches:
        model(batch)
        metric.process(None, [{}] * len(batch))
    result = metric.evaluate(4)
    wanted = expected(model, batches)
    assert 0 < wanted['flops/query_ratio'] < 1
    for name, value in wanted.items():
        assert result[name] == pytest.approx(value), name
    assert len(result) == 5


@torch.no_grad()
def test_all_passes_of_an_image_count():
    model, metric = backbone(), DynamicFLOPs(per_layer=False)
    model(images(1))
    once = model.cost.spent.item()
    model(images(1))
    metric.process(None, [{}])
    assert metric.evaluate(1)['flops/gflops'] == pytest.approx(2 * once / 1e9)


@torch.no_grad()
def test_training_passes_do_not_count():
    model, metric = backbone(), DynamicFLOPs()
    model.train()(images(2))
    with pytest.raises(ValueError, match='saw no forward pass of an mmdyn backbone'):
        metric.process(None, [{}])


def _worker(rank, world):
    # Three images on two processes: the sampler gives the first one again to the second process.
    everything = images(3)
    model, metric = backbone(), DynamicFLOPs()
    with torch.no_grad():
        for index in ((0, 2), (1, 0))[rank]:
            model(everything[index:index + 1])
            metric.process(None, [{}])
    result = metric.evaluate(3)
    for name, value in expected(model, [everything]).items():
        assert result[name] == pytest.approx(value), name


def test_distributed(run_distributed):
    run_distributed(_worker, 2)
