import pytest
import torch
import torch.nn.functional as F
from mmengine.registry import MODELS
from torch import nn

from mmdyn.analysis.class_attention import (
    accuracy_of_patches,
    class_attention,
    classify_patches,
    coarse_tokens,
    plain_classifier,
)

MEANS = dict(type='ClsDataPreprocessor', mean=[0.0] * 3, std=[1.0] * 3)


@pytest.fixture
def classifier(backbone_config, randomise):
    def make(name='deit', **options):
        kind = 'mmdyn.CoarseToFineClassifier' if name == 'cfvit' else 'ImageClassifier'
        head = dict(type='LinearClsHead', num_classes=3, in_channels=16)
        model = dict(type=kind, data_preprocessor=MEANS, backbone=backbone_config(name, **options), head=head)
        return randomise(MODELS.build(model), 0.3).eval()

    return make


@torch.no_grad()
@pytest.mark.parametrize('options', [{}, dict(distilled=True)])
def test_is_the_row_of_the_attention_matrix(options, make_backbone, randomise):
    backbone = randomise(make_backbone('deit', **options), 0.3).eval()
    tokens, _ = backbone.embed(torch.randn(2, 3, 32, 32))
    found = class_attention(backbone, tokens)
    for block, score in zip(backbone.blocks, found):
        x = block.norm1(tokens)
        query, key = block.attn.q(x), block.attn.kv(x)[..., :16]
        heads = [(query[..., i : i + 8] @ key[..., i : i + 8].transpose(1, 2) / 8**0.5).softmax(-1) for i in (0, 8)]
        wanted = sum(heads)[:, 0, backbone.num_extra :] / 2
        assert torch.allclose(score, wanted, atol=1e-6)
        tokens = block(tokens, tokens, (8, 8), backbone.num_extra)


@torch.no_grad()
@pytest.mark.parametrize('name', ['deit', 'cfvit'])
def test_coarse_splitting(name, classifier):
    model, size = classifier(name), dict(deit=(32, 8), cfvit=(24, 6))[name]
    images = torch.randn(2, 3, size[0], size[0])
    tokens, shape = coarse_tokens(model.backbone, images)
    assert shape == (size[1] // 2, size[1] // 2) and tokens.shape == (2, 1 + (size[1] // 2) ** 2, 16)
    if name == 'cfvit':  # as its coarse stage has it
        assert torch.allclose(tokens[:, 1:], model.backbone.coarse(images).embedded)
        fine = model.backbone.embed(images)[0]
        patches = model.backbone.patch_embed(images)[0] + model.backbone.pos_embed[:, 1:]
        assert torch.allclose(fine[:, 1:], patches)


@torch.no_grad()
def test_all_patches_are_the_whole_image(classifier):
    model, images = classifier(), torch.randn(2, 3, 32, 32)
    tokens, _ = model.backbone.embed(images)
    kept = tokens.clone()
    found = classify_patches(model, tokens, torch.arange(64).expand(2, -1))
    assert torch.allclose(found, model(images, mode='tensor'), atol=1e-5) and torch.equal(tokens, kept)


@torch.no_grad()
def test_patches_alone(classifier):
    """The others are gone: the same as a sequence of those tokens through the blocks."""
    model, images = classifier(), torch.randn(2, 3, 32, 32)
    tokens, index = model.backbone.embed(images)[0], torch.tensor([[3, 5, 60], [0, 1, 2]])
    found = classify_patches(model, tokens, index)
    for image in range(2):
        x = tokens[image : image + 1, [0, *(1 + index[image]).tolist()]]
        for block in model.backbone.blocks:
            x = block(x, x, (1, 3), 1)
        wanted = F.linear(model.backbone.norm(x)[:, 0], model.head.fc.weight, model.head.fc.bias)
        assert torch.allclose(found[image], wanted[0], atol=1e-5)


@torch.no_grad()
def test_accuracy(classifier):
    from mmpretrain.structures import DataSample

    model, images = classifier(), torch.randn(5, 3, 32, 32)
    tokens, _ = model.backbone.embed(images)
    labels = model(images, mode='tensor').argmax(-1)
    labels[0] = (labels[0] + 1) % 3
    batches = [
        dict(inputs=list(images[part]), data_samples=[DataSample().set_gt_label(label) for label in labels[part]])
        for part in (slice(0, 3), slice(3, 5))
    ]
    found = accuracy_of_patches(model, batches, 10)
    assert found['images'] == 5 and found['all'] == 80
    for block, score in enumerate(class_attention(model.backbone, tokens)):
        for name, sign in (('highest', 1), ('lowest', -1)):
            index = (sign * score).topk(10).indices
            right = (classify_patches(model, tokens, index).argmax(-1) == labels).float()
            assert found[name][block] == pytest.approx(100 * right.mean().item())
    with pytest.raises(ValueError, match='--patches 64: an image has 64; give fewer than that, at least 1'):
        accuracy_of_patches(model, batches, 64)
    with pytest.raises(ValueError, match='have no labels'):
        accuracy_of_patches(model, [dict(inputs=list(images), data_samples=[DataSample() for _ in images])], 10)


def test_other_models(classifier, backbone_config):
    for model in (
        nn.ModuleDict(dict(backbone=MODELS.build(backbone_config('deit')))),
        classifier(dge=dict(granularities=(1, 2))),
    ):
        with pytest.raises(ValueError, match='give the config of a classifier with the backbone mmdyn.DeiT'):
            plain_classifier(model)
