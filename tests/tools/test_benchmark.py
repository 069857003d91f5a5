import json
import subprocess
import sys
from pathlib import Path

import pytest

import mmdyn

ROOT = Path(mmdyn.__file__).parents[1]


def benchmark(*args):
    result = subprocess.run([sys.executable, ROOT / 'tools/analysis_tools/benchmark.py', *args, '--threads', '1',
                             '--rounds', '1', '--json'], capture_output=True, text=True, check=True)
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize('suite, archs, cases', [
    ('det', ['PVT-tiny', 'DPVT-tiny'], ['dense', 'DGE clustered', 'DGE random']),
    ('train', ['PVT-tiny'], ['dense', 'DGE sparse', 'DGE dense']),
])
def test_suites(suite, archs, cases):
    result = benchmark('--suite', suite, '--archs', *archs, '--shape', '256', '320', '--batch', '1')
    assert list(result['rows']) == archs
    for arch, rows in result['rows'].items():
        assert list(rows) == cases + ['mmdet'] * (suite == 'det' and arch == 'PVT-tiny')
        assert rows['dense']['macs_ratio'] == rows['dense']['time_ratio'] == 1.
        for name in cases[1:]:
            assert rows[name]['query_ratio'] == pytest.approx(0.5, abs=0.03) or suite == 'train'
            assert 0.5 < rows[name]['macs_ratio'] < 0.7
            assert rows[name]['efficiency'] == pytest.approx(rows[name]['macs_ratio'] / rows[name]['time_ratio'])


def test_coarse_to_fine():
    rows = benchmark('--suite', 'cfvit', '--batch', '4')['rows']['deit-small']
    assert list(rows) == ['timm', 'CF-ViT, 0% stop', 'CF-ViT, 50% stop', 'CF-ViT, 100% stop']
    # 4.60 G for the plain model, 1.10 G for the coarse and 2.91 G for the fine stage, all without the head.
    for name, stop in (('CF-ViT, 0% stop', 0), ('CF-ViT, 50% stop', 0.5), ('CF-ViT, 100% stop', 1)):
        assert rows[name]['macs_ratio'] == pytest.approx((1.10 + (1 - stop) * 2.91) / 4.60, abs=0.005)
