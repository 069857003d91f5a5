import copy
import math
from collections import Counter

import numpy as np
import pytest
import torch

import mmdyn
from mmdyn.models.dge import DynamicGrainedEncoder
from mmdyn.models.dge.router import ROUTERS, choose
from mmdyn.models.layers import Attention, EncoderBlock

UNTRAINED = ['random', 'entropy', 'correlation']


def regions_of(shape, side):
    """Each region's place, and its cells as rows and columns."""
    for row in range(-(-shape[0] // side)):
        for column in range(-(-shape[1] // side)):
            yield (
                (row, column),
                [
                    (r, c)
                    for r in range(row * side, min(row * side + side, shape[0]))
                    for c in range(column * side, min(column * side + side, shape[1]))
                ],
            )


@pytest.mark.parametrize('shape, num_extra', [((8, 8), 0), ((5, 7), 1), ((1, 3), 2)])
@pytest.mark.parametrize('granularities', [(1, 2, 4), (0, 1, 2)])
def test_correlation_is_pearsons(shape, num_extra, granularities):
    """Of each token with the mean of its patch, by numpy; a region left out loses all."""
    router, side = ROUTERS['correlation'](6, granularities), max(granularities)
    tokens = torch.randn(2, num_extra + math.prod(shape), 6)
    logits = router.logits(tokens, shape, side, num_extra)
    for image, cells in enumerate(tokens[:, num_extra:].unflatten(1, shape).numpy()):
        for (row, column), region in regions_of(shape, side):
            for k, phi in enumerate(granularities):
                losses = []
                for r, c in region:
                    patch = [cells[i, j] for i, j in region if phi and (i // phi, j // phi) == (r // phi, c // phi)]
                    losses.append(1 - np.corrcoef(cells[r, c], np.mean(patch, 0))[0, 1] if phi else 1)
                assert logits[image, row, column, k].item() == pytest.approx(-np.mean(losses), abs=1e-5)


@pytest.mark.parametrize('shape', [(8, 8), (3, 5)])
def test_entropy_is_that_of_the_pixels_of_a_region(shape):
    router, side, stride = ROUTERS['entropy'](6, (1, 2, 4)), 4, 4
    images = torch.rand(2, 3, shape[0] * stride, shape[1] * stride).square()
    router.images.see(images)
    logits = router.logits(torch.zeros(2, 1 + math.prod(shape), 6), shape, side, 1)
    for image, grey in enumerate(images.mean(1)):
        steps = ((grey - grey.min()) / (grey.max() - grey.min()) * 32).long().clamp(max=31)
        for (row, column), region in regions_of(shape, side):
            pixels = [
                steps[r * stride + i, c * stride + j].item() for r, c in region for i in range(4) for j in range(4)
            ]
            bits = -sum(n / len(pixels) * math.log2(n / len(pixels)) for n in Counter(pixels).values())
            expected = torch.tensor([0.0, -bits, -2 * bits])  # each doubling of a patch's side loses as much
            torch.testing.assert_close(logits[image, row, column], expected, atol=1e-5, rtol=1e-5)


def test_entropy_without_images():
    with pytest.raises(ValueError, match="router='entropy' looks at the images"):
        choose(ROUTERS['entropy'](6, (1, 2)), torch.zeros(1, 4, 6), (2, 2), 2, 0)


def test_flat_images_have_no_detail():
    router = ROUTERS['entropy'](6, (1, 2))
    router.images.see(torch.full((1, 3, 8, 8), 0.3))
    assert (router.logits(torch.zeros(1, 4, 6), (2, 2), 2, 0) == 0).all()


def test_random_is_another_one_each_time():
    router, tokens = ROUTERS['random'](6, (1, 2, 4)), torch.zeros(2, 64, 6)
    first, second = (router.logits(tokens, (8, 8), 4, 0) for _ in range(2))
    assert first.shape == (2, 2, 2, 3) and (first[..., 0] == 0).all() and (first[..., 1:] < 0).all()
    assert (first[..., 1:] != second[..., 1:]).all()


@pytest.mark.parametrize('router', ['random', 'correlation'])
@pytest.mark.parametrize('training', [True, False])
def test_budgets_hold_in_training_too(router, training):
    """Without a budget, each region takes the finest granularity. There are no weights, and nothing to be saved."""
    encoder = DynamicGrainedEncoder(8, (1, 2, 4), router=router).train(training)
    block, tokens = EncoderBlock(8, Attention(8, 2), 2).train(training), torch.randn(3, 65, 8)
    assert not encoder.state_dict()
    torch.testing.assert_close(encoder(block, tokens, (8, 8), 1), block(tokens, tokens, (8, 8), 1))
    encoder.router.share = 0.5
    output = encoder(block, tokens, (8, 8), 1)
    assert all(32 - 12 < queries <= 32 for queries in encoder.decision.queries.tolist())
    output.sum().backward()
    assert all(weight.grad is not None for weight in block.parameters())


def test_detail_gets_the_queries():
    """Regions of noise beside flat ones, by the pixels and by the tokens."""
    images = torch.zeros(1, 3, 32, 32)
    images[..., :16] = torch.rand(16)
    for name in ('entropy', 'correlation'):
        encoder = DynamicGrainedEncoder(8, (1, 4), router=name).eval()
        if name == 'entropy':
            encoder.router.images.see(images)
        encoder.router.share = 0.55
        tokens = 1.0 + torch.arange(8.0).expand(1, 8, 8, 8).clone()
        tokens[:, :, :4] = torch.randn(1, 8, 4, 8)
        encoder(EncoderBlock(8, Attention(8, 2), 2).eval(), tokens.flatten(1, 2), (8, 8))
        assert encoder.decision.choice.tolist() == [[[0, 1], [0, 1]]]


@pytest.mark.parametrize('router', UNTRAINED)
@pytest.mark.parametrize('name', ['pvt', 'deit'])
def test_backbones_of_our_own(router, name, backbone_config):
    from mmengine.registry import MODELS

    dge = dict(granularities=(1, 2), router=router, test_budget=0.6)
    model, dense = MODELS.build(backbone_config(name, dge=dge)), MODELS.build(backbone_config(name))
    assert list(model.state_dict()) == list(dense.state_dict())
    images = torch.rand(2, 3, 32, 32)
    for training in (True, False):
        for each in (model.train(training), copy.deepcopy(model)):
            each(images)
            assert (each.cost.query_ratio <= 0.6 + 1e-6).all() and (each.cost.query_ratio > 0.4).all()
    model.set_budget(None)
    model(images)
    assert model.cost.query_ratio.tolist() == pytest.approx([1.0, 1.0])


@pytest.mark.parametrize('router', UNTRAINED)
def test_off_the_shelf(router):
    """One call on a model of another library, without training."""
    import timm

    model = timm.create_model(
        'vit_tiny_patch16_224', img_size=32, patch_size=4, embed_dim=16, depth=2, num_heads=2, num_classes=0
    ).eval()
    images, hooks = torch.rand(2, 3, 32, 32), dict(model._forward_pre_hooks)
    mmdyn.apply_dge(model, router=router, test_budget=0.7)
    with torch.no_grad():
        model(images)
    cost = mmdyn.cost(model)
    assert (cost.query_ratio <= 0.7 + 1e-6).all() and (cost.query_ratio > 0.5).all()
    assert cost.layers[0].router == (3 * 64 * 16 * 2 if router == 'correlation' else 0)
    if router == 'entropy':  # decided once for all layers
        first, second = (encoder.decision.choice for encoder in model.mmdyn_apply_dge.stages[0].dge)
        assert torch.equal(first, second)
    assert mmdyn.remove_dge(model)._forward_pre_hooks == hooks


def test_unknown_router():
    with pytest.raises(ValueError, match=r"dge router='best': choose from \('linear', 'random', 'entropy', 'corr"):
        DynamicGrainedEncoder(8, router='best')
