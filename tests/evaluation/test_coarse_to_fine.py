import math

import pytest
import torch
from mmengine.evaluator import Evaluator
from mmengine.registry import MODELS, init_default_scope

import mmdyn  # noqa: F401
from mmdyn.evaluation import CoarseToFineMetric


def classifier(**test_cfg):
    init_default_scope('mmpretrain')
    torch.manual_seed(0)
    model = MODELS.build(
        dict(
            type='mmdyn.CoarseToFineClassifier',
            test_cfg=test_cfg,
            backbone=dict(
                type='mmdyn.CFViT',
                coarse_size=2,
                patch_size=4,
                ema_start=1,
                arch=dict(family='deit', embed_dim=16, depth=2, num_heads=2, mlp_ratio=2),
            ),
            head=dict(type='LinearClsHead', num_classes=7, in_channels=16),
        )
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return model.eval()


def everything(count):
    torch.manual_seed(1)
    return torch.randn(count, 3, 16, 16), torch.randint(0, 7, (count,))


@torch.no_grad()
def predictions(model, images, labels):
    from mmpretrain.structures import DataSample

    return model.predict(images, [DataSample().set_gt_label(label) for label in labels])


def share_in_the_best(scores, labels, k):
    """Per cent of the images that have fewer than k classes better than their label."""
    better = [sum(other > score[label] for other in score) for score, label in zip(scores.tolist(), labels.tolist())]
    return 100 * sum(rank < k for rank in better) / len(labels)


@torch.no_grad()
def expected(model, images, labels, threshold):
    """The metrics from the two stages' logits."""
    coarse, fine = (logits.softmax(-1) for logits in model(images))
    stops = torch.tensor([max(score) >= threshold for score in coarse.tolist()])
    early = torch.stack([c if stop else f for c, f, stop in zip(coarse, fine, stops)])
    first, second = model.backbone.stage_macs()
    metrics = {
        f'cf/{name}top{k}': share_in_the_best(scores, labels, k)
        for name, scores in (('', early), ('coarse_', coarse), ('fine_', fine))
        for k in (1, 5)
    }
    return dict(
        metrics,
        **{
            'cf/exit_share': stops.sum().item() / len(stops),
            'cf/gflops': (first + second * (~stops).sum().item() / len(stops)) / 1e9,
        },
    )


def evaluate(model, images, labels, batch_size=4, **kwargs):
    evaluator = Evaluator([dict(type='mmdyn.CoarseToFineMetric', **kwargs)])
    for batch in zip(images.split(batch_size), labels.split(batch_size)):
        evaluator.process(predictions(model, *batch))
    return evaluator.evaluate(len(images))


def test_all_stages():
    images, labels = everything(70)
    model = classifier(threshold=0.3, every_stage=True)
    wanted = expected(model, images, labels, 0.3)
    assert 0 < wanted['cf/exit_share'] < 1
    assert len({(wanted[f'cf/{name}top1'], wanted[f'cf/{name}top5']) for name in ('', 'coarse_', 'fine_')}) == 3
    assert evaluate(model, images, labels) == pytest.approx(wanted)


def test_fine_stage_that_ran_on_some_images_only_is_no_number():
    """It is told nevertheless: a log would go on to show the value of an earlier test."""
    images, labels = everything(70)
    model = classifier(threshold=0.3)
    wanted = {
        name: math.nan if 'fine' in name else value for name, value in expected(model, images, labels, 0.3).items()
    }
    assert evaluate(model, images, labels) == pytest.approx(wanted, nan_ok=True)


def test_no_early_exit():
    images, labels = everything(9)
    result = evaluate(classifier(threshold=1), images, labels, topk=2)
    assert set(result) == {'cf/top2', 'cf/coarse_top2', 'cf/fine_top2', 'cf/exit_share', 'cf/gflops'}
    assert result['cf/top2'] == result['cf/fine_top2'] and result['cf/exit_share'] == 0


def _worker(rank, world):
    # Three images on two processes: the sampler gives the first one again to the second process.
    first, second = torch.tensor([0.6, 0.3, 0.1]), torch.tensor([0.2, 0.3, 0.5])
    samples = [
        dict(coarse_score=first, pred_score=first, exit_stage=0, macs=10**9, gt_label=torch.tensor([0])),
        dict(
            coarse_score=first,
            pred_score=second,
            fine_score=second,
            exit_stage=1,
            macs=4 * 10**9,
            gt_label=torch.tensor([2]),
        ),
        dict(
            coarse_score=second,
            pred_score=first,
            fine_score=first,
            exit_stage=1,
            macs=4 * 10**9,
            gt_label=torch.tensor([1]),
        ),
    ]
    metric = CoarseToFineMetric(topk=(1, 2))
    for index in ((0, 2), (1, 0))[rank]:
        metric.process(None, [samples[index]])
    assert metric.evaluate(3) == pytest.approx(
        {
            'cf/top1': 200 / 3,
            'cf/top2': 100,
            'cf/coarse_top1': 100 / 3,
            'cf/coarse_top2': 200 / 3,
            'cf/fine_top1': math.nan,
            'cf/fine_top2': math.nan,
            'cf/exit_share': 1 / 3,
            'cf/gflops': 3,
        },
        nan_ok=True,
    )


def test_distributed(run_distributed):
    run_distributed(_worker, 2)


def test_another_classifier():
    sample = dict(pred_score=torch.tensor([0.1, 0.9]), gt_label=torch.tensor([1]))
    with pytest.raises(ValueError, match='no coarse_score.*CoarseToFineClassifier'):
        CoarseToFineMetric().process(None, [sample])


def test_images_without_labels():
    (sample,) = predictions(classifier(), *everything(1))
    del sample.gt_label
    with pytest.raises(ValueError, match='no gt_label'):
        CoarseToFineMetric().process(None, [sample.to_dict()])


def test_wrong_topk():
    with pytest.raises(ValueError, match=r'topk=\(1, 8\), but the model tells 7 classes apart'):
        evaluate(classifier(), *everything(1), topk=(1, 8))
    with pytest.raises(ValueError, match='give a positive k'):
        CoarseToFineMetric(topk=(0, 1))
