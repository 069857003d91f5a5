import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS

import mmdyn

ROOT = Path(mmdyn.__file__).parents[1]
spec = importlib.util.spec_from_file_location('class_attention', ROOT / 'tools/analysis_tools/class_attention.py')
class_attention = importlib.util.module_from_spec(spec)
spec.loader.exec_module(class_attention)

CONFIG = """
default_scope = 'mmpretrain'
model = dict(
    type='mmdyn.CoarseToFineClassifier', data_preprocessor=dict(num_classes=2, mean=[127.5] * 3, std=[64.] * 3),
    backbone=dict(type='mmdyn.CFViT', arch=dict(family='deit', embed_dim=16, depth=2, num_heads=2, mlp_ratio=2),
                  coarse_size=3, patch_size=4, ema_start=1),
    head=dict(type='LinearClsHead', num_classes=2, in_channels=16))
test_dataloader = dict(
    batch_size=4, num_workers=0, sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(type='CustomDataset', data_root={root!r},
                 pipeline=[dict(type='LoadImageFromFile'), dict(type='PackInputs')]))
test_evaluator = dict(type='Accuracy', topk=1)
test_cfg = dict()
"""


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    rng = np.random.default_rng(0)
    for i in range(6):
        path = tmp_path / 'images' / 'ab'[i % 2] / f'{i}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), rng.integers(0, 256, (24, 24, 3), np.uint8))
    (tmp_path / 'vit.py').write_text(CONFIG.format(root=str(tmp_path / 'images')))
    model = MODELS.build(Config.fromfile(tmp_path / 'vit.py').model)
    torch.save(dict(state_dict=model.state_dict()), tmp_path / 'vit.pth')

    def main(*args):
        paths = [str(tmp_path / name) for name in ('vit.py', 'vit.pth')]
        monkeypatch.setattr(sys, 'argv', ['class_attention.py', *paths, '--out', str(tmp_path / 'out'), *args])
        class_attention.main()
        return capsys.readouterr().out, tmp_path / 'out'

    return main


def test_table_and_pictures(run):
    printed, out = run('--patches', '20', '--num', '2', '--side', '60')
    content = json.loads((out / 'patches.json').read_text())
    assert (
        content['patches'] == 20 and content['images'] == 6 and len(content['highest']) == len(content['lowest']) == 2
    )
    assert printed.splitlines()[1].split() == ['1', f'{content["highest"][0]:.2f}', f'{content["lowest"][0]:.2f}']
    pictures = sorted(path.name for path in out.glob('*-*.png'))
    assert pictures == ['0-0.png', '1-1.png'] and cv2.imread(str(out / 'patches.png')).std() > 0
    # The image, coarse and fine splitting, each of 60 pixels and a margin of 4, below a line of 18.
    assert cv2.imread(str(out / '0-0.png')).shape == (60 + 18 + 4, 3 * 64, 3)


def test_progress_is_no_result(tmp_path, run):
    """In a process of its own, as a tool that was imported has a stdout of the test's."""
    paths = [str(tmp_path / name) for name in ('vit.py', 'vit.pth')]
    words = [sys.executable, spec.origin, *paths, '--out', str(tmp_path / 'out'), '--patches', '20', '--num', '1']
    done = subprocess.run(words, check=True, capture_output=True, text=True)
    assert done.stdout.split()[:3] == ['block', 'highest', 'lowest'] and 'ETA' in done.stderr


def test_a_sheet(run):
    _, out = run('--patches', '20', '--num', '2', '--side', '60', '--sheet')
    assert not list(out.glob('*-*.png'))
    assert cv2.imread(str(out / 'sheet.jpg')).shape == (3 * (60 + 18 + 4), 2 * 64, 3)


def test_images_of_a_folder(run, tmp_path):
    _, out = run('--patches', '20', '--images', str(tmp_path / 'images/b'))
    assert sorted(path.name for path in out.glob('*-*.png')) == ['0-1.png', '1-3.png', '2-5.png']


@pytest.mark.parametrize(
    'args, message',
    [
        ([], '--patches 100: an image has 36; give fewer than that'),
        (['--images', 'nowhere'], 'There is no folder of images nowhere'),
        (['--cfg-options', 'test_dataloader=None'], 'the config has no test_dataloader'),
    ],
)
def test_mistakes(args, message, run, capsys):
    with pytest.raises(SystemExit) as end:
        run(*args)
    assert end.value.code == 2 and message in capsys.readouterr().err
