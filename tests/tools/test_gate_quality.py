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
spec = importlib.util.spec_from_file_location('gate_quality', ROOT / 'tools/analysis_tools/gate_quality.py')
gate_quality = importlib.util.module_from_spec(spec)
spec.loader.exec_module(gate_quality)

CONFIG = """
default_scope = 'mmpretrain'
model = dict(
    type='ImageClassifier', data_preprocessor=dict(num_classes=2, mean=[127.5] * 3, std=[64.] * 3),
    backbone=dict(type='mmdyn.DeiT', arch=dict(embed_dim=16, depth=2, num_heads=2, mlp_ratio=2), img_size=24,
                  patch_size=4, dge=dict(granularities=(1, 2))),
    head=dict(type='LinearClsHead', num_classes=2, in_channels=16))
test_dataloader = dict(
    batch_size=3, num_workers=0, sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(type='CustomDataset', data_root={root!r},
                 pipeline=[dict(type='LoadImageFromFile'), dict(type='CenterCrop', crop_size=24),
                           dict(type='PackInputs')]))
"""


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Images with a bright square, and a first router that wants bright regions finely."""
    for i in range(4):
        image, mask = np.zeros((32, 32, 3), np.uint8), np.zeros((32, 32), np.uint8)
        image[4 + 8 : 4 + 16, 4 + 8 * (i % 2) : 12 + 8 * (i % 2)] = 255
        mask[image[..., 0] > 0] = 1
        for folder, content in (('images', image), ('masks', mask)):
            (tmp_path / folder / 'ab'[i % 2]).mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(tmp_path / folder / 'ab'[i % 2] / f'{i}.png'), content)
    (tmp_path / 'deit.py').write_text(CONFIG.format(root=str(tmp_path / 'images')))
    model = MODELS.build(Config.fromfile(tmp_path / 'deit.py').model)
    with torch.no_grad():
        model.backbone.patch_embed.proj.weight.fill_(0.1), model.backbone.patch_embed.proj.bias.zero_()
        model.backbone.pos_embed.zero_()
        router = model.backbone.dge[0].router
        router.weight.zero_(), router.bias.zero_()
        router.weight[0] += 0.1
    torch.save(dict(state_dict=model.state_dict()), tmp_path / 'deit.pth')

    def main(*args, masks='masks'):
        paths = [str(tmp_path / name) for name in ('deit.py', 'deit.pth')]
        options = ['--masks', str(tmp_path / masks), '--out', str(tmp_path / 'out'), *args]
        monkeypatch.setattr(sys, 'argv', ['gate_quality.py', *paths, *options])
        gate_quality.main()
        return capsys.readouterr().out

    main.folder = tmp_path
    return main


def test_table_of_a_router_that_finds_the_foreground(run):
    pytest.importorskip('captum')
    printed = run('--gradcam')
    content = json.loads((run.folder / 'out/gates.json').read_text())
    assert content['images'] == 4 and list(content['rows']) == ['random', 'Grad-CAM', 'blocks.0', 'blocks.1']
    # The squares are regions. Enlarged, a region's score reaches over its edges, but not far.
    assert content['rows']['blocks.0']['mAP'] > 95 and content['rows']['blocks.0']['accuracy'] > 80
    assert content['rows']['random']['accuracy'] == pytest.approx(50, abs=5)
    assert f'{content["rows"]["blocks.0"]["mIoU"]:10.1f}' in printed
    assert cv2.imread(str(run.folder / 'out/gates.png')).std() > 0


@pytest.mark.parametrize(
    'args, masks, message',
    [
        ((), 'nowhere', 'There are no masks'),
        (('--layers', 'blocks.7'), 'masks', "no layers ['blocks.7'] have DGE: choose from ['blocks.0', 'blocks.1']"),
        (('--cfg-options', 'model.backbone.dge=None'), 'masks', 'The model has 0 backbones with DGE'),
        (('--cfg-options', 'test_dataloader=None'), 'masks', 'the config has no test_dataloader'),
    ],
)
def test_mistakes(args, masks, message, run, capsys):
    with pytest.raises(SystemExit) as end:
        run(*args, masks=masks)
    assert end.value.code == 2 and message in capsys.readouterr().err
