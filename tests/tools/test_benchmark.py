import importlib.util
import json
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config

import mmdyn
from mmdyn.analysis.flops import build_model
from mmdyn.models.stage import run_blocks

ROOT = Path(mmdyn.__file__).parents[1]
spec = importlib.util.spec_from_file_location('benchmark', ROOT / 'tools/analysis_tools/benchmark.py')
benchmark = importlib.util.module_from_spec(spec)
spec.loader.exec_module(benchmark)


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Run the tool once around; returns its result and what it prints."""
    monkeypatch.setattr(benchmark, 'limits', lambda device: dict(float32=1.0, copy=1.0))

    def run(*args):
        options = ['--threads', '1', '--rounds', '1', '--out', str(tmp_path / 'out')]
        monkeypatch.setattr(sys, 'argv', ['benchmark.py', *map(str, args), *options])
        benchmark.main()
        return json.loads((tmp_path / 'out/benchmark.json').read_text()), capsys.readouterr()

    return run


@pytest.fixture
def trained(tmp_path):
    """Options that name a model whose routers choose the coarsest granularity everywhere, and its only image."""
    config = ROOT / 'configs/demo/pvt-mini-dge_digits.py'
    model = build_model(Config.fromfile(config))
    for stage in model.backbone.stages:
        for encoder in stage.dge:
            torch.nn.init.constant_(encoder.router.bias[-1:], 1000.0)
    torch.save(dict(state_dict=model.state_dict()), tmp_path / 'model.pth')
    (tmp_path / 'images').mkdir()
    cv2.imwrite(str(tmp_path / 'images/a.png'), np.zeros((64, 64, 3), np.uint8))
    return [
        '--trained-config',
        config,
        '--trained-checkpoint',
        tmp_path / 'model.pth',
        '--trained-images',
        tmp_path / 'images',
    ]


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
def test_classification(run, trained, tmp_path, dtype):
    result, printed = run(
        '--suite',
        'cls',
        '--archs',
        'DeiT-tiny',
        '--shape',
        64,
        64,
        '--batch',
        2,
        *trained,
        '--patterns',
        'trained',
        '--dtype',
        dtype,
    )
    assert result['device'] == 'cpu' and result['dtype'] == dtype and result['environment']['threads'] == 1
    rows = result['groups'][0]['rows']
    assert list(rows) == ['dense', 'DGE trained', 'DGE finest', 'timm']
    # One region of 4 x 4 cells, and the class token.
    assert rows['DGE trained']['query_ratio'] == pytest.approx(2 / 17)
    # Without kernels, or where none computes in bfloat16, both are torch's own operators.
    kernels = run_blocks.kernels and (
        dtype != 'bfloat16' or importlib.import_module('mmdyn.kernels.library').runs(half=True) is None
    )
    assert (1e-4 if kernels else 0) <= rows['timm']['max_difference'] < 0.1
    assert all(f'| {case} ' in printed.out for case in rows)
    assert all((tmp_path / 'out' / name).stat().st_size for name in ('benchmark.md', 'benchmark.png'))


def test_json_is_alone_on_stdout(run):
    result, printed = run('--suite', 'cls', '--archs', 'DeiT-tiny', '--shape', 64, 64, '--patterns', 'random', '--json')
    assert json.loads(printed.out) == result and '| DGE random ' in printed.err


@pytest.fixture
def measured(monkeypatch):
    """What is to be measured; nothing is."""
    measured = []

    def measure(suite, arch, shape, batch, options):
        measured.append((suite, arch, *shape, batch))
        return dict(
            suite=suite,
            arch=arch,
            shape=shape,
            batch=batch,
            rows=dict(
                dense=dict(seconds=1.0, time_ratio=1.0, macs_ratio=1.0),
                other=dict(seconds=1.0, time_ratio=3.0, macs_ratio=1.0),
            ),
        )

    monkeypatch.setattr(benchmark, 'measure', measure)
    return measured


def test_suites_are_complete(run, measured):
    run('--suite', 'all', '--trained-config', 'no_such_config.py')
    pyramids = ['PVT-small', 'PVT-medium', 'DPVT-small', 'DPVT-medium']
    others = [
        ('any', f'{family}-{size}', *side, batch)
        for family, size, large in (
            ('timm ViT', 'small', None),
            ('timm DINOv3', 'small', None),
            ('mmpretrain DeiT', 'small', None),
            ('timm PVTv2', 'b1', (800, 1280)),
            ('mmdet PVTv2', 'b1', (800, 1280)),
            ('mmseg MiT', 'b1', (512, 2048)),
            ('timm Swin', 'tiny', None),
            ('mmdet Swin', 'tiny', (800, 1280)),
        )
        for side, batch in [((224, 224), 1), ((224, 224), 16), *([(large, 1)] if large else [])]
    ]
    assert measured == [
        ('cls', 'PVT-small', 224, 224, 1),
        ('cls', 'PVT-small', 256, 256, 1),
        ('cls', 'DeiT-small', 224, 224, 1),
        ('cls', 'DeiT-small', 256, 256, 1),
        *(('det', arch, 800, 1280, 1) for arch in pyramids),
        ('det', 'DPVT-small attention', 800, 1280, 1),
        *(('seg', arch, 512, 2048, 1) for arch in pyramids),
        ('cfvit', 'DeiT-small', 224, 224, 64),
        ('train', 'PVT-small', 256, 256, 32),
        *others,
        ('peers', 'PVT-small', 224, 224, 1),
        ('peers', 'PVT-small', 800, 1280, 1),
        ('peers', 'DPVT-small', 224, 224, 1),
        ('peers', 'DPVT-small', 800, 1280, 1),
        ('peers', 'DeiT-small', 224, 224, 1),
    ]


def test_suites_that_are_not_measured_anew_stay(run, measured, tmp_path):
    run('--suite', 'det', '--patterns', 'random', '--archs', 'PVT-tiny')
    run('--suite', 'train', '--archs', 'PVT-tiny')
    result, printed = run('--suite', 'det', '--patterns', 'random', '--archs', 'DPVT-tiny', '--json')
    (earlier,) = result.pop('earlier')
    assert [(run['command'].split()[3], [group['arch'] for group in run['groups']]) for run in (earlier, result)] == [
        ('train', ['PVT-tiny']),
        ('det', ['DPVT-tiny']),
    ]
    assert json.loads(printed.out) == result
    text = (tmp_path / 'out/benchmark.md').read_text()
    assert earlier['command'] in text and result['command'] in text and '| suites | train | det |' in text

    (tmp_path / 'out/benchmark.json').write_text('{}')
    del measured[:]
    with pytest.raises(SystemExit, match='benchmark.json is no result of benchmark.py'):
        run('--suite', 'train')
    assert measured == []


def test_missing_runtimes_are_told_of(run, measured, monkeypatch):
    monkeypatch.setattr(benchmark, 'versions', lambda: dict(onnxruntime='1.2', OpenVINO=''))
    result, printed = run('--suite', 'peers', '--archs', 'PVT-tiny')
    assert printed.err == "benchmark.py: OpenVINO is left out: pip install 'mmdyn[bench]'\n"
    versions = {name: result['environment'][name] for name in ('onnxruntime', 'OpenVINO')}
    assert versions == dict(onnxruntime='1.2', OpenVINO='not installed')
    assert measured == [('peers', 'PVT-tiny', 224, 224, 1)]
    assert 'OpenVINO' not in run('--suite', 'train')[0]['environment']


def test_runtimes_run_in_float32_on_a_cpu(run, measured, monkeypatch):
    monkeypatch.setattr(benchmark, 'write_report', lambda *args: None)
    run('--suite', 'all', '--trained-config', 'no_such_config.py', '--dtype', 'bfloat16')
    assert {suite for suite, *_ in measured} == set(benchmark.SUITES) - {'peers'}


def test_on_cuda_there_are_more_images(run, measured, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(benchmark, 'environment', lambda device: dict(gpu=device))
    run('--suite', 'cls', '--patterns', 'random', '--archs', 'PVT-tiny')  # on the CPU, whose table gets more columns
    del measured[:]
    run('--suite', 'cls', '--patterns', 'random', '--archs', 'PVT-tiny', '--device', 'cuda')
    assert measured == [('cls', 'PVT-tiny', side, side, batch) for side in (224, 256) for batch in (1, 8, 64)]
    result = json.loads((tmp_path / 'out/benchmark-cuda.json').read_text())
    assert result['environment'] == dict(gpu='cuda') and len(result['groups']) == 6
    text = (tmp_path / 'out/benchmark.md').read_text()
    assert '| device | cpu | cuda |' in text and '| PVT-tiny 64 x 224 x 224 | other' in text


def test_what_is_missing_is_left_out(run, monkeypatch):
    def measure(suite, arch, shape, batch, options):
        assert options.patterns == ['clustered', 'random']
        raise ImportError('there is no operator')

    monkeypatch.setattr(benchmark, 'measure', measure)
    monkeypatch.setattr(benchmark, 'write_report', lambda *args: None)
    result, printed = run('--archs', 'DPVT-tiny', '--trained-config', 'no_such_config.py')
    assert result['groups'] == []
    assert printed.err == (
        'benchmark.py: no work_dirs/demo/no_such_config/last_checkpoint, so the pattern trained is left out: run `make '
        'demo` first.\nbenchmark.py: DPVT-tiny is left out of det: there is no operator\n'
    )


@pytest.mark.parametrize(
    'args, said',
    [
        (['--suite', 'all', '--batch', '2', '--query-ratio', '0.4'], '--batch, --query-ratio with --suite all'),
        (['--archs', 'ResNet-50'], '--archs ResNet-50: give FAMILY-SIZE with a FAMILY of PVT, DPVT, DeiT'),
        (['--suite', 'cfvit', '--archs', 'PVT-tiny'], '--archs PVT-tiny: give FAMILY-SIZE with a FAMILY of DeiT'),
        (['--archs', 'PVT-tiny attention'], "--archs 'PVT-tiny attention': attention alone is compared of DPVT"),
        (['--batch', '0'], '--batch 0: give at least 1'),
        (['--suite', 'peers', '--dtype', 'bfloat16'], '--suite peers compares in float32 on a CPU: leave --device and'),
        (['--dtype', 'tf32'], '--dtype tf32 is a precision of CUDA devices: add --device cuda, or choose float32'),
        (['--device', 'cuda'], '--device cuda, but torch finds no CUDA device: use --device cpu'),
        (['--patterns', 'trained', '--trained-config', 'x.py'], 'No pattern is left: give --patterns'),
        (['--trained-checkpoint', 'missing.pth'], 'There is no checkpoint missing.pth: run `make demo`'),
        (['--patterns', 'random', '--archs', 'PVT-huge'], "Unknown arch 'huge': choose from"),
        (
            ['--patterns', 'random', '--archs', 'PVT-tiny', '--shape', '64', '64', '--query-ratio', '2'],
            'query_ratio=2.0',
        ),
    ],
)
def test_errors(run, args, said, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    with pytest.raises(SystemExit) as error:
        run(*args)
    assert said in capsys.readouterr().err + str(error.value)
