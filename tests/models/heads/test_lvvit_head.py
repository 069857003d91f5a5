import pytest
import torch
from mmengine.registry import MODELS

pytest.importorskip('mmpretrain')
from mmpretrain.structures import DataSample

CLASSES = 7


@pytest.fixture
def head(randomise):
    return randomise(MODELS.build(dict(type='mmdyn.LVViTHead', num_classes=CLASSES, in_channels=16, aux_weight=0.3)))


def samples(labels, **fields):
    """Data samples of the labels, and of a tensor for each field."""
    made = [DataSample().set_gt_label(label) for label in labels]
    for name, values in fields.items():
        for sample, value in zip(made, values):
            sample.set_field(value, name)
    return made


def cross_entropy(logits, target):
    """- sum of target * log softmax of a token's logits (classes,)."""
    return -sum(t * (x - logits.exp().sum().log()) for t, x in zip(target, logits))


def slow_losses(head, tokens, image_scores, token_scores):
    """Mean over the images, and 0.3 times the mean over all patches, one token at a time."""
    image = [cross_entropy(head.fc(sequence[0]), score) for sequence, score in zip(tokens, image_scores)]
    patch = [
        cross_entropy(head.aux_fc(token), score)
        for sequence, scores in zip(tokens, token_scores)
        for token, score in zip(sequence[1:], scores, strict=True)
    ]
    return dict(loss=sum(image) / len(image), loss_aux=0.3 * sum(patch) / len(patch))


def test_logits(head):
    tokens = torch.randn(2, 5, 16)
    for logits, sequence in zip(head((tokens,)), tokens):
        patches = [head.aux_fc(token) for token in sequence[1:]]
        best = torch.stack([max(values) for values in zip(*patches)])
        torch.testing.assert_close(logits, (head.fc(sequence[0]) + best / 4) / 1.25)
    score = head.predict((tokens,))[0].pred_score
    torch.testing.assert_close(score, head((tokens,))[0].softmax(0))


@pytest.mark.parametrize('soft', [False, True])
@pytest.mark.parametrize('maps', [False, True])
def test_loss(head, soft, maps):
    tokens, labels = torch.randn(2, 7, 16), [3, 5]
    scores = torch.rand(2, CLASSES).softmax(1) if soft else torch.eye(CLASSES)[labels]
    token_scores = torch.rand(2, 2, 3, CLASSES).softmax(-1).half()
    fields = dict(gt_score=scores) if soft else {}
    data = samples(labels, **fields, **(dict(gt_token_score=token_scores) if maps else {}))
    targets = token_scores.float().flatten(1, 2) if maps else scores[:, None].expand(-1, 6, -1)
    torch.testing.assert_close(head.loss((tokens,), data), slow_losses(head, tokens, scores, targets))


def test_loss_of_given_targets(head):
    tokens, targets = torch.randn(2, 5, 16), torch.rand(2, 4, CLASSES).softmax(-1)
    data = samples([0, 1], gt_token_score=torch.rand(2, 9, 9, CLASSES))
    torch.testing.assert_close(
        head.loss((tokens,), data, targets), slow_losses(head, tokens, torch.eye(CLASSES)[:2], targets)
    )


def test_smoothed_labels_are_those_of_patches_too(head):
    head.loss_module = MODELS.build(dict(type='mmpretrain.LabelSmoothLoss', label_smooth_val=0.1, num_classes=CLASSES))
    tokens = torch.randn(2, 5, 16)
    scores = 0.9 * torch.eye(CLASSES)[[4, 1]] + 0.1 / CLASSES
    torch.testing.assert_close(
        head.loss((tokens,), samples([4, 1])), slow_losses(head, tokens, scores, scores[:, None].expand(-1, 4, -1))
    )


@pytest.mark.parametrize('shape', [(2, 2, CLASSES), (2, 3, CLASSES + 1)])
def test_token_labels_that_do_not_fit(head, shape):
    with pytest.raises(ValueError, match=f'{shape[0] * shape[1]} tokens and {shape[2]} classes do not fit 6 patch'):
        head.loss((torch.randn(2, 7, 16),), samples([0, 1], gt_token_score=torch.rand(2, *shape)))


def test_trains_a_classifier(backbone_config):
    model = MODELS.build(
        dict(
            type='mmpretrain.ImageClassifier',
            backbone=backbone_config('lvvit'),
            head=dict(type='mmdyn.LVViTHead', num_classes=CLASSES, in_channels=16),
        )
    )
    losses = model.loss(torch.randn(2, 3, 32, 32), samples([0, 1], gt_token_score=torch.rand(2, 8, 8, CLASSES)))
    sum(losses.values()).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize('coarse_loss', ['ce', 'kl'])
@pytest.mark.parametrize('split_all', [False, True])
def test_cfvit_learns_each_token_by_its_own_label(backbone_config, coarse_loss, split_all):
    arch = dict(family='lvvit', embed_dim=16, depth=4, num_heads=2, mlp_ratio=2)
    model = MODELS.build(
        dict(
            type='mmdyn.CoarseToFineClassifier',
            coarse_loss=coarse_loss,
            backbone=dict(type='mmdyn.CFViT', arch=arch, coarse_size=3, patch_size=4),
            head=dict(type='mmdyn.LVViTHead', num_classes=CLASSES, in_channels=16, aux_weight=0.3),
        )
    )
    model.backbone.split_all = split_all
    images, maps = torch.randn(2, 3, 24, 24), torch.rand(2, 6, 6, CLASSES).softmax(-1)
    losses = model.loss(images, samples([2, 6], gt_token_score=maps))

    stage = model.backbone.coarse(images)
    tokens, chosen = model.backbone.fine(images, stage)
    coarse_maps = sum(maps[:, i::2, j::2] for i in (0, 1) for j in (0, 1)) / 4
    targets = []
    for fine, coarse, patches in zip(maps, coarse_maps, chosen.tolist()):
        split = [fine[2 * (p // 3) + i, 2 * (p % 3) + j] for p in patches for i in (0, 1) for j in (0, 1)]
        targets.append(split + [coarse[p // 3, p % 3] for p in range(9) if p not in patches])
    one_hot = torch.eye(CLASSES)[[2, 6]]
    expected = slow_losses(model.head, model.backbone.output(tokens), one_hot, targets)
    torch.testing.assert_close({name: losses[name] for name in expected}, expected)
    if coarse_loss == 'ce':
        expected = slow_losses(model.head, model.backbone.output(stage.tokens), one_hot, coarse_maps.flatten(1, 2))
        torch.testing.assert_close(losses['loss_coarse'], sum(expected.values()))
    assert set(losses) == {'loss', 'loss_aux', 'loss_coarse'}


def test_cfvit_without_a_classifier_of_patches_ignores_token_labels():
    model = MODELS.build(
        dict(
            type='mmdyn.CoarseToFineClassifier',
            backbone=dict(
                type='mmdyn.CFViT',
                coarse_size=3,
                patch_size=4,
                arch=dict(family='deit', embed_dim=16, depth=4, num_heads=2, mlp_ratio=2),
            ),
            head=dict(type='mmpretrain.LinearClsHead', num_classes=CLASSES, in_channels=16),
        )
    )
    images = torch.randn(2, 3, 24, 24)
    torch.testing.assert_close(
        model.loss(images, samples([2, 6], gt_token_score=torch.rand(2, 6, 6, CLASSES))),
        model.loss(images, samples([2, 6])),
    )
