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
from mmdyn.analysis.latency import supports_bfloat16

ROOT = Path(mmdyn.__file__).parents[1]
spec = importlib.util.spec_from_file_location('benchmark', ROOT / 'tools/analysis_tools/benchmark.py')
benchmark = importlib.util.module_from_spec(spec)
spec.loader.exec_module(benchmark)
BFLOAT16 = ['dense bfloat16', 'DGE bfloat16'] if supports_bfloat16('cpu') else []


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Run the tool once around; returns its result and what it prints."""
    monkeypatch.setattr(benchmark, 'limits', lambda device: dict(float32=1., copy=1.))

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
            torch.nn.init.constant_(encoder.router.bias[-1:], 1000.)
    torch.save(dict(state_dict=model.state_dict()), tmp_path / 'model.pth')
    (tmp_path / 'images').mkdir()
    cv2.imwrite(str(tmp_path / 'images/a.png'), np.zeros((64, 64, 3), np.uint8))
    return ['--trained-config', config, '--trained-checkpoint', tmp_path / 'model.pth', '--trained-images',
            tmp_path / 'images']


def coarsest_ratio(attention):
    """Query ratio at the demo's coarsest granularities, 4, 4, 2 and 2, on maps of 64 x 80 to 8 x 10 cells.

    A query counts as what it costs; ``attention`` tells that of (channels, keys) for the first half of a block.
    """
    used = total = 0
    for dim, ratio, cells, keys, side in ((64, 8, 5120, 80, 4), (128, 8, 1280, 80, 4), (320, 4, 320, 80, 2),
                                          (512, 4, 80, 80, 2)):
        cost = attention(dim, keys) + 2 * ratio * dim**2
        used, total = used + cells / side**2 * cost, total + cells * cost
    return used / total


def test_attention_alone(run):
    group, = run('--suite', 'det', '--archs', 'DPVT-tiny attention', '--shape', 64, 96)[0]['groups']
    ours, theirs = group['rows']['ours'], group['rows']['mmcv fallback']
    assert len(group['rows']) == 2 and ours['macs_ratio'] == theirs['macs_ratio'] == 1
    assert ours['max_difference'] == 0 and 0 < theirs['max_difference'] < 1e-4


def test_detection(run, trained):
    result, printed = run('--suite', 'det', '--archs', 'PVT-tiny', 'DPVT-tiny', '--shape', 256, 320, *trained, '--json')
    assert json.loads(printed.out) == result
    coarsest = {'PVT-tiny': coarsest_ratio(lambda dim, keys: 2 * dim**2 + 2 * keys * dim),
                # Offsets and weights of 4 points for each head, of 64 channels, the output, and 4 cells for each point.
                'DPVT-tiny': coarsest_ratio(lambda dim, keys: dim * dim // 64 * 12 + dim**2 + 16 * dim)}
    assert result['device'] == 'cpu' and result['dtype'] == 'float32' and result['environment']['threads'] == 1
    for group, arch, peer in zip(result['groups'], ('PVT-tiny', 'DPVT-tiny'), ('mmdet', 'mmcv fallback'), strict=True):
        rows = group.pop('rows')
        assert group == dict(suite='det', arch=arch, shape=[256, 320], batch=1)
        assert list(rows) == ['dense', 'DGE clustered', 'DGE random', 'DGE trained', 'DGE finest', peer, *BFLOAT16]
        dense = rows['dense']
        assert dense['macs_ratio'] == dense['time_ratio'] == dense['memory_ratio'] == dense['query_ratio'] == 1
        for name in ('DGE clustered', 'DGE random', *BFLOAT16[1:]):
            assert rows[name]['query_ratio'] == pytest.approx(0.5, abs=0.03)
            assert 0.5 < rows[name]['macs_ratio'] < 0.7
        assert rows['DGE trained']['query_ratio'] == pytest.approx(coarsest[arch], rel=1e-3)
        assert rows['DGE finest']['query_ratio'] == pytest.approx(1)
        assert rows[peer]['macs_ratio'] == 1
        for name in ('DGE finest', peer):
            assert rows[name]['max_difference'] < 1e-4
        for name in BFLOAT16[:1]:
            assert 1e-4 < rows[name]['max_difference'] < 0.1
        for row in rows.values():
            assert row['efficiency'] == pytest.approx(row['macs_ratio'] / row['time_ratio'])
            # At least the first map (64, 64, 80), in the smaller of the two precisions.
            assert row['peak_memory'] > 64 * 64 * 80 * 2
            assert row['memory_ratio'] == pytest.approx(row['peak_memory'] / dense['peak_memory'])


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
def test_classification(run, trained, tmp_path, dtype):
    result, printed = run('--suite', 'cls', '--archs', 'DeiT-tiny', '--shape', 64, 64, '--batch', 2, *trained,
                          '--patterns', 'trained', '--dtype', dtype)
    rows = result['groups'][0]['rows']
    assert list(rows) == ['dense', 'DGE trained', 'DGE finest', 'timm']
    # One region of 4 x 4 cells, and the class token.
    assert rows['DGE trained']['query_ratio'] == pytest.approx(2 / 17)
    assert 1e-4 < rows['timm']['max_difference'] < 0.1
    assert all(f'| {case} ' in printed.out for case in rows)
    assert all((tmp_path / 'out' / name).stat().st_size for name in ('benchmark.md', 'benchmark.png'))


def test_products_are_rounded_for_tf32_only():
    for to_tf32, precision in ((True, 'high'), (False, 'highest')):
        benchmark.round_products(to_tf32)
        assert torch.get_float32_matmul_precision() == precision and torch.backends.cudnn.allow_tf32 == to_tf32


def test_training(run):
    rows = run('--suite', 'train', '--archs', 'PVT-tiny', '--shape', 256, 320, '--batch', 1)[0]['groups'][0]['rows']
    assert list(rows) == ['dense', 'DGE sparse', 'DGE dense']
    for name in ('DGE sparse', 'DGE dense'):
        assert 0.5 < rows[name]['macs_ratio'] < 0.7
    # Gradients of 12.7 million weights and more.
    assert all(row['peak_memory'] > 4 * 12.7e6 for row in rows.values())


def test_coarse_to_fine(run):
    rows = run('--suite', 'cfvit', '--batch', 4)[0]['groups'][0]['rows']
    assert list(rows) == ['timm', 'CF-ViT, 0% stop', 'CF-ViT, 50% stop', 'CF-ViT, 100% stop']
    # 4.60 G for the plain model, 1.10 G for the coarse and 2.91 G for the fine stage, all without the head.
    for name, stop in (('CF-ViT, 0% stop', 0), ('CF-ViT, 50% stop', 0.5), ('CF-ViT, 100% stop', 1)):
        assert rows[name]['macs_ratio'] == pytest.approx((1.10 + (1 - stop) * 2.91) / 4.60, abs=0.005)


@pytest.fixture
def measured(monkeypatch):
    """What is to be measured; nothing is."""
    measured = []

    def measure(suite, arch, shape, batch, args):
        measured.append((suite, arch, *shape, batch))
        return dict(suite=suite, arch=arch, shape=shape, batch=batch, rows=dict(
            dense=dict(seconds=1., time_ratio=1., macs_ratio=1.), other=dict(seconds=1., time_ratio=3., macs_ratio=1.)))

    monkeypatch.setattr(benchmark, 'measure', measure)
    return measured


def test_suites_are_complete(run, measured):
    run('--suite', 'all', '--trained-config', 'no_such_config.py')
    pyramids = ['PVT-small', 'PVT-medium', 'DPVT-small', 'DPVT-medium']
    assert measured == [
        ('cls', 'PVT-small', 224, 224, 1), ('cls', 'PVT-small', 256, 256, 1), ('cls', 'DeiT-small', 224, 224, 1),
        ('cls', 'DeiT-small', 256, 256, 1), *(('det', arch, 800, 1280, 1) for arch in pyramids),
        ('det', 'DPVT-small attention', 800, 1280, 1),
        *(('seg', arch, 512, 2048, 1) for arch in pyramids), ('cfvit', 'DeiT-small', 224, 224, 64),
        ('train', 'PVT-small', 256, 256, 32)]


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
    def measure(suite, arch, shape, batch, args):
        assert args.patterns == ['clustered', 'random']
        raise ImportError('there is no operator')

    monkeypatch.setattr(benchmark, 'measure', measure)
    monkeypatch.setattr(benchmark, 'write_report', lambda *args: None)
    result, printed = run('--archs', 'DPVT-tiny', '--trained-config', 'no_such_config.py')
    assert result['groups'] == []
    assert printed.err == (
        'benchmark.py: no work_dirs/demo/no_such_config/last_checkpoint, so the pattern trained is left out: run `make '
        'demo` first.\nbenchmark.py: DPVT-tiny is left out of det: there is no operator\n')


@pytest.mark.parametrize('args, said', [
    (['--suite', 'all', '--batch', '2', '--query-ratio', '0.4'], '--batch, --query-ratio with --suite all'),
    (['--archs', 'ResNet-50'], '--archs ResNet-50: give FAMILY-SIZE with a FAMILY of PVT, DPVT, DeiT'),
    (['--suite', 'cfvit', '--archs', 'PVT-tiny'], '--archs PVT-tiny: give FAMILY-SIZE with a FAMILY of DeiT'),
    (['--archs', 'PVT-tiny attention'], "--archs 'PVT-tiny attention': attention alone is compared of DPVT"),
    (['--batch', '0'], '--batch 0: give at least 1'),
    (['--dtype', 'tf32'], '--dtype tf32 is a precision of CUDA devices: add --device cuda, or choose float32'),
    (['--device', 'cuda'], '--device cuda, but torch finds no CUDA device: use --device cpu'),
    (['--patterns', 'trained', '--trained-config', 'x.py'], 'No pattern is left: give --patterns'),
    (['--trained-checkpoint', 'missing.pth'], 'There is no checkpoint missing.pth: run `make demo`'),
    (['--patterns', 'random', '--archs', 'PVT-huge'], "Unknown arch 'huge': choose from"),
    (['--patterns', 'random', '--archs', 'PVT-tiny', '--shape', '64', '64', '--query-ratio', '2'], 'query_ratio=2.0'),
])
def test_errors(run, args, said, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    with pytest.raises(SystemExit) as error:
        run(*args)
    assert said in capsys.readouterr().err + str(error.value)


def test_model_without_dge_has_no_routing(run, tmp_path):
    (tmp_path / 'model.pth').touch()
    config = ROOT / 'configs/demo/pvt-mini_digits.py'
    torch.save(dict(state_dict=build_model(Config.fromfile(config)).state_dict()), tmp_path / 'model.pth')
    cv2.imwrite(str(tmp_path / 'a.png'), np.zeros((64, 64, 3), np.uint8))
    with pytest.raises(SystemExit, match='has no DGE: give the --trained-config of one that has'):
        run('--trained-config', config, '--trained-checkpoint', tmp_path / 'model.pth', '--trained-images', tmp_path)
