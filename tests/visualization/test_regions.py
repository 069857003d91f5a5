import cv2
import numpy as np
import pytest
import torch
from mmpretrain.structures import DataSample

from mmdyn.models.cfvit import split
from mmdyn.visualization import describe_stages, draw_regions, split_pixels, with_title, write_rows
from mmdyn.visualization.regions import GREY, LINE


def test_pixels_of_split_patches():
    # A grid of 2 x 2 on 4 x 6 pixels: the upper right patch and the lower left one.
    assert split_pixels([1, 2], 2, (4, 6)).tolist() == 2 * [3 * [False] + 3 * [True]] + 2 * [3 * [True] + 3 * [False]]
    assert not split_pixels([], 2, (4, 6)).any() and split_pixels(torch.arange(4).tolist(), 2, (4, 6)).all()


@pytest.mark.parametrize('region', [-1, 4])
def test_a_region_outside_of_the_grid_is_an_error(region):
    with pytest.raises(ValueError, match='grid of 2 x 2 patches, which has 0 to 3'):
        split_pixels([0, region], 2, (8, 8))


def test_sides_that_the_grid_does_not_divide_are_shared_out_to_all_patches():
    counts = [split_pixels([region], 3, (10, 11)).sum() for region in range(9)]
    assert sum(counts) == 110 and min(counts) >= 9 and max(counts) <= 16


def test_split_patches_keep_their_colours_and_get_a_cross_and_the_others_are_grey():
    image = np.zeros((32, 32, 3), np.uint8)
    image[...] = (200, 100, 0)
    drawn = draw_regions(image, 2, [3])
    assert (image == (200, 100, 0)).all()
    corner = drawn[16:, 16:]
    lines = (corner == LINE).all(-1)
    assert (corner[~lines] == (200, 100, 0)).all()
    # Its border on the left and above, and the border between its four fine patches.
    expected = np.zeros((16, 16), bool)
    expected[[0, 8]] = expected[:, [0, 8]] = True
    assert (lines == expected).all()
    others = np.concatenate([drawn[:16, :16].reshape(-1, 3), drawn[17:, :16].reshape(-1, 3)])
    assert (others == int(0.3 * 100 + 0.7 * GREY)).all()


def test_the_fine_patches_drawn_are_those_that_the_model_looks_at():
    # Each fine patch of the split ones, 4 x 4 pixels in a grid of 6 x 6, keeps some of the image; no other does.
    image = np.zeros((24, 24, 3), np.uint8)
    image[..., 0] = 255
    regions = [1, 3, 8]
    red = (draw_regions(image, 3, regions) == (255, 0, 0)).all(-1)
    kept = red.reshape(6, 4, 6, 4).any((1, 3)).reshape(-1)
    assert sorted(np.flatnonzero(kept)) == sorted(split(torch.tensor([regions]), 3)[0].tolist())


def test_a_coarse_look_greys_nothing():
    image = np.zeros((32, 32, 3), np.uint8)
    image[...] = (200, 100, 0)
    drawn = draw_regions(image, 2)
    lines = (drawn == LINE).all(-1)
    assert (drawn[~lines] == (200, 100, 0)).all()
    assert lines.sum() == 2 * 32 - 1 and lines[16].all() and lines[:, 16].all()


def test_stages_are_described_in_words():
    sample = DataSample()
    sample.set_field(torch.tensor([0.1, 0.6, 0.3]), 'coarse_score')
    assert describe_stages(sample, {}) == ['coarse: 1 0.60']
    sample.set_field(torch.tensor([0.1, 0.05, 0.85]), 'fine_score')
    assert describe_stages(sample, dict(classes=('cat', 'dog', 'owl'))) == ['coarse: dog 0.60', 'fine: owl 0.85']


def test_a_title_stands_above_the_picture():
    picture = np.full((20, 60, 3), 9, np.uint8)
    titled = with_title(picture, 'word', (200, 0, 0))
    assert titled.shape == (18 + 20 + 4, 60 + 4, 3)
    assert (titled[18:38, :60] == 9).all() and (titled[38:] == 255).all() and (titled[:, 60:] == 255).all()
    ink = titled[:18, :60].reshape(-1, 3)
    assert 0 < (ink != 255).any(1).sum() < len(ink) and (ink[:, 0] >= 200).all()


def test_a_long_title_is_written_smaller():
    """With 32 letters it would be 40 % wider than the picture, and ends within it; twice as long, it is cut off."""
    picture = np.zeros((20, 200, 3), np.uint8)
    short, long = (with_title(picture, 'o' * count)[:18, :200].min(-1) < 128 for count in (32, 64))
    assert short.any(0)[190:].any() and not short.any(0)[198:].any()
    assert long.any(0)[194:].any()


def test_rows_and_their_sheet(tmp_path):
    """A blue and a red picture of an image, and of another image a picture that is higher and less wide."""
    blue, red, small = (np.full(size, value, np.uint8) for size, value in (((16, 32, 3), (0, 0, 255)),
                        ((16, 32, 3), (255, 0, 0)), ((24, 8, 3), (0, 255, 0))))  # fmt: skip
    rows = {'a': [blue, red], 'b': [small]}
    write_rows(rows, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ['a.png', 'b.png']
    a = cv2.imread(str(tmp_path / 'a.png'))
    assert a.shape == (16, 64, 3) and (a[:, :32] == (255, 0, 0)).all() and (a[:, 32:] == (0, 0, 255)).all()
    write_rows(rows, tmp_path, sheet=True)
    sheet = cv2.imread(str(tmp_path / 'sheet.jpg')).astype(int)
    assert sheet.shape == (32, 40, 3)
    for part, colour in (((8, 8), (255, 0, 0)), ((28, 8), (0, 0, 255)), ((8, 36), (0, 255, 0)), ((30, 38), 255)):
        assert np.abs(sheet[part] - colour).max() < 40
