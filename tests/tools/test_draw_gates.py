import importlib.util
import json
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
spec = importlib.util.spec_from_file_location('draw_gates', ROOT / 'tools/visualizations/draw_gates.py')
draw_gates = importlib.util.module_from_spec(spec)
spec.loader.exec_module(draw_gates)


@pytest.fixture
def draw(tmp_path, monkeypatch, capsys):
    """Draw one image with a fresh model; returns what is printed and the picture."""

    def run(config, *args, size=(64, 64), background=0):
        config = str(ROOT / f'configs/demo/{config}.py')
        torch.save(dict(state_dict=build_model(Config.fromfile(config)).state_dict()), tmp_path / 'model.pth')
        for folder in ('images/3', 'masks/3'):
            (tmp_path / folder).mkdir(parents=True)
        image = np.random.default_rng(0).integers(0, 255, (*size, 3), np.uint8)
        mask = np.full(size, background, np.uint8)
        mask[10:30, 20:40] = 255
        cv2.imwrite(str(tmp_path / 'images/3/a.png'), image)
        cv2.imwrite(str(tmp_path / 'masks/3/a.png'), mask)
        options = dict(images='images', masks='masks', out='out')
        folders = [word for name, folder in options.items() for word in (f'--{name}', str(tmp_path / folder))]
        monkeypatch.setattr(sys, 'argv', ['draw_gates.py', config, str(tmp_path / 'model.pth'), *folders, *args])
        draw_gates.main()
        return capsys.readouterr().out, cv2.imread(str(tmp_path / 'out/3-a.png'))

    return run


def test_draws_and_counts(draw):
    printed, picture = draw('pvt-mini-dge_digits', '--predictions')
    # Fresh routers choose the finest granularity, red, in the five blocks of the stages that have several regions.
    assert printed.count('finest granularity on 100.0% of the object, 100.0% of the background') == 5
    assert picture.shape[1] == 7 * (160 + 4)
    blue, _, red = picture[30:170, 2 * 164 + 10 : 3 * 164 - 10].mean((0, 1))
    assert red > blue


@pytest.mark.parametrize('config', ['mask-rcnn_pvt-mini-dge_digits', 'fpn_pvt-mini-dge_digits'])
def test_images_of_other_sizes_are_drawn_without_their_padding(config, draw):
    # mmdet resizes to 85 x 128 and pads to 96 x 128; mmseg leaves the image as it is.
    options = ('--background', '7', '--predictions', '--score-thr', '0')
    printed, picture = draw(config, *options, size=(80, 120), background=7)
    assert printed.count('finest granularity on 100.0% of the object, 100.0% of the background') == 6
    assert picture.shape[0] == 160 + 18 + 4
    assert abs(picture.shape[1] - (2 + 6) * (240 + 4)) <= 2 + 6


@pytest.mark.parametrize('config, width', [('fpn', 240), ('mask-rcnn', 241)])
def test_a_sheet_of_one_layer(config, width, draw, tmp_path):
    options = ('--predictions', '--layers', 'stages.1.blocks.0', '--sheet')
    _, row = draw(f'{config}_pvt-mini-dge_digits', *options, size=(80, 120))
    sheet = cv2.imread(str(tmp_path / 'out/sheet.jpg'))
    # Images side by side, here one; below it the prediction and the gates, each with a title and a margin. What mmdet
    # resizes to 85 x 128 is a little wider than the prediction over the image as it was.
    assert row is None and sheet.shape == (3 * (160 + 18 + 4), width + 4, 3)


def test_layers_that_there_are(draw):
    with pytest.raises(SystemExit, match=r'--layers nowhere: no gates to draw; choose from stages\.0\.blocks\.0, '):
        draw('pvt-mini-dge_digits', '--layers', 'nowhere')


def test_masks_of_several_classes_as_png_files(tmp_path, monkeypatch, capsys):
    """Finest in the left half: all of class 2, half of 0 and 1, which are background; 255 does not count."""
    config = ROOT / 'configs/demo/fpn_pvt-mini-dge_digits.py'
    model = build_model(Config.fromfile(config))
    torch.save(dict(state_dict=model.state_dict()), tmp_path / 'model.pth')
    mask = np.zeros((128, 128), np.uint8)
    mask[32:] = 1
    mask[64:, :64], mask[64:, 64:] = 2, 255
    for folder, name, picture in (('images', 'a.jpg', np.zeros((128, 128, 3), np.uint8)), ('masks', 'a.png', mask)):
        (tmp_path / folder).mkdir()
        cv2.imwrite(str(tmp_path / folder / name), picture)
    half = np.where(np.arange(128) < 64, 1, 2)[None].repeat(128, 0)
    monkeypatch.setattr(draw_gates, 'granularity_of_pixels', lambda encoder, shape, size: half)
    folders = [word for name in ('images', 'masks', 'out') for word in (f'--{name}', str(tmp_path / name))]
    options = ['--background', '0', '1', '--ignore', '255', '--layers', 'stages.0.blocks.0', '--json']
    monkeypatch.setattr(sys, 'argv', ['draw_gates.py', str(config), str(tmp_path / 'model.pth'), *folders, *options])
    draw_gates.main()
    (layer,) = json.loads(capsys.readouterr().out)['layers'].values()
    assert (layer['object'], layer['background'], layer['selectivity']) == (1, 0.5, 0.5)


def test_json_tells_of_each_layer(draw):
    printed, _ = draw('pvt-mini-dge_digits', '--json')
    found = json.loads(printed)
    assert found['pictures'] == 1 and len(found['layers']) == 5
    assert all(
        layer == dict(object=1, background=1, selectivity=0, within_images=0) for layer in found['layers'].values()
    )


def test_dense_model_has_nothing_to_draw(draw):
    with pytest.raises(SystemExit, match='has no DGE'):
        draw('pvt-mini_digits')
