import importlib.util
import re
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config

import mmdyn
from mmdyn.analysis.flops import build_model

ROOT = Path(mmdyn.__file__).parents[1]
spec = importlib.util.spec_from_file_location('draw_regions', ROOT / 'tools/visualizations/draw_regions.py')
draw_regions = importlib.util.module_from_spec(spec)
spec.loader.exec_module(draw_regions)
SIDE = 160 + 4  # of a picture with its margin


@pytest.fixture
def draw(tmp_path, monkeypatch, capsys):
    """Draw two images, one plain and one of noise, with a fresh model; returns what is printed and the pictures."""

    def run(config, *args):
        config = str(ROOT / f'configs/demo/{config}.py')
        state = dict(
            state_dict=build_model(Config.fromfile(config)).state_dict(),
            meta=dict(dataset_meta=dict(classes=[f'class{i}' for i in range(10)])),
        )
        torch.save(state, tmp_path / 'model.pth')
        for folder in ('images/3', 'masks/3'):
            (tmp_path / folder).mkdir(parents=True)
        noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
        mask = np.zeros((64, 64), np.uint8)
        mask[:16, :16] = 255
        for name, image in (('a', np.full_like(noise, (0, 0, 200))), ('b', noise)):
            cv2.imwrite(str(tmp_path / f'images/3/{name}.png'), image)
            cv2.imwrite(str(tmp_path / f'masks/3/{name}.png'), mask)
        folders = [word for name in ('images', 'out') for word in (f'--{name}', str(tmp_path / name))]
        args = [arg.format(masks=tmp_path / 'masks') for arg in args]
        monkeypatch.setattr(sys, 'argv', ['draw_regions.py', config, str(tmp_path / 'model.pth'), *folders, *args])
        draw_regions.main()
        return capsys.readouterr().out, [cv2.imread(str(tmp_path / f'out/3-{name}.png')) for name in 'ab']

    return run


def is_red(title):
    """Whether a line of text, BGR, is written in red."""
    return (title[..., 2] > title[..., 0].astype(int) + 100).any()


def test_images_that_go_on_show_the_patches_that_were_split(draw):
    printed, pictures = draw('cf-vit-mini_digits', '--threshold', '1', '--masks', '{masks}')
    assert '0 of 2 images stop' in printed
    # Of 4 x 4 patches half are split; the object fills one of them.
    shares = re.search(r'hold ([\d.]+)% of the object, ([\d.]+)% of the background', printed)
    inside, outside = (float(share) / 100 for share in shares.groups())
    assert inside in (0, 0.5, 1) and pytest.approx(inside * 16 * 2 + outside * 15 * 16 * 2, abs=0.5) == 16 * 8 * 2
    assert all(picture.shape == (160 + 18 + 4, 3 * SIDE, 3) for picture in pictures)
    plain = pictures[0]
    assert not is_red(plain[:18, SIDE : 2 * SIDE]) and is_red(plain[:18, 2 * SIDE :])
    # The image is red, and half of its area remains so, but for the lines.
    red = (plain == (0, 0, 200)).all(-1)[18:178]
    assert red[:, :160].all()
    assert 0.75 * 0.5 < red[:, 2 * SIDE : 2 * SIDE + 160].mean() < 0.5


def test_a_sheet_is_as_long_as_its_longest_row(draw, tmp_path):
    """An image that stops is a shorter column."""
    _, pictures = draw('cf-vit-mini_digits', '--threshold', '1', '--sheet')
    assert pictures == [None, None] and cv2.imread(str(tmp_path / 'out/sheet.jpg')).shape == (3 * 182, 2 * SIDE, 3)


def test_images_that_stop_have_no_fine_stage(draw):
    printed, pictures = draw('cf-vit-mini_digits', '--threshold', '0')
    assert '2 of 2 images stop' in printed and 'object' not in printed
    assert all(picture.shape[1] == 2 * SIDE and is_red(picture[:18, SIDE:]) for picture in pictures)


def test_every_stage_shows_what_the_fine_one_would_have_made_of_it(draw):
    printed, pictures = draw('cf-vit-mini_digits', '--threshold', '0', '--every-stage')
    assert '2 of 2 images stop' in printed
    for picture in pictures:
        assert picture.shape[1] == 3 * SIDE
        assert is_red(picture[:18, SIDE : 2 * SIDE]) and not is_red(picture[:18, 2 * SIDE :])


def test_plain_model_has_nothing_to_draw(draw):
    with pytest.raises(SystemExit, match='has no CFViT'):
        draw('vit-mini_digits')
