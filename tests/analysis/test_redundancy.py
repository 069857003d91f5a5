import numpy as np
import pytest
import torch
from mmengine.registry import MODELS
from scipy.stats import pearsonr
from torch import nn

from mmdyn.analysis.redundancy import (
    MergeRedundant,
    measure_redundancy,
    merging,
    patch_correlation,
    plain_vit,
    share_queries,
)


def patches(shape):
    """The cells of each 2 x 2 patch, row by row."""
    for top in range(0, shape[0], 2):
        for left in range(0, shape[1], 2):
            yield [
                (row, column)
                for row in (top, top + 1)
                for column in (left, left + 1)
                if row < shape[0] and column < shape[1]
            ]


def test_correlation_is_that_of_scipy():
    tokens, shape = torch.randn(2, 2 + 15, 6), (3, 5)
    found = patch_correlation(tokens, shape, num_extra=2).view(2, *shape)
    for image, of_image in zip(tokens[:, 2:].view(2, *shape, 6).numpy(), found):
        for cells in patches(shape):
            mean = np.mean([image[cell] for cell in cells], 0)
            for cell in cells:
                assert of_image[cell].item() == pytest.approx(pearsonr(image[cell], mean)[0], abs=1e-5)


def test_token_without_variance():
    assert patch_correlation(torch.ones(1, 4, 3), (2, 2)).tolist() == [[0, 0, 0, 0]]


def test_queries_that_are_shared():
    """Of 2 x 3 cells, those of the left patch but the second share, and one of the two of the right."""
    routing = share_queries(torch.tensor([[1, 0, 1, 1, 1, 0], [0] * 6]).bool(), (2, 3), num_extra=1)
    assert routing.lengths == [1 + 2 + 2, 1 + 6]
    first = routing.query[0].tolist()
    assert first[0] not in first[1:] and first[1] == first[4] == first[5] and len(set(first)) == 5
    assert sorted(routing.query[1].tolist()) == list(range(5, 12))


@torch.no_grad()
@pytest.mark.parametrize('threshold', [-1.0, 0.3, 0.6, 1.0])
def test_block_is_that_of_a_loop(threshold, make_backbone):
    backbone = make_backbone('deit').double().eval()
    block, shape = backbone.blocks[1], (3, 5)
    tokens = torch.randn(2, 1 + 15, 16, dtype=torch.double)
    layer = MergeRedundant(16, threshold)
    found = layer(block, tokens, shape, 1)
    for image in range(2):
        x, queries, place = tokens[image], {0: tokens[image, 0]}, {0: 0}
        for cells in patches(shape):
            index = [1 + row * shape[1] + column for row, column in cells]
            mean = x[index].mean(0)
            for i in index:
                alike = pearsonr(x[i].numpy(), mean.numpy())[0] > threshold
                place[i] = tuple(index) if alike else i
                queries[place[i]] = mean if alike else x[i]
        packed = torch.stack(list(queries.values()))
        residual = block(packed[None], x[None], shape, 1)[0] - packed
        numbers = {key: number for number, key in enumerate(queries)}
        wanted = x + residual[[numbers[place[i]] for i in range(16)]]
        assert torch.allclose(found[image], wanted) and layer.decision.queries[image] == len(queries)
    if threshold == 1:
        assert torch.allclose(found, block(tokens, tokens, shape, 1))


@torch.no_grad()
def test_what_is_merged_is_counted_and_the_model_comes_back(make_backbone):
    backbone, images = make_backbone('deit').eval(), torch.randn(2, 3, 32, 32)
    dense = backbone(images)[0]
    with merging(backbone) as layers:
        assert torch.allclose(backbone(images)[0], dense, atol=1e-5)
        assert backbone.cost.spent.tolist() == [backbone.cost.dense] * 2
        for layer in layers:
            layer.threshold = -1.0
        assert not torch.allclose(backbone(images)[0], dense, atol=1e-3)
        # A query for each 2 x 2 patch of 8 x 8 cells, and the class token; nothing for routers.
        assert all(layer.queries.tolist() == [17, 17] and layer.router == 0 for layer in backbone.cost.layers)
    assert torch.equal(backbone(images)[0], dense) and not backbone.has_dge


def test_statistics_of_images(make_backbone):
    backbone = make_backbone('deit').eval()
    model = nn.ModuleDict(dict(backbone=backbone))
    model.test_step = lambda images: list(backbone(images)[0])
    batches = [torch.randn(2, 3, 32, 32), torch.randn(2, 3, 32, 32), None]
    found = measure_redundancy(model, batches, most=3)
    assert found.histogram.shape == (3, 200) and found.of_images.shape == (4, 3)
    assert found.histogram.sum(1) == pytest.approx([1, 1, 1]) and len(found.edges) == 201
    with torch.no_grad():
        tokens = backbone.patch_embed(torch.cat(batches[:2]))[0] + backbone.pos_embed[:, 1:]
    first = patch_correlation(tokens, (8, 8))
    assert found.of_images[:, 0] == pytest.approx(first.mean(1).numpy(), abs=1e-5)
    share = np.histogram(first.numpy(), np.linspace(-1, 1, 201))[0] / first.numel()
    assert np.abs(found.histogram[0] - share).max() <= 2 / first.numel()


@pytest.mark.parametrize('name, options', [('pvt', {}), ('deit', dict(dge=dict(granularities=(1, 2))))])
def test_other_models(name, options, backbone_config):
    with pytest.raises(ValueError, match=r'on a dense plain vision transformer: give the config .* without dge'):
        plain_vit(MODELS.build(backbone_config(name, **options)))
