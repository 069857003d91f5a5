import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

import mmdyn

ROOT = Path(mmdyn.__file__).parents[1]


def paper_tables(*args):
    return subprocess.run(
        [sys.executable, ROOT / 'tools/analysis_tools/paper_tables.py', *args], capture_output=True, text=True
    )


@pytest.fixture(scope='module')
def table():
    return json.loads(paper_tables('--paper', 'dge', '--table', '1', '--json').stdout)[0]


def pvt_small(query_ratio):
    """Multiply-adds of a PVT-S classifier of 256 x 256 images at a query ratio, and of its routers for (1, 2, 4)."""
    total, routers = 512 * 1000, 0
    for dim, depth, ratio, reduction, before, patch, side in zip(
        (64, 128, 320, 512), (3, 4, 6, 3), (8, 8, 4, 4), (8, 4, 2, 1), (3, 64, 128, 320), (4, 2, 2, 2), (64, 32, 16, 8)
    ):
        cells, extra = side**2, dim == 512
        keys = cells // reduction**2 + extra
        total += cells * before * patch**2 * dim
        reduced = (keys - extra) * reduction**2 * dim**2 if reduction > 1 else 0
        query = 2 * dim**2 + 2 * keys * dim + 2 * ratio * dim**2
        total += depth * (query_ratio * (cells + extra) * query + keys * 2 * dim**2 + reduced)
        routers += depth * (side // 4) ** 2 * dim * 3
    return total, routers


def test_counts_by_hand(table):
    row = next(row for row in table['rows'] if row['model'] == 'PVT-S+DGE (1,2,4)')
    assert row['config'] == 'configs/dge/pvt-small-dge_8xb16_in1k-256px.py'
    ours, (dense, _), (spent, routers) = row['ours'], pvt_small(1.0), pvt_small(0.5)
    assert ours['dense'] * 1e9 == pytest.approx(dense) and ours['spent'] * 1e9 == pytest.approx(spent + routers)
    routers_params = sum(depth * 3 * (dim + 1) for dim, depth in zip((64, 128, 320, 512), (3, 4, 6, 3)))
    assert (ours['params_dge'] - ours['params']) * 1e6 == pytest.approx(routers_params)
    assert row['difference']['dense'] == pytest.approx(dense / 6.2e9 - 1)
    saved, _ = pvt_small(row['query_ratio_of_papers_saving'])
    assert dense - saved - routers == pytest.approx(6.2e9 - 3.5e9)


def test_other_dense_models_are_explained(table):
    assert all('the dense models are not the same, 5.04 G and 6.2 G' in row['why'][0] for row in table['rows'])


@pytest.fixture
def tool():
    spec = importlib.util.spec_from_file_location('paper_tables', ROOT / 'tools/analysis_tools/paper_tables.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    'change, said',
    [
        (dict(), []),
        (dict(params=10.2), ['10 M parameters are printed, 10.20 M counted', 'Mask R-CNN has from 15.6 to 16.1']),
        # Printed are 30 G: of 80 G that is a ratio of 1 - 30 / 80 (and a bit for the routers).
        (
            dict(saving=39.0),
            [
                'queries spend 80.0 of the 90.0 G',
                'ratio of 0.5 saves 39.0 G, and would save 45.0 G',
                'The printed 30 G are what a query ratio of 0.61 saves',
            ],
        ),
        (dict(dense=110.0), ['110.00 G and 100 G. The paper saves 30% of its own, ours 28%']),
    ],
)
def test_what_is_explained(tool, change, said):
    ours = dict(
        params=10.0, params_dge=10.0, dense=100.0, spent=69.0, saving=31.0, blocks=90.0, queries=80.0, routers=1.0
    )
    row = dict(model='X+DGE', config='x.py', params=10, dense=100, spent=70)
    result = tool.compare(row, {**ours, **change}, 0.5)
    assert len(result['why']) == bool(said) and all(text in result['why'][0] for text in said)


def test_text():
    text = paper_tables('--table', '1').stdout
    assert 'Protocol of DGE (supplement B.3)' in text and 'PVT-S+DGE (1,2,4,8)' in text
    assert 'The table contradicts' in text and 'DeiT-S 7x7' in text


def plain_vit(tokens, patches, dim, depth, ratio):
    """Multiply-adds of a vision transformer's blocks, of its linear patch embedding and of a classifier."""
    block = tokens * (4 + 2 * ratio) * dim**2 + 2 * tokens**2 * dim
    return depth * block + patches * 16 * 16 * 3 * dim + dim * 1000


def test_stages_by_hand(tool):
    backbone = dict(type='mmdyn.CFViT', arch='deit-small', alpha=0.4)
    coarse = plain_vit(50, 49, 384, 12, 4) + 9 * 50 * 384  # and the class attention of blocks 4 to 12
    fine = plain_vit(1 + 4 * 20 + 29, 196, 384, 12, 4) + 49 * 2 * 4 * 384**2  # and the MLP of the feature reuse
    row = tool.compare_stages(dict(model='x', backbone=backbone, macs=4.0))
    assert row['ours']['macs'] * 1e9 == pytest.approx(coarse + fine)
    assert row['difference']['macs'] == pytest.approx((coarse + fine) / 4e9 - 1)
    stops = tool.compare_stages(dict(model='x', backbone=backbone, macs=2.0, eta=0.5))
    assert (coarse + (1 - stops['exits']) * fine) / 1e9 == pytest.approx(2.0)


def test_unknown_table():
    assert "invalid choice: '5'" in paper_tables('--table', '5').stderr
