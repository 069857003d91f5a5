import cv2
import numpy as np
import pytest
import torch
from mmengine.registry import TRANSFORMS
from torchvision.ops import roi_align

from mmdyn.datasets import LoadTokenLabels
from mmdyn.datasets.token_labels import resampling


@pytest.fixture
def save(tmp_path):
    """Save the token labels of an image, whose path it returns."""

    def write(labels):
        (tmp_path / 'maps/n01').mkdir(parents=True, exist_ok=True)
        torch.save(labels, tmp_path / 'maps/n01/a.b.pt')
        return str(tmp_path / 'images/train/n01/a.b.JPEG')

    return write


def test_loads_scores_of_all_classes(save, tmp_path):
    scores, classes = torch.randn(2, 3, 4), torch.stack([torch.randperm(7)[:2] for _ in range(12)], 1).view(2, 3, 4)
    path = save(torch.stack([scores, classes.float()]).half())
    labels = LoadTokenLabels(str(tmp_path / 'maps'), num_classes=7)(dict(img_path=path))['token_label_map']
    expected = torch.zeros(3, 4, 7)
    for k in range(2):
        for row in range(3):
            for column in range(4):
                expected[row, column, classes[k, row, column]] = scores[k, row, column].half()
    torch.testing.assert_close(labels, expected)


@pytest.mark.parametrize(
    'labels, message',
    [
        (torch.zeros(3, 5, 4, 4), r'a.b.pt have the shape \(3, 5, 4, 4\), but need \(2, k, H, W\)'),
        (torch.zeros(2, 5, 4), 'a.b.pt have the shape'),
        (torch.zeros(2, 5, 0, 4), 'a.b.pt have the shape'),
        (dict(labels=1), r'a.b.pt have the shape \(\)'),
        (torch.full((2, 5, 4, 4), 7.0), 'a.b.pt name the classes 7 to 7, but num_classes=7'),
        (torch.full((2, 5, 4, 4), -1.0), 'a.b.pt name the classes -1 to -1'),
    ],
)
def test_names_a_map_that_does_not_fit(save, tmp_path, labels, message):
    with pytest.raises(ValueError, match=message):
        LoadTokenLabels(str(tmp_path / 'maps'), num_classes=7)(dict(img_path=save(labels)))


@pytest.mark.parametrize('content', [None, b'', b'no tensor'])
def test_names_a_map_that_cannot_be_read(save, tmp_path, content):
    path, file = save(torch.zeros(1)), tmp_path / 'maps/n01/a.b.pt'
    file.unlink() if content is None else file.write_bytes(content)
    with pytest.raises(ValueError, match='Cannot load the token labels .*a.b.pt of the image .*a.b.JPEG'):
        LoadTokenLabels(str(tmp_path / 'maps'))(dict(img_path=path))


@pytest.mark.parametrize(
    'top, left, height, width', [(0.0, 0, 1, 1), (0.2, 0.55, 0.31, 0.4), (0.9, 0, 0.1, 0.07), (0, 0.3, 0.85, 0.7)]
)
@pytest.mark.parametrize('grid', [(3, 4), (14, 14), (1, 1)])
def test_resampling_is_roi_align(top, left, height, width, grid):
    maps = torch.randn(1, 5, 6, 9)
    box = torch.tensor([[0, 9 * left, 6 * top, 9 * (left + width), 6 * (top + height)]])
    down, across = resampling(top, height, 6, grid[0]), resampling(left, width, 9, grid[1])
    ours = torch.einsum('yh,bchw,xw->bcyx', down, maps, across)
    torch.testing.assert_close(ours, roi_align(maps, box, grid, aligned=True), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('has_map', [False, True])
def test_crops_images_as_mmpretrain_does(has_map):
    image = np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8)
    options = dict(scale=[32, 48], crop_ratio_range=(0.3, 0.6), interpolation='bicubic')
    ours = TRANSFORMS.build(dict(type='mmdyn.TokenLabelCrop', patch_size=8, **options))
    theirs = TRANSFORMS.build(dict(type='mmpretrain.RandomResizedCrop', **options))
    crops = []
    for crop in (ours, theirs):
        np.random.seed(3)
        extra = dict(token_label_map=torch.zeros(2, 2, 3)) if has_map and crop is ours else {}
        crops.append([crop(dict(img=image, **extra)) for _ in range(4)])
    for our, their in zip(*crops):
        assert np.array_equal(our['img'], their['img']) and our['img_shape'] == their['img_shape']
        assert ('gt_token_score' in our) == has_map and 'token_label_map' not in our
        if has_map:
            assert our['gt_token_score'].shape == (4, 6, 3)


def places(height, width):
    """A map whose two channels are the row and column of each cell's centre, in shares of the sides."""
    rows, columns = ((np.arange(side) + 0.5) / side for side in (height, width))
    return np.stack(np.broadcast_arrays(rows[:, None], columns[None]), -1).astype(np.float32)


@pytest.mark.parametrize('direction', [None, 'horizontal', 'vertical', 'diagonal'])
@pytest.mark.parametrize('flip_first', [False, True])
def test_image_and_labels_stay_together(direction, flip_first):
    """Pixels and scores say where in the image they are from; in the end each patch and its label must agree."""
    crop = TRANSFORMS.build(
        dict(type='mmdyn.TokenLabelCrop', scale=(48, 64), patch_size=16, crop_ratio_range=(0.1, 1.0))
    )
    flip = TRANSFORMS.build(
        dict(type='mmdyn.TokenLabelFlip', prob=float(direction is not None), direction=direction or 'horizontal')
    )
    np.random.seed(0)
    for _ in range(10):
        labels = np.pad(places(60, 80), [(0, 0), (0, 0), (0, 1)])
        results = dict(img=places(90, 140), token_label_map=torch.from_numpy(labels))
        for transform in [flip, crop] if flip_first else [crop, flip]:
            results = transform(results)
        patches = results['img'].reshape(3, 16, 4, 16, 2).mean((1, 3))
        scores = results['gt_token_score'].float().log()
        torch.testing.assert_close(scores[..., :2] - scores[..., 2:], torch.from_numpy(patches), rtol=0, atol=0.012)
        sides = patches[-1, -1] - patches[0, 0]
        assert ((sides < 0) == [direction in ('vertical', 'diagonal'), direction in ('horizontal', 'diagonal')]).all()
        assert results['gt_token_score'].float().sum(-1).allclose(torch.ones(3, 4), atol=2e-3)


@pytest.mark.parametrize('with_labels', [False, True])
def test_a_pipeline_with_and_without_labels(save, tmp_path, with_labels):
    pytest.importorskip('mmpretrain')
    labels = torch.zeros(2, 2, 6, 6)
    labels[0, 0], labels[1, 0], labels[1, 1] = 9, 3, 1
    path = save(labels.half())
    (tmp_path / 'images/train/n01').mkdir(parents=True)
    cv2.imwrite(str(tmp_path / 'a.png'), np.zeros((20, 30, 3), np.uint8))
    (tmp_path / 'a.png').rename(path)
    results = dict(img_path=path, gt_label=3)
    for config in [
        dict(type='mmdyn.LoadImageFromFile'),
        *[dict(type='mmdyn.LoadTokenLabels', root=str(tmp_path / 'maps'), num_classes=5)] * with_labels,
        dict(type='mmdyn.TokenLabelCrop', scale=32, patch_size=8),
        dict(type='mmdyn.TokenLabelFlip', prob=1.0, direction='horizontal'),
        dict(type='mmpretrain.PackInputs', algorithm_keys=['gt_token_score']),
    ]:
        results = TRANSFORMS.build(config)(results)
    sample = results['data_samples']
    assert sample.flip and ('gt_token_score' in sample) == with_labels
    if with_labels:
        assert sample.gt_token_score.shape == (4, 4, 5) and (sample.gt_token_score[..., 3] > 0.99).all()


def test_a_crop_holds_whole_patches():
    with pytest.raises(ValueError, match='scale=40 does not divide into patches of patch_size=16'):
        TRANSFORMS.build(dict(type='mmdyn.TokenLabelCrop', scale=40))
