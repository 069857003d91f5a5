import copy
import json
from pathlib import Path

import cv2
import pytest

import mmdyn
from mmdyn.analysis import report

ROOT = Path(mmdyn.__file__).parents[1]

CPU = dict(
    command='python tools/analysis_tools/benchmark.py --suite det',
    device='cpu',
    dtype='float32',
    rounds=7,
    query_ratio=0.4,
    environment=dict(date='2026-01-02', cpu='Some CPU', threads=2),
    limits=dict(copy=20.4, float32=99.6),
    groups=[
        dict(
            suite='train',
            arch='PVT-tiny',
            shape=[64, 64],
            batch=8,
            rows=dict(
                dense=dict(
                    seconds=2, spread=0.5, time_ratio=1, macs_ratio=1, efficiency=1, peak_memory=3e6, memory_ratio=1
                )
            ),
        ),
        dict(
            suite='det',
            arch='PVT-tiny',
            shape=[64, 96],
            batch=1,
            rows={
                'dense': dict(
                    seconds=0.1234,
                    spread=0.01,
                    time_ratio=1,
                    macs_ratio=1,
                    efficiency=1,
                    query_ratio=1,
                    peak_memory=20e6,
                    memory_ratio=1,
                ),
                'DGE finest': dict(
                    seconds=0.2,
                    spread=0,
                    time_ratio=1.621,
                    macs_ratio=1,
                    efficiency=0.617,
                    query_ratio=0.5,
                    peak_memory=3.14e7,
                    memory_ratio=1.57,
                    max_difference=1.2e-6,
                ),
            },
        ),
    ],
)
GPU = dict(
    command='python tools/analysis_tools/benchmark.py --device cuda',
    device='cuda',
    dtype='float32',
    rounds=9,
    query_ratio=0.4,
    environment=dict(date='2026-01-03', gpu='Some GPU'),
    limits=dict(copy=3000.0),
    groups=[
        dict(
            suite='det',
            arch='PVT-tiny',
            shape=[64, 96],
            batch=1,
            rows=dict(dense=dict(seconds=0.004, time_ratio=1, macs_ratio=1, query_ratio=1)),
        ),
        dict(
            suite='det',
            arch='PVT-tiny',
            shape=[64, 96],
            batch=2,
            rows=dict(dense=dict(seconds=0.008, time_ratio=1, macs_ratio=1, query_ratio=1)),
        ),
    ],
)


def cells(text, start):
    """The cells of the only line that starts so."""
    (line,) = (line for line in text.splitlines() if line.startswith(start))
    return [cell.strip() for cell in line.strip('|').split('|')]


@pytest.fixture
def files(tmp_path):
    for name, result in (('cpu', CPU), ('cuda', GPU)):
        (tmp_path / f'{name}.json').write_text(json.dumps(result))
    return tmp_path / 'cuda.json', tmp_path / 'cpu.json'


def test_one_device():
    text = report.markdown({'docs/benchmark.json': CPU})
    assert cells(text, '| PVT-tiny 1 x 64 x 96 | DGE') == [
        'PVT-tiny 1 x 64 x 96',
        'DGE finest',
        '0.200',
        '0.000',
        '1.62',
        '1.00',
        '0.62',
        '0.500',
        '31',
        '1.57',
        '1e-06',
        '-',
        '-',
    ]
    assert cells(text, '| PVT-tiny 8 x 64 x 64 | dense') == [
        'PVT-tiny 8 x 64 x 64',
        'dense',
        '2.000',
        '0.500',
        '1.00',
        '1.00',
        '1.00',
        '-',
        '3',
        '1.00',
        '-',
        '-',
        '-',
    ]
    assert text.index('## det: ') < text.index('## train: ') and '## cls' not in text
    assert (
        '\npython tools/analysis_tools/benchmark.py --suite det\n'
        'python tools/analysis_tools/benchmark_report.py docs/benchmark.json\n'
    ) in text
    for name, value in (
        ('cpu', 'Some CPU'),
        ('threads', '2'),
        ('runs of each case', '7'),
        ('product of matrices, float32, GFLOP/s', '100'),
        ('copy, GB/s (read and written)', '20'),
    ):
        assert f'\n| {name} | {value} |\n' in text
    assert '\n0.4: the finest regions' in text and '](benchmark.png)' in text
    rows = [line for line in text.splitlines() if line.startswith(('| PVT-tiny 1', '| model'))]
    assert len({len(line) for line in rows[:3]}) == 1  # the columns are aligned


def test_runs_on_one_device():
    peers = copy.deepcopy(CPU)
    peers.update(
        command='benchmark.py --suite peers', query_ratio=0.5, environment=dict(date='2026-02-03', OpenVINO='7')
    )
    peers['groups'] = [{**CPU['groups'][1], 'suite': 'peers'}]
    first = report.with_earlier(peers, CPU)
    assert first == {**peers, 'earlier': [CPU]} and report.with_earlier(CPU, dict(groups=[])) == CPU
    det = {**CPU, 'command': 'benchmark.py --suite det', 'groups': CPU['groups'][1:]}
    both = report.with_earlier(det, first)
    train = {**CPU, 'groups': CPU['groups'][:1]}
    assert both == {**det, 'earlier': [train, peers]}
    assert report.with_earlier({**both, 'groups': CPU['groups'] + peers['groups']}, both)['earlier'] == both['earlier']

    text = report.markdown({'docs/benchmark.json': both})
    commands = [CPU['command'], 'benchmark.py --suite peers', 'benchmark.py --suite det']
    assert '\n'.join(['```bash', *commands, 'python tools/analysis_tools/benchmark_report.py']) in text
    assert '\n| suites | train | peers | det |\n' in text
    assert '\n| date | 2026-01-02 | 2026-02-03 | 2026-01-02 |\n' in text and '\n| OpenVINO | - | 7 | - |\n' in text
    assert 'query ratio\n0.4 or 0.5: ' in text
    assert text.index('## det: ') < text.index('## train: ') < text.index('## peers: ')


def test_summary():
    def group(suite, arch, shape, batch=1, **seconds):
        rows = {name.replace('_', ' '): dict(seconds=value, macs_ratio=0.575) for name, value in seconds.items()}
        return dict(suite=suite, arch=arch, shape=shape, batch=batch, rows=rows)

    peers = group(
        'peers', 'PVT-small', [224, 224], mmdet=0.5, onnxruntime=0.4, OpenVINO=0.3, dense=0.2, DGE_clustered=0.1
    )
    cls = group('cls', 'PVT-small', [224, 224], mmdet=5, dense=2, DGE_clustered=1)
    others = [
        group('cls', 'DeiT-small', [224, 224], timm=0.06, dense=0.02),
        group('cls', 'DeiT-small', [224, 224], 8, timm=6, dense=2),
        group('cls', 'DeiT-small', [256, 256], timm=7, dense=3),
    ]
    for result in (dict(groups=[peers, cls, *others]), dict(groups=[cls, *others], earlier=[dict(groups=[peers])])):
        assert report.summary(result).splitlines() == [
            '| | image | PyTorch | onnxruntime | OpenVINO | ours, dense | ours with DGE | its multiply-adds |',
            '|---|---|---|---|---|---|---|---|',
            '| PVT-S | 224x224 | 0.500 (mmdet) | 0.400 | 0.300 | 0.200 | 0.100 | 57 % |',
            '| DeiT-S | 224x224 | 0.060 (timm) | - | - | 0.020 | - | - |',
        ]
    with pytest.raises(ValueError, match='None of the models of the summary was measured: run .* --suite peers'):
        report.summary(CPU)


def test_two_devices(files):
    text = report.markdown(report.read(files))
    assert cells(text, '| PVT-tiny 1 x 64 x 96 | dense')[2:] == [
        '0.123',
        '0.010',
        '1.00',
        '1.00',
        '1.00',
        '1.000',
        '20',
        '1.00',
        '-',
        '0.004',
        '1.00',
    ]
    assert cells(text, '| PVT-tiny 1 x 64 x 96 | DGE')[-2:] == ['-', '-']
    # Of what ran on the GPU alone there is what does not depend on the device.
    assert cells(text, '| PVT-tiny 2 x 64 x 96 | dense')[2:] == [
        '-',
        '-',
        '-',
        '1.00',
        '-',
        '1.000',
        '-',
        '-',
        '-',
        '0.008',
        '1.00',
    ]
    assert '| date | 2026-01-02 | 2026-01-03 |' in text and '| gpu | - | Some GPU |' in text


def test_gpu_alone_has_all_columns():
    line = cells(report.markdown({'benchmark-cuda.json': GPU}), '| PVT-tiny 2 x')
    assert line[2:] == ['0.008', '-', '1.00', '1.00', '-', '1.000', '-', '-', '-']


@pytest.mark.parametrize('num', [1, 4])
def test_plot(num, tmp_path):
    result = copy.deepcopy(CPU)
    result['groups'] = [{**result['groups'][1], 'suite': suite} for suite in list(report.SUITES)[:num]]
    report.draw(result, tmp_path / 'benchmark.png')
    picture = cv2.imread(str(tmp_path / 'benchmark.png'))
    assert picture.shape[1] == pytest.approx(460 * min(num, 3), abs=1)  # of half a pixel
    blue = (abs(picture.astype(int) - (180, 119, 31)).sum(2) < 30).any(0)
    # A bar of 1.62 in each panel, whose axes end at 2.6 and leave the names some place.
    assert 0.3 < blue.mean() < 1.62 / 2.6


def test_files(files, tmp_path):
    report.write_report(report.read(files), tmp_path / 'out')
    assert (tmp_path / 'out/benchmark.md').read_text() == report.markdown({str(files[1]): CPU, str(files[0]): GPU})
    assert (tmp_path / 'out/benchmark.png').exists()


def test_errors(files, tmp_path):
    (tmp_path / 'empty.json').write_text('{}')
    for of, said in (
        (files[:1] * 2, r'cuda.json and .*cuda.json are both of device cuda: give one file of each'),
        ([tmp_path / 'empty.json'], r'empty.json is no result of benchmark.py \(KeyError'),
        ([tmp_path / 'missing.json'], r'missing.json is no result .* give a benchmark.json that it'),
    ):
        with pytest.raises(ValueError, match=said):
            report.read(of)


def test_published_report_is_that_of_the_published_results():
    docs = ROOT / 'docs'
    if not (docs / 'benchmark.json').exists():
        pytest.skip('docs/benchmark.json is not there: make bench')
    found = report.read(file for file in (docs / 'benchmark.json', docs / 'benchmark-cuda.json') if file.exists())
    results = {str(Path(file).relative_to(ROOT)): result for file, result in found.items()}
    assert (docs / 'benchmark.md').read_text() == report.markdown(results)
