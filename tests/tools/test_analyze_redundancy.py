import importlib.util
import json
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
spec = importlib.util.spec_from_file_location('analyze_redundancy', ROOT / 'tools/analysis_tools/analyze_redundancy.py')
analyze_redundancy = importlib.util.module_from_spec(spec)
spec.loader.exec_module(analyze_redundancy)

CONFIG = """
default_scope = 'mmpretrain'
model = dict(
    type='ImageClassifier', data_preprocessor=dict(num_classes=2, mean=[127.5] * 3, std=[64.] * 3),
    backbone=dict(type='mmdyn.DeiT', arch=dict(embed_dim=16, depth=2, num_heads=2, mlp_ratio=2), img_size=24,
                  patch_size=4),
    head=dict(type='LinearClsHead', num_classes=2, in_channels=16))
test_dataloader = dict(
    batch_size=4, num_workers=0, sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(type='CustomDataset', data_root={root!r},
                 pipeline=[dict(type='LoadImageFromFile'), dict(type='PackInputs')]))
test_evaluator = [dict(type='Accuracy', topk=1), dict(type='mmdyn.DynamicFLOPs')]
"""


@pytest.fixture
def run(tmp_path, monkeypatch, capsys, randomise):
    rng = np.random.default_rng(0)
    for i in range(6):
        path = tmp_path / 'images' / 'ab'[i % 2] / f'{i}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        # Neighbours are alike in some images and not in others.
        image = rng.integers(0, 256, (24 >> i % 3, 24 >> i % 3, 3), np.uint8)
        cv2.imwrite(str(path), cv2.resize(image, (24, 24)))
    (tmp_path / 'deit.py').write_text(CONFIG.format(root=str(tmp_path / 'images')))
    model = randomise(MODELS.build(Config.fromfile(tmp_path / 'deit.py').model), 0.3)
    torch.save(dict(state_dict=model.state_dict()), tmp_path / 'deit.pth')

    def main(*args):
        paths = [str(tmp_path / name) for name in ('deit.py', 'deit.pth')]
        monkeypatch.setattr(sys, 'argv', ['analyze_redundancy.py', *paths, '--out', str(tmp_path / 'out'), *args])
        analyze_redundancy.main()
        return capsys.readouterr(), json.loads((tmp_path / 'out/redundancy.json').read_text())

    main.folder = tmp_path
    return main


def test_accuracy_against_cost(run):
    (out, err), content = run('--thresholds', '-1', '1', '0.5')
    rows = content['rows']
    assert [row['threshold'] for row in rows] == [None, 1, 0.5, -1] and content['metric'] == 'accuracy/top1'
    # Nothing is merged at 1; a quarter of 36 cells is left at -1, and the class token.
    assert rows[0]['query_ratio'] == rows[1]['query_ratio'] == 1 and rows[0]['gflops'] == rows[1]['gflops']
    assert (
        rows[3]['query_ratio'] == pytest.approx(10 / 37) and rows[3]['gflops'] < rows[2]['gflops'] < rows[1]['gflops']
    )
    assert len(content['of_images']) == 6 and len(content['histogram'][0]) == 200
    assert f'{rows[3]["query_ratio"]:10.3f}' in out and 'threshold 0.5: accuracy/top1' in err
    assert cv2.imread(str(run.folder / 'out/redundancy.png')).shape[1] == 11 * 150


def test_images_of_a_folder(run):
    _, content = run('--thresholds', '0.9', '--images', str(run.folder / 'images/a'), '--num', '2')
    assert len(content['of_images']) == 2


@pytest.mark.parametrize('given', [False, True])
def test_images_are_evenly_spaced(given, run):
    """Data are sorted by class: of six images, every second one."""
    options = ['--thresholds', '0.9', *(['--images', str(run.folder / 'images')] if given else [])]
    (_, every), (_, few) = run(*options), run(*options, '--num', '3')
    assert few['of_images'] == [pytest.approx(image, abs=1e-6) for image in every['of_images'][::2]]


@pytest.mark.parametrize(
    'args, message',
    [
        (['--thresholds', '1.5'], '--thresholds [1.5]: a correlation is in [-1, 1]'),
        (['--num', '0'], '--num 0: give the number of images'),
        (['--images', 'nowhere'], 'There is no folder of images nowhere'),
        (['--cfg-options', 'test_evaluator=None'], 'the config has no test_evaluator'),
        (['--cfg-options', 'model.backbone.dge.granularities=(1,2)'], 'measured on a dense plain vision transformer'),
    ],
)
def test_mistakes(args, message, run, capsys):
    with pytest.raises(SystemExit) as end:
        run(*args)
    assert end.value.code == 2 and message in capsys.readouterr().err
