import re

import pytest
import torch

import mmdyn  # noqa: F401
from mmdyn.evaluation import DynamicFLOPs
from mmdyn.models import PVT
from mmdyn.models.dge.encoder import Decision

ARCH = dict(embed_dims=(16, 32), depths=(1, 1), num_heads=(1, 2), mlp_ratios=(2, 2), sr_ratios=(2, 1))


def backbone():
    torch.manual_seed(0)
    model = PVT(ARCH, img_size=32, dge=dict(granularities=(1, 2, 4))).eval()
    for stage in model.stages:
        torch.nn.init.normal_(stage.dge[0].router.weight)
        torch.nn.init.zeros_(stage.dge[0].router.bias)
    return model


def images(count, side=32):
    """Noise of very different strengths, which the routers tell apart."""
    noise = torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(count))
    return noise * 10 ** torch.linspace(-1, 1.5, count)[:, None, None, None]


@pytest.fixture
def warnings(monkeypatch):
    said = []
    monkeypatch.setattr('mmdyn.evaluation.dynamic_flops.print_log', lambda text, logger, level: said.append(text))
    return said


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
        'flops/query_ratio/stages.1.blocks.0': sum(cost.layers[1].query_ratio.item() for cost in costs) / len(costs),
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
    assert len(result) == 7


@torch.no_grad()
def test_share_of_the_choice_that_varies_within_images():
    """Shares of 1, 0, 1/2 and 1/2 of the regions: 1/8 within images of 1/4 in all, also in passes of their own."""
    model, metric = backbone(), DynamicFLOPs()
    finest = torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0], [1, 0, 1, 0], [0, 1, 1, 0]]).view(4, 2, 2)
    for choices in (finest[:1], finest[1:]):
        model(images(len(choices)))
        model.stages[0].dge[0].decision = Decision(2 - 2 * choices, torch.ones(len(choices)))
        model.account(*model.last_pass)
        metric._meter.costs = metric._meter.costs[-1:]  # that of the choices
        metric.process(None, [{}] * len(choices))
    result = metric.evaluate(4)
    assert result['flops/within_images/stages.0.blocks.0'] == pytest.approx(1 / 2)
    # The second stage has one region.
    assert result['flops/within_images/stages.1.blocks.0'] == 0
    assert not any('finest' in name for name in result)


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


@torch.no_grad()
@pytest.mark.parametrize('batch, order', [(1, [0, 1, 2, 3, 4]), (3, [0, 1, 2, 3, 4]), (5, [4, 2, 0, 1, 3])])
def test_each_image_has_its_own_cost(batch, order):
    """Whatever is in its batch."""
    model, everything = backbone(), images(5)
    alone, metric = [expected(model, [everything[i : i + 1]]) for i in order], DynamicFLOPs()
    assert len({cost['flops/gflops'] for cost in alone}) > 1
    for indices in torch.tensor(order).split(batch):
        model(everything[indices])
        metric.process(None, [{}] * len(indices))
    for cost, found in zip(alone, metric.results, strict=True):
        for name, value in cost.items():
            assert found[name.partition('/')[2]] == pytest.approx(value), name


@torch.no_grad()
@pytest.mark.parametrize(
    'passes',
    [
        lambda model, x: [model(x), model(x.flip(3)), model(x[..., :16, :])],  # augmentations, windows
        lambda model, x: [model(view[None]) for image in x for view in (image, image.flip(2), image[:, :16])],
        lambda model, x: [model(part) for part in (x[:1], x[1:]) if len(part)],
        lambda model, x: model(torch.stack([x, x.flip(3)], 1).flatten(0, 1)),
    ],
    ids=['of the batch', 'image after image', 'chunks', 'views in one pass'],
)
def test_several_passes(passes):
    model, x, metric = backbone(), images(3), DynamicFLOPs()
    results = []
    for batch in [x[:1], x[1:2], x[2:], x]:
        metric.results.clear()
        passes(model, batch)
        metric.process(None, [{}] * len(batch))
        results += metric.results
    assert results[3:] == [pytest.approx(result) for result in results[:3]]
    assert len({result['gflops'] for result in results}) == 3


@torch.no_grad()
def test_coarse_to_fine(make_backbone):
    """The fine stage's cost is of the images that went on."""
    model, metric = make_backbone('cfvit').eval(), DynamicFLOPs()
    x = torch.rand(4, 3, 24, 24)
    stage = model.coarse(x)
    model.fine(x[1:3], type(stage)(*(part[1:3] for part in stage)))
    metric.process(None, [dict(exit_stage=stage) for stage in (0, 1, 1, 0)])
    coarse, fine = model.stage_macs()
    assert [result['gflops'] * 1e9 for result in metric.results] == pytest.approx(
        [coarse, coarse + fine, coarse + fine, coarse]
    )


@torch.no_grad()
def test_passes_of_which_nothing_tells_whose_they_are(warnings):
    model, metric = backbone(), DynamicFLOPs()
    total = 0
    for _ in range(2):
        for batch in (images(3), images(2)):
            model(batch)
            total += model.cost.spent.sum().item() / 1e9
        metric.process(None, [{}] * 3)
    assert sum(result['gflops'] for result in metric.results) == pytest.approx(total)
    (warning,) = warnings
    assert 'nothing tells which' in warning


@torch.no_grad()
@pytest.mark.parametrize(
    'bias, images_of, said',
    [
        ([0.0, 0.0, 1e4], 8, 'All layers with DGE spend.*8 images: stages.0.blocks.0 .0.062., stages.1.blocks.0'),
        ([1e4, 0.0, 0.0], 9, 'All layers with DGE spend.*9 images: stages.0.blocks.0 .1.000., stages.1.blocks.0'),
        ([0.0, 1e4, 0.0], 7, None),
        ([0.0, 0.0, 0.0], 8, None),
    ],
)
def test_warns_of_collapse(warnings, bias, images_of, said):
    model, metric = backbone(), DynamicFLOPs(per_layer=False)
    for stage in model.stages:
        stage.dge[0].router.bias.data = torch.tensor(bias)
        stage.dge[0].router.weight.data *= 10
    model(images(images_of))
    metric.process(None, [{}] * images_of)
    assert set(metric.evaluate(images_of)) == {'flops/gflops', 'flops/gflops_dense', 'flops/query_ratio'}
    assert [bool(re.search(said or '', warning)) for warning in warnings] == [True] * bool(said)


@torch.no_grad()
def test_warns_of_one_layer(warnings):
    model, metric = backbone(), DynamicFLOPs()
    model.stages[1].dge[0].router.bias.data = torch.tensor([0.0, 1e4, 0.0])
    model(images(12))
    metric.process(None, [{}] * 12)
    metric.evaluate(12)
    (warning,) = warnings
    assert 'Some layers with DGE' in warning and 'stages.1.blocks.0 (0.250)' in warning and 'stages.0' not in warning


@torch.no_grad()
def test_validations_of_a_training_do_not_warn(warnings):
    from mmengine.logging import MessageHub

    hub, model, metric = MessageHub.get_current_instance(), backbone(), DynamicFLOPs()
    model.stages[1].dge[0].router.bias.data = torch.tensor([0.0, 1e4, 0.0])
    for stage in ('val', 'test'):
        hub.update_info('loop_stage', stage)
        model(images(8))
        metric.process(None, [{}] * 8)
        metric.evaluate(8)
        assert len(warnings) == (stage == 'test')
    hub.pop_info('loop_stage')


def test_no_images():
    assert DynamicFLOPs().compute_metrics([]) == {}


def _worker(rank, world):
    # Three images on two processes: the sampler gives the first one again to the second process.
    everything = images(3)
    model = backbone()
    for batches in (((0, 2), (1, 0))[rank], [[0, 2], [1, 0]][rank : rank + 1]):
        metric = DynamicFLOPs()
        with torch.no_grad():
            for batch in batches:
                model(everything[batch].reshape(-1, 3, 32, 32))
                metric.process(None, [{}] * len(torch.tensor(batch).reshape(-1)))
        result = metric.evaluate(3)
        for name, value in expected(model, [everything]).items():
            assert result[name] == pytest.approx(value), name


def test_distributed(run_distributed):
    run_distributed(_worker, 2)


def test_windows_and_augmentations_of_a_segmentor():
    """mmseg's slide inference and test-time augmentation, whatever the batch."""
    pytest.importorskip('mmseg')
    from mmengine.config import ConfigDict
    from mmengine.registry import MODELS, init_default_scope
    from mmseg.structures import SegDataSample

    init_default_scope('mmseg')
    segmentor = ConfigDict(
        type='EncoderDecoder',
        data_preprocessor=dict(type='SegDataPreProcessor'),
        backbone=dict(type='mmdyn.PVT', arch=ARCH, img_size=32, dge=dict(granularities=(1, 2, 4))),
        neck=dict(type='FPN', in_channels=[16, 32], out_channels=8, num_outs=2),
        decode_head=dict(
            type='FPNHead',
            in_channels=[8, 8],
            in_index=[0, 1],
            feature_strides=[4, 8],
            channels=8,
            num_classes=4,
            norm_cfg=dict(type='BN'),
        ),
        test_cfg=dict(mode='slide', crop_size=(32, 32), stride=(32, 16)),
    )
    model = MODELS.build(dict(type='SegTTAModel', module=segmentor)).eval()
    model.module.backbone.load_state_dict(backbone().state_dict())
    pictures, results = images(3, 48), []
    for batch in ([0], [1], [2], [0, 1, 2]):
        views = []
        for flip in (False, True):
            meta = dict(img_path='', img_shape=(48, 48), ori_shape=(48, 48), flip=flip, flip_direction='horizontal')
            views.append(
                dict(
                    inputs=[pictures[i].flip(2) if flip else pictures[i] for i in batch],
                    data_samples=[SegDataSample(metainfo=meta) for _ in batch],
                )
            )
        metric = DynamicFLOPs()
        samples = model.test_step({name: [view[name] for view in views] for name in views[0]})
        metric.process(None, [sample.to_dict() for sample in samples])
        results += metric.results
    assert results[3:] == [pytest.approx(result) for result in results[:3]]
    assert len({result['gflops'] for result in results}) == 3
    window = next(model.module.backbone.parameters()).new_zeros(1, 3, 32, 32)
    model.module.backbone(window)
    # Two rows and two columns of windows, in two views.
    assert results[0]['gflops_dense'] == pytest.approx(8 * model.module.backbone.cost.dense / 1e9)
