import copy
import math
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from mmengine.registry import MODELS
from torch import nn

from mmdyn.evaluation import DynamicFLOPs

NUM_CLASSES = 5
HEADS = dict(deit='LinearClsHead', lvvit='mmdyn.LVViTHead')


@pytest.fixture
def make_model(make_cfvit):
    """A classifier in float64 and evaluation mode, sure of some images and not of others."""

    def make(family='deit', test_cfg=None, backbone=None, head=None, **options):
        torch.manual_seed(0)
        model = MODELS.build(
            dict(
                type='mmdyn.CoarseToFineClassifier',
                backbone=make_cfvit(family, **(backbone or {})),
                test_cfg=test_cfg,
                head=dict(type=HEADS[family], num_classes=NUM_CLASSES, in_channels=16, **(head or {})),
                **options,
            )
        )
        for parameter in model.head.parameters():
            nn.init.normal_(parameter, std=dict(deit=0.5, lvvit=0.8)[family])
        return model.double().eval()

    return make


def images_of(batch, seed=0):
    """Images whose brightness and contrast differ, and so do the confidences."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(batch, 3, 24, 24, generator=generator, dtype=torch.double)
    return images * torch.linspace(0.1, 3, batch)[:, None, None, None] + torch.randn(
        batch, 3, 1, 1, generator=generator, dtype=torch.double
    )


def samples_of(labels):
    from mmpretrain.structures import DataSample

    return [DataSample().set_gt_label(label) for label in labels]


def softmax(logits):
    """In Python's floats."""
    powers = [math.exp(logit - max(logits)) for logit in logits]
    return torch.tensor([power / sum(powers) for power in powers], dtype=torch.double)


def logits_of(head, tokens):
    """Of (n, C) normed tokens of one image."""
    logits = head.fc.weight @ tokens[0] + head.fc.bias
    if not hasattr(head, 'aux_fc'):
        return logits
    patches = [head.aux_fc.weight @ token + head.aux_fc.bias for token in tokens[1:]]
    return (logits + 0.25 * torch.stack(patches).max(0)[0]) / 1.25


def both_stages(model, images):
    """(B, 2, classes) scores and (B, k) regions: both stages of each image alone, whatever its confidence."""
    scores, regions = [], []
    for image in images.split(1):
        coarse = model.backbone.coarse(image)
        tokens, chosen = model.backbone.fine(image, coarse)
        logits = (logits_of(model.head, stage[0]) for stage in (coarse.tokens, tokens))
        scores.append(torch.stack([softmax(values.tolist()) for values in logits]))
        regions.append(chosen[0])
    return torch.stack(scores), torch.stack(regions)


@pytest.fixture
def batches_of_blocks(monkeypatch):
    """(images, tokens) of each pass through the first block of a model."""

    def watch(model):
        shapes = []
        model.backbone.blocks[0].register_forward_pre_hook(lambda module, args: shapes.append(tuple(args[0].shape[:2])))
        return shapes

    return watch


@pytest.mark.parametrize('family', HEADS)
@pytest.mark.parametrize(
    'options',
    [
        {},
        dict(reuse=None),
        dict(reuse='linear', score='negative'),
        dict(reuse='class_token', score='last'),
        dict(reuse='uninformative'),
    ],
    ids=str,
)
@torch.no_grad()
def test_logits_of_both_stages_equal_a_slow_model(family, options, make_model, slow_cfvit):
    """mode='tensor' returns them for every image, whatever the threshold; a prediction has their softmax."""
    model, images = make_model(family, dict(threshold=1), options), images_of(3)
    expected = [slow_cfvit(model.backbone, image, 5, **options) for image in images]
    wanted = [
        torch.stack([logits_of(model.head, getattr(each, stage)) for each in expected]) for stage in ('coarse', 'fine')
    ]
    for threshold in (0, 1):
        model.test_cfg['threshold'] = threshold
        outputs = model(images, mode='tensor')
        assert len(outputs) == 2
        torch.testing.assert_close(list(outputs), wanted, rtol=1e-8, atol=1e-8)
    for i, sample in enumerate(model(images, mode='predict')):
        torch.testing.assert_close(sample.coarse_score, softmax(wanted[0][i].tolist()), rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(sample.pred_score, softmax(wanted[1][i].tolist()), rtol=1e-8, atol=1e-8)
        assert sample.regions.tolist() == expected[i].chosen and sample.exit_stage == 1


@pytest.mark.parametrize('family', HEADS)
@pytest.mark.parametrize('every_stage', [False, True])
@pytest.mark.parametrize('threshold', [0, 0.3, 0.6, 0.9, 1])
@torch.no_grad()
def test_each_image_stops_where_it_would_alone(family, every_stage, threshold, make_model, batches_of_blocks):
    model, images = make_model(family, dict(threshold=threshold, every_stage=every_stage)), images_of(12)
    scores, regions = both_stages(model, images)
    stops = [threshold < 1 and max(coarse) >= threshold for coarse in scores[:, 0].tolist()]
    assert stops.count(True) == {0: 12, 0.3: 12, 0.9: 0, 1: 0}.get(threshold, stops.count(True))
    assert threshold != 0.6 or 2 <= stops.count(True) <= 10
    shapes, samples = batches_of_blocks(model), samples_of(range(12))
    results = model(images, samples, mode='predict')
    going = 12 if every_stage else stops.count(False)
    # Those that go on do so in one batch, whose fine sequences have 1 + 4 * 5 + 4 tokens.
    assert shapes == [(12, 10)] + [(going, 25)] * (going > 0)
    macs = model.backbone.stage_macs()
    for i, (sample, stop) in enumerate(zip(results, stops, strict=True)):
        assert sample is samples[i] and sample.gt_label.item() == i
        wanted = scores[i, 0 if stop else 1]
        torch.testing.assert_close(sample.pred_score, wanted, rtol=1e-8, atol=1e-10)
        assert sample.pred_label.tolist() == [wanted.argmax()]
        torch.testing.assert_close(sample.coarse_score, scores[i, 0], rtol=1e-8, atol=1e-10)
        assert sample.exit_stage == (0 if stop else 1) and sample.macs == macs[0] + (0 if stop else macs[1])
        assert ('fine_score' in sample) == ('regions' in sample) == (every_stage or not stop)
        if every_stage or not stop:
            torch.testing.assert_close(sample.fine_score, scores[i, 1], rtol=1e-8, atol=1e-10)
            assert torch.equal(sample.regions, regions[i])


@pytest.mark.parametrize('family', HEADS)
@torch.no_grad()
def test_threads_have_predictions_of_their_own(family, make_model):
    """With batches of which some images go on."""
    model = make_model(family, dict(threshold=0.6)).float()
    batches = [images_of(3 + i % 4, seed=i).float() for i in range(8)]

    @torch.no_grad()
    def run(images):
        samples = model(images, mode='predict')
        return (
            [sample.pred_score for sample in samples],
            [sample.exit_stage for sample in samples],
            [sample.regions.tolist() if 'regions' in sample else None for sample in samples],
        )

    expected, interval = list(map(run, batches)), sys.getswitchinterval()
    assert {stage for _, stages, _ in expected for stage in stages} == {0, 1}
    sys.setswitchinterval(1e-4)
    try:
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(run, batches * 5))
    finally:
        sys.setswitchinterval(interval)
    for (scores, *decided), (one, *decision) in zip(found, expected * 5):
        torch.testing.assert_close(scores, one, rtol=1e-4, atol=1e-5)
        assert decided == decision


@pytest.mark.parametrize('family', HEADS)
@pytest.mark.parametrize('every_stage', [False, True])
@torch.no_grad()
def test_batches_without_images(family, every_stage, make_model):
    model = make_model(family, dict(every_stage=every_stage))
    assert [x.shape for x in model(images_of(0), mode='tensor')] == [(0, NUM_CLASSES)] * 2
    assert model(images_of(0), mode='predict') == model(images_of(0), [], mode='predict') == []


@torch.no_grad()
def test_confidence_at_the_threshold_is_enough(make_model):
    """And threshold 1 stops none, even where the confidence is rounded to 1."""
    model, images = make_model(), images_of(4)
    confidence = model(images, mode='predict')[1].coarse_score.max().item()
    for threshold, stage in ((confidence, 0), (math.nextafter(confidence, 1), 1)):
        model.test_cfg['threshold'] = threshold
        assert model(images, mode='predict')[1].exit_stage == stage
    nn.init.constant_(model.head.fc.weight, 0)
    model.head.fc.bias[0] = 1e3
    for threshold, stage in ((1, 1), (0.999, 0)):
        model.test_cfg['threshold'] = threshold
        results = model(images, mode='predict')
        assert {sample.exit_stage for sample in results} == {stage} and results[0].coarse_score[0] == 1


@pytest.mark.parametrize('threshold, counts', [(0, (4, 0)), (1, (0, 4))])
@torch.no_grad()
def test_batches_in_which_all_or_none_stop(threshold, counts, make_model, batches_of_blocks):
    """Without data samples, too. The fine stage is not even called for an empty batch."""
    model, calls = make_model(test_cfg=dict(threshold=threshold)), []
    fine, model.backbone.fine = model.backbone.fine, lambda *args: calls.append(len(args[0])) or fine(*args)
    results = model.predict(images_of(4))
    stages = [sample.exit_stage for sample in results]
    assert (stages.count(0), stages.count(1)) == counts
    assert calls == ([4] if counts[1] else [])


@torch.no_grad()
def test_predicting_again_leaves_nothing_of_the_last_time(make_model):
    """A data sample that stops after another threshold let it go on has no fine score."""
    model, images, samples = make_model(), images_of(2), samples_of([0, 1])
    for threshold in (1, 0):
        model.test_cfg['threshold'] = threshold
        model(images, samples, mode='predict')
    fresh = model(images, samples_of([0, 1]), mode='predict')
    assert [set(sample.keys()) for sample in samples] == [set(sample.keys()) for sample in fresh]


@torch.no_grad()
def test_threshold_by_default_and_in_the_config(make_model):
    assert make_model().test_cfg == dict(threshold=0.5, every_stage=False)
    config = dict(threshold=0.7)
    model = make_model(test_cfg=config)
    model.test_cfg['threshold'] = 0.1
    assert model.test_cfg['every_stage'] is False and config == dict(threshold=0.7)


@pytest.mark.parametrize('every_stage', [False, True])
@torch.no_grad()
def test_flops_metric_counts_the_fine_stage_where_it_ran(every_stage, make_model):
    model, metric = make_model(test_cfg=dict(threshold=0.6, every_stage=every_stage)), DynamicFLOPs()
    spent = []
    for seed, batch in enumerate((5, 1, 3)):
        results = model(images_of(batch, seed), mode='predict')
        metric.process(None, [{}] * batch)
        spent += [sample.macs for sample in results]
    coarse, fine = model.backbone.stage_macs()
    assert set(spent) == {coarse, coarse + fine}
    expected = coarse + fine if every_stage else sum(spent) / 9
    assert metric.evaluate(9)['flops/gflops'] == pytest.approx(expected / 1e9)


def gradients_of(loss, model):
    model.zero_grad()
    loss.backward(retain_graph=True)
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize('split_all', [False, True])
@pytest.mark.parametrize('soft', [False, True])
def test_loss_is_equation_14(soft, split_all, make_model):
    """CE(p_f, y) and KL(p_f || p_c), mean of the batch, of which only p_c takes gradients."""
    model = make_model(backbone=dict(reuse=None)).train()
    model.backbone.split_all = split_all
    images, labels = images_of(3), [4, 0, 2]
    samples = samples_of(labels)
    target = torch.eye(NUM_CLASSES, dtype=torch.double)[labels]
    if soft:
        target = torch.rand(3, NUM_CLASSES, dtype=torch.double).softmax(-1)
        samples = [sample.set_gt_score(score) for sample, score in zip(samples, target)]
    losses = model(images, samples, mode='loss')
    coarse, fine = (logits.exp() / logits.exp().sum(1, keepdim=True) for logits in model(images, mode='tensor'))
    cross_entropy = -(target * fine.log()).sum() / 3
    teacher = fine.detach()
    divergence = (teacher * (teacher / coarse).log()).sum() / 3
    assert set(losses) == {'loss', 'loss_coarse'}
    torch.testing.assert_close(losses['loss'], cross_entropy, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(losses['loss_coarse'], divergence, rtol=1e-8, atol=1e-10)
    gradients = gradients_of(losses['loss_coarse'], model)
    torch.testing.assert_close(gradients, gradients_of(divergence, model), rtol=1e-6, atol=1e-9)
    assert gradients['backbone.coarse_pos_embed'].any()
    # Nothing that only the fine stage has learns from the coarse loss.
    assert 'backbone.pos_embed' not in gradients or not gradients['backbone.pos_embed'].any()
    torch.testing.assert_close(
        gradients_of(losses['loss'], model), gradients_of(cross_entropy, model), rtol=1e-6, atol=1e-9
    )


def test_loss_is_equation_15(make_model):
    """CE(p_f, y) and CE(p_c, y)."""
    model = make_model(coarse_loss='ce').train()
    images, labels = images_of(3), [4, 0, 2]
    losses = model(images, samples_of(labels), mode='loss')
    assert set(losses) == {'loss', 'loss_coarse'}
    for name, logits in zip(('loss_coarse', 'loss'), model(images, mode='tensor')):
        probabilities = [softmax(row)[label] for row, label in zip(logits.tolist(), labels)]
        expected = -sum(probability.log() for probability in probabilities) / 3
        torch.testing.assert_close(losses[name].detach(), expected, rtol=1e-8, atol=1e-10)
    assert gradients_of(losses['loss_coarse'], model)['backbone.coarse_pos_embed'].any()


def test_fine_stage_of_training_splits_all_and_that_of_evaluation_does_not(make_model, batches_of_blocks):
    model = make_model(test_cfg=dict(threshold=1)).train()
    model.backbone.split_all = True
    shapes = batches_of_blocks(model)
    model(images_of(2), samples_of([0, 1]), mode='loss')
    model.eval()(images_of(2), mode='predict')
    assert shapes == [(2, 10), (2, 37), (2, 10), (2, 25)]


def test_training_runs_both_stages_for_all_images_whatever_the_threshold(make_model, batches_of_blocks):
    model = make_model(test_cfg=dict(threshold=0)).train()
    shapes = batches_of_blocks(model)
    model(images_of(3), samples_of([0, 1, 2]), mode='loss')
    assert shapes == [(3, 10), (3, 25)]


@pytest.mark.parametrize('family', HEADS)
@pytest.mark.parametrize('coarse_loss', ['kl', 'ce'])
def test_a_step_of_training_reaches_all_weights(family, coarse_loss, make_model):
    """Through mmengine's train_step, with the head's accuracy in the log."""
    model = make_model(family, coarse_loss=coarse_loss, head=dict(cal_acc=True) if family == 'deit' else None).train()
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    samples = samples_of([0, 1, 2])
    losses = model(images_of(3), samples, mode='loss')
    total, log = model.parse_losses(losses)
    torch.testing.assert_close(total, sum(value for name, value in losses.items() if 'loss' in name))
    assert ('accuracy_top-1' in log) == (family == 'deit')
    total.backward()
    optimizer.step()
    same = [name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])]
    assert not same


@pytest.mark.parametrize(
    'options, message',
    [
        (dict(test_cfg=dict(threshold=1.1)), r'test_cfg threshold=1.1: give a number in \[0, 1\], a confidence'),
        (dict(test_cfg=dict(threshold=-0.1)), r'test_cfg threshold=-0.1: give a number in \[0, 1\], a confidence'),
        (dict(test_cfg=dict(eta=0.5)), r"test_cfg has no option \['eta'\]: it takes threshold and every_stage"),
        (dict(coarse_loss='mse'), r"coarse_loss='mse': choose from \('kl', 'ce'\)"),
    ],
)
def test_unfit_options(options, message, make_model):
    with pytest.raises(ValueError, match=message):
        make_model(**options)


@pytest.mark.parametrize(
    'head',
    [
        dict(type='MultiLabelLinearClsHead'),
        dict(type='CSRAClsHead', num_heads=1, lam=0.1),
        dict(type='MultiTaskHead', task_heads=dict(a=dict(type='LinearClsHead', num_classes=2))),
    ],
)
def test_heads_of_several_labels_are_refused(head, make_cfvit):
    options = {} if head['type'] == 'MultiTaskHead' else dict(num_classes=NUM_CLASSES)
    with pytest.raises(
        ValueError,
        match=f'which the head {head["type"]} does not give: use a head for one label, e.g. '
        'LinearClsHead, or the model type ImageClassifier',
    ):
        MODELS.build(
            dict(
                type='mmdyn.CoarseToFineClassifier', backbone=make_cfvit(), head=dict(in_channels=16, **options, **head)
            )
        )
