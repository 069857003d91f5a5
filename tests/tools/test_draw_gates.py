import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import torch
from mmengine.config import Config

import mmdyn
from mmdyn.analysis.flops import build_model

ROOT = Path(mmdyn.__file__).parents[1]


def draw(config, tmp_path, *args):
    model = build_model(Config.fromfile(config))
    torch.save(dict(state_dict=model.state_dict()), tmp_path / 'model.pth')
    image = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    for folder in ('images/3', 'masks/3'):
        (tmp_path / folder).mkdir(parents=True)
    cv2.imwrite(str(tmp_path / 'images/3/a.png'), image)
    mask = np.zeros((64, 64), np.uint8)
    mask[10:30, 20:40] = 255
    cv2.imwrite(str(tmp_path / 'masks/3/a.png'), mask)
    return subprocess.run([sys.executable, ROOT / 'tools/visualizations/draw_gates.py', config, tmp_path / 'model.pth',
                           '--images', tmp_path / 'images', '--out', tmp_path / 'out', *args], capture_output=True, text=True)


def test_draws_and_counts(tmp_path):
    result = draw(ROOT / 'configs/demo/pvt-mini-dge_digits.py', tmp_path, '--masks', tmp_path / 'masks')
    assert result.returncode == 0, result.stderr
    # Fresh routers choose the finest granularity, red, in the five blocks of the stages that have several regions.
    assert result.stdout.count('finest granularity on 100.0% of the object, 100.0% of the background') == 5
    picture = cv2.imread(str(tmp_path / 'out/3-a.png'))
    assert picture.shape[1] == 6 * (160 + 4)
    blue, _, red = picture[30:170, 170:320].mean((0, 1))
    assert red > blue


def test_dense_model_has_nothing_to_draw(tmp_path):
    result = draw(ROOT / 'configs/demo/pvt-mini_digits.py', tmp_path)
    assert result.returncode and 'has no DGE' in result.stderr and 'Traceback' not in result.stderr
