"""The command line; what it does is tested in tests/analysis/test_publish.py."""

import importlib.util
from pathlib import Path

import pytest
import torch
from mmengine.config import Config

import mmdyn
from mmdyn.analysis.flops import build_model

ROOT = Path(mmdyn.__file__).parents[1]
spec = importlib.util.spec_from_file_location('publish', ROOT / 'tools/model_converters/publish_model.py')
tool = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tool)


def test_command_line(tmp_path, capsys):
    config, src = ROOT / 'configs/demo/pvt-mini-dge_digits.py', tmp_path / 'src.pth'
    torch.save(dict(state_dict=build_model(Config.fromfile(config)).state_dict()), src)
    targets = [str(tmp_path / name) for name in ('pvt.pth', 'pvt.safetensors')]
    tool.main([str(src), *targets, '--config', str(config)])
    written = capsys.readouterr().out.split()
    assert [Path(path).suffix for path in written] == ['.pth', '.safetensors'] and all(
        map(torch.os.path.isfile, written)
    )
    with pytest.raises(SystemExit) as exit:
        tool.main([str(src), *targets])
    assert exit.value.code == 2
    assert capsys.readouterr().err.endswith('give it with --config.\n')
