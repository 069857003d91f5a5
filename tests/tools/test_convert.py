"""The command line of the converter; what it does is tested in tests/analysis/test_conversion.py."""

import importlib.util
from pathlib import Path

import pytest
import torch
from mmengine.config import Config

import mmdyn
from mmdyn.models import DeiT

ROOT = Path(mmdyn.__file__).parents[1]
spec = importlib.util.spec_from_file_location('convert', ROOT / 'tools/model_converters/convert.py')
tool = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tool)

BACKBONE = dict(
    type='mmdyn.DeiT', arch=dict(embed_dim=16, depth=1, num_heads=2, mlp_ratio=2), img_size=32, patch_size=8
)


@pytest.fixture
def files(tmp_path):
    """The DGE authors' DeiT with a tensor too many, a place for its conversion, and a config that fits."""
    state = DeiT(**{name: value for name, value in BACKBONE.items() if name != 'type'}).state_dict()
    weights = {name.replace('ffn', 'mlp'): value for name, value in state.items()}
    weights.update({'head.weight': torch.ones(3, 16), 'head.bias': torch.ones(3), 'extra': torch.ones(1)})
    torch.save(weights, tmp_path / 'src.pth')
    head = dict(type='LinearClsHead', num_classes=3, in_channels=16)
    model = dict(type='ImageClassifier', backbone=BACKBONE, head=head)
    Config(dict(model=model, default_scope='mmpretrain')).dump(tmp_path / 'config.py')
    return [str(tmp_path / name) for name in ('src.pth', 'new/folder/dst.pth', 'config.py')]


def test_command_line(files, capsys):
    src, dst, config = files
    with pytest.raises(SystemExit) as exit:
        tool.main(['vtpack', src, dst])
    # An exit with a text prints it and returns 1.
    assert exit.value.code.startswith('error: ') and 'extra' in exit.value.code and not Path(dst).exists()
    tool.main(['vtpack', src, dst, '--allow-partial', '--config', config])
    assert set(torch.load(dst)) == {'state_dict', 'meta'}
    out = capsys.readouterr().out
    assert 'left out: extra\n' in out and ' 1 left out, ' in out


def test_kinds(capsys):
    with pytest.raises(SystemExit):
        tool.main(['resnet', 'src.pth', 'dst.pth'])
    assert 'cfvit' in capsys.readouterr().err
