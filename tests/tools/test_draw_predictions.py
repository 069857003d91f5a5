import importlib.util
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
spec = importlib.util.spec_from_file_location('draw_predictions', ROOT / 'tools/visualizations/draw_predictions.py')
draw_predictions = importlib.util.module_from_spec(spec)
spec.loader.exec_module(draw_predictions)


@pytest.fixture
def draw(tmp_path, monkeypatch, capsys):
    (tmp_path / 'images').mkdir()
    for name in 'ab':
        image = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
        cv2.imwrite(str(tmp_path / f'images/{name}.png'), image)

    def run(configs, *args, drop=0):
        models = []
        for name in configs:
            config, checkpoint = str(ROOT / f'configs/demo/{name}.py'), tmp_path / f'{name}.pth'
            torch.save(dict(state_dict=build_model(Config.fromfile(config)).state_dict()), checkpoint)
            models += [config, str(checkpoint)]
        options = ['--images', str(tmp_path / 'images'), '--out', str(tmp_path / 'out'), '--side', '128']
        monkeypatch.setattr(sys, 'argv', ['draw_predictions.py', *models[: len(models) - drop], *options, *args])
        draw_predictions.main()
        return capsys.readouterr().out, cv2.imread(str(tmp_path / 'out/1-b.png'))

    return run


def test_dense_beside_dynamic(draw):
    printed, picture = draw(['fpn_pvt-mini_digits', 'fpn_pvt-mini-dge_digits'], '--score-thr', '0')
    assert '2 pictures in' in printed and picture.shape == (128 + 18 + 4, 3 * 132, 3)


def test_gates(draw):
    # Fresh routers choose the finest granularity, red.
    _, picture = draw(['pvt-mini_digits', 'pvt-mini-dge_digits'], '--gates', '--num', '2')
    assert picture.shape[1] == (1 + 1 + 1 + 5) * 132
    blue, _, red = picture[30:140, 3 * 132 + 5 : 4 * 132 - 5].mean((0, 1))
    assert red > blue + 30


def test_a_sheet(draw, tmp_path):
    """Each image is a column: itself and what two models predict."""
    _, row = draw(['pvt-mini_digits', 'pvt-mini-dge_digits'], '--sheet')
    assert row is None and cv2.imread(str(tmp_path / 'out/sheet.jpg')).shape == (3 * (128 + 18 + 4), 2 * 132, 3)


def test_models_of_the_same_config_are_told_apart(draw, monkeypatch):
    """By their checkpoints; those of other configs by these."""
    titles = []

    def panel(visualizer, path, sample, side, score_thr, title):
        titles.append(title.partition(',')[0])
        return np.zeros((side, side, 3), np.uint8)

    monkeypatch.setattr(draw_predictions, 'prediction_panel', panel)
    draw(['pvt-mini_digits', 'pvt-mini-dge_digits'], '--num', '1')
    assert titles == ['pvt-mini_digits', 'pvt-mini-dge_digits']
    checkpoints = [Path(word) for word in sys.argv if word.endswith('.pth')]
    for name, source in zip('ab', checkpoints[:1] * 2):
        (source.parent / name).mkdir()
        (source.parent / name / 'weights.pth').write_bytes(source.read_bytes())
    config = str(ROOT / 'configs/demo/pvt-mini_digits.py')
    models = [word for name in 'ab' for word in (config, str(checkpoints[0].parent / name / 'weights.pth'))]
    monkeypatch.setattr(sys, 'argv', ['draw_predictions.py', *models, *sys.argv[5:]])
    titles.clear()
    draw_predictions.main()
    assert titles == ['a', 'b']


@pytest.mark.parametrize(
    'configs, drop, message',
    [
        (['pvt-mini_digits'], 1, '1 names of files: give a config and a checkpoint for each model'),
        (['cf-vit-mini_digits'], 0, 'has no backbone of mmdyn that looks at an image once; the stages of CF-ViT are'),
    ],
)
def test_mistakes(configs, drop, message, draw, capsys):
    with pytest.raises(SystemExit) as end:
        draw(configs, drop=drop)
    assert end.value.code == 2 and message in capsys.readouterr().err
