import numpy as np
import pytest
import torch
from mmengine.registry import MODELS

from mmdyn.models.layers import ConvStem, PatchEmbed

pytest.importorskip('mmpretrain')
from mmpretrain.structures import DataSample

from mmdyn.models.data_preprocessors.mix_token import exchange_, random_box

BATCH = 5


def make(**options):
    return MODELS.build(dict(type='mmdyn.MixTokenPreprocessor', num_classes=BATCH, **options))


def batch(grid=None):
    """Image i is all i, and so are its label and those of its tokens."""
    samples = [DataSample().set_gt_label(i) for i in range(BATCH)]
    if grid:
        for i, sample in enumerate(samples):
            sample.set_field(torch.eye(BATCH)[i].expand(*grid, -1).half(), 'gt_token_score')
    return dict(inputs=[torch.full((3, 24, 32), float(i)) for i in range(BATCH)], data_samples=samples)


@pytest.mark.parametrize('centres, box', [((4, 2), (2, 6, 1, 3)), ((0, 0), (0, 2, 0, 1)), ((7, 3), (5, 8, 2, 4))])
def test_box(monkeypatch, centres, box):
    """Lambda 0.75 makes a box of half of each side, 4 x 2 of 8 x 4 patches, which the borders clip."""
    centre = dict(zip((8, 4), centres))
    monkeypatch.setattr(np.random, 'beta', lambda a, b: 0.75)
    monkeypatch.setattr(np.random, 'randint', centre.get)
    assert random_box(8, 4, 1.0) == box


@pytest.mark.parametrize('patch_size, grid', [(4, (6, 8)), (8, (6, 8)), (8, (3, 4)), (4, None)])
def test_labels_follow_what_is_seen(patch_size, grid):
    np.random.seed(1)
    model, mixed = make(patch_size=patch_size), 0
    for _ in range(8):
        out = model(batch(grid), training=True)
        for i, (image, sample) in enumerate(zip(out['inputs'], out['data_samples'])):
            patches = image.unfold(1, patch_size, patch_size).unfold(2, patch_size, patch_size).flatten(3)
            assert (patches.amax(3) == patches.amin(3)).all(), 'a patch is of two images'
            seen = patches[0, ..., 0].long()
            assert set(seen.flatten().tolist()) <= {i, BATCH - 1 - i}
            mixed += len(seen.unique()) == 2
            shares = torch.stack([(seen == j).float().mean() for j in range(BATCH)])
            torch.testing.assert_close(sample.gt_score, shares)
            if grid:
                scale = 24 // grid[0]
                assert torch.equal(sample.gt_token_score.argmax(-1), image[0, ::scale, ::scale].long())
                assert (sample.gt_token_score.sum(-1) == 1).all()
    assert mixed > 10


@pytest.mark.parametrize('options, training', [(dict(prob=0.0), True), (dict(), False)])
def test_leaves_a_batch_alone(options, training):
    out = make(patch_size=4, **options)(batch((6, 8)), training)
    for i, (image, sample) in enumerate(zip(out['inputs'], out['data_samples'])):
        assert (image == i).all() and torch.equal(sample.gt_score, torch.eye(BATCH)[i])
        assert (sample.gt_token_score.argmax(-1) == i).all()


def test_images_without_samples():
    assert make()(dict(inputs=batch()['inputs']), training=True)['data_samples'] is None


@pytest.mark.parametrize('stem', [PatchEmbed, ConvStem])
@torch.no_grad()
def test_exchanges_tokens(stem, randomise):
    """Exact for a projection of patches; the convolutions look across the border of the box into the next patches."""
    embed, box = randomise(stem(3, 8, 8)).eval(), (2, 5, 1, 5)
    images = torch.randn(3, 3, 48, 56)
    tokens = embed(images)[0].unflatten(1, (6, 7))
    exchange_(tokens, box, 1)
    exchange_(images.movedim(1, -1), box, 8)
    difference = (embed(images)[0].unflatten(1, (6, 7)) - tokens).abs().amax((0, 3))
    # The second image is its own partner; the tokens away from the border are those of the box's inside and outside.
    away = torch.zeros(6, 7, dtype=torch.bool)
    away[0] = away[:, 6] = away[3, 2:4] = True
    assert (difference[away] < 1e-5).all()
    assert (difference[~away] < 1e-5).all() == (stem is PatchEmbed)


def test_trains_a_classifier_without_maps(backbone_config):
    model = MODELS.build(
        dict(
            type='mmpretrain.ImageClassifier',
            backbone=backbone_config('lvvit'),
            data_preprocessor=dict(
                type='mmdyn.MixTokenPreprocessor', num_classes=BATCH, patch_size=4, mean=[1.0] * 3, std=[2.0] * 3
            ),
            head=dict(type='mmdyn.LVViTHead', num_classes=BATCH, in_channels=16),
        )
    )
    losses = model(**model.data_preprocessor(batch(), training=True), mode='loss')
    assert set(losses) == {'loss', 'loss_aux'} and all(loss.isfinite() for loss in losses.values())


@pytest.mark.parametrize(
    'options, grid, message',
    [
        (dict(patch_size=8), (5, 8), '5 x 8 cells do not divide into the 3 x 4 patches of patch_size=8'),
        (dict(patch_size=4), (3, 4), '3 x 4 cells do not divide into the 6 x 8 patches of patch_size=4'),
        (dict(patch_size=64), None, 'Images of 24 x 32 hold no patch of patch_size=64'),
        (dict(batch_augments=dict(augments=dict(type='CutMix', alpha=1.0))), (6, 8), 'do not move token labels'),
    ],
)
def test_what_does_not_fit(options, grid, message):
    with pytest.raises(ValueError, match=message):
        make(**options)(batch(grid), training=True)


@pytest.mark.parametrize('options, message', [(dict(prob=1.5), 'prob=1.5'), (dict(alpha=0), 'alpha=0')])
def test_options(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)
