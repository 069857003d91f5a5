import importlib.util
import sys
from pathlib import Path

import pytest

import mmdyn

PATH = Path(mmdyn.__file__).parents[1] / 'tools/dataset_tools/convert_dataset.py'
spec = importlib.util.spec_from_file_location('convert_dataset', PATH)
tool = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tool)


def call(monkeypatch, *args):
    monkeypatch.setattr(sys, 'argv', ['convert_dataset.py', *map(str, args)])
    tool.main()


def test_it_tells_what_it_has_converted(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(tool.CONVERTERS, 'bccd', lambda source, out: dict(train=2, val=1))
    call(monkeypatch, 'bccd', tmp_path, tmp_path / 'out')
    assert capsys.readouterr().out == f'{tmp_path}/out: 2 images for train, 1 images for val\n'


def test_mistakes_end_in_a_line(monkeypatch, tmp_path, capsys):
    for out, message in ((tmp_path, 'is not empty: give a new folder'), (tmp_path / 'out', 'There is no')):
        (tmp_path / 'file').touch()
        with pytest.raises(SystemExit) as error:
            call(monkeypatch, 'camvid', tmp_path / 'missing', out)
        assert error.value.code == 2 and message in capsys.readouterr().err
