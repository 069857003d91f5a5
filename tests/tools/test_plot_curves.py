import importlib.util
import json
import sys
from pathlib import Path

import cv2
import pytest

import mmdyn

ROOT = Path(mmdyn.__file__).parents[1]
spec = importlib.util.spec_from_file_location('plot_curves', ROOT / 'tools/analysis_tools/plot_curves.py')
plot_curves = importlib.util.module_from_spec(spec)
spec.loader.exec_module(plot_curves)


@pytest.fixture
def plot(tmp_path, monkeypatch, capsys):
    row = dict(checkpoint='a', gflops=0.5, milliseconds=3.0, layers=dict(x=0.5, y=1.0))
    rows = [
        {**row, 'mode': 'router', 'accuracy/top1': 70.0},
        {**row, 'mode': 'average', 'gflops': 1.0, 'accuracy/top1': 71.0},
    ]
    curve = dict(threshold=[0, 1], top1=[60, 70], macs=[1e9, 4e9], coarse_right=[6, 0], fine_right=[0, 7])
    files = dict(
        sweep=[dict(metric='accuracy/top1', rows=rows)],
        curve=[dict(curve=curve, coarse_macs=1, fine_macs=1)],
        test=[{'flops/gflops': 2.0, 'mIoU': 30.0}],
        scalars=[dict(lr=1, loss=i, query_ratio=0.5, budget=0.5, step=i) for i in (1, 2)],
    )
    for name, lines in files.items():
        (tmp_path / f'{name}.json').write_text('\n'.join(map(json.dumps, lines)))

    def main(*names):
        given = [str(tmp_path / f'{name}.json') if '=' not in name else name.format(tmp_path) for name in names]
        monkeypatch.setattr(sys, 'argv', ['plot_curves.py', *given, '--out', str(tmp_path / 'out')])
        plot_curves.main()
        pictures = {path.name for path in (tmp_path / 'out').glob('*.png')}
        assert all(cv2.imread(str(tmp_path / 'out' / picture)).std() > 0 for picture in pictures)
        return capsys.readouterr().out, pictures, json.loads((tmp_path / 'out/curves.json').read_text())

    return main


def test_all_that_files_tell_is_drawn(plot):
    out, pictures, content = plot('sweep', 'curve', 'scalars', 'CF={}/curve.json')
    assert pictures == {'cost.png', 'time.png', 'layers.png', 'stages.png', 'training.png'}
    assert content[0]['cost'] == [[0.5, 70], [1.0, 71]] and content[-1]['name'] == 'CF'
    assert all(picture in out for picture in pictures)


def test_a_test_alone_is_a_point(plot):
    _, pictures, content = plot('model={}/test.json')
    assert pictures == {'cost.png'} and content[0]['cost'] == [[2.0, 30.0]] and content[0]['metric'] == 'mIoU'


def test_metrics_that_differ(plot, capsys):
    with pytest.raises(SystemExit) as end:
        plot('sweep', 'test')
    assert end.value.code == 2
    assert "The files tell different metrics, ['accuracy/top1', 'mIoU']: give --metric" in capsys.readouterr().err
