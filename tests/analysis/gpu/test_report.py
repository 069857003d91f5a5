import json
from pathlib import Path

import pytest

import mmdyn
from mmdyn.analysis.gpu.report import markdown

ROOT = Path(mmdyn.__file__).parents[1]
GROUP = dict(
    suite='det',
    arch='PVT-small',
    shape=[800, 1280],
    batch=1,
    dtype='float16',
    rows={
        'dense': dict(seconds=0.012, spread=0.001, time_ratio=1, macs_ratio=1, efficiency=1, peak_memory=1e9),
        'DGE clustered': dict(seconds=0.0081, spread=0.002, time_ratio=0.675, macs_ratio=0.6, efficiency=0.889),
    },
)
RESULTS = dict(
    machine=dict(gpu='Some GPU', torch='2.11.0'),
    step={'install': dict(seconds=3, code=0), 'tests-cuda': dict(seconds=61, code=124)},
    tests=dict(cuda=dict(passed=17, failed=1, skipped=0, failures={'tests.a::test_bad': 'AssertionError'})),
    benchmark=dict(
        device='cuda',
        rounds=20,
        limits=dict(copy=3000.4, float32=60000.0),
        groups=[
            GROUP,
            {**GROUP, 'dtype': 'tf32'},
            dict(
                suite='train',
                arch='PVT-small',
                shape=[256, 256],
                batch=64,
                dtype='float16',
                rows={},
                error='OutOfMemoryError: no',
            ),
        ],
    ),
    traces={
        'PVT-small+DGE [1, 3, 800, 1280] float16': dict(
            query_ratio=0.5,
            kernels=431,
            copies=12,
            device_milliseconds=9.5,
            busy_milliseconds=7.25,
            gap_milliseconds=2.25,
            gaps=40,
            largest_gap_milliseconds=0.125,
            synchronisations={'cudaStreamSynchronize': 13},
            waits={'mmdyn/models/dge/encoder.py:12': 13},
        )
    },
    training=dict(
        float16=dict(
            iterations=200, first_loss=2.3, last_loss=1.4, query_ratio=0.51, budget=0.5, seconds=0.03, wrong=[]
        ),
        bfloat16=dict(wrong=['RuntimeError: no']),
    ),
)


def cells(line):
    return [cell.strip() for cell in line.strip('|').split('|')]


def test_page():
    text = markdown(RESULTS)
    lines = [cells(line) for line in text.splitlines() if line.startswith('|')]
    for line in (
        ['gpu', 'Some GPU'],
        ['tests-cuda', '61', '124'],
        ['PVT with DGE, a large image', 'efficiency', '>= 0.9', '0.89 (1 of 4)', '0.89 (1 of 4)', '-', '-'],
        ['cuda', '17', '1', '0'],
        ['PVT-small 1 x 800 x 1280', 'DGE clustered', '8.100', '2.000', '0.68', '0.60', '0.89', *'----'],
        ['PVT-small+DGE [1, 3, 800, 1280] float16', '0.500', '431', '12', '9.500', '7.250', '2.250', '40', '0.125'],
        ['float16', '200', '2.300', '1.400', '0.510', '0.5', '30.0'],
        ['bfloat16', *'------'],
    ):
        assert line in lines
    assert text.count('### det, float16: ') == text.count('### det, tf32: ') == 1
    for said in (
        '- copy (read and written): 3000 GB/s\n- product of matrices, float32: 60000 GFLOP/s\n',
        '- `tests.a::test_bad`: AssertionError\n',
        '- train, PVT-small, 64 x 256 x 256, float16: OutOfMemoryError: no\n',
        "calls that wait {'cudaStreamSynchronize': 13}; lines that wait {'mmdyn/models/dge/encoder.py:12': ",
        '- bfloat16: RuntimeError: no\n',
    ):
        assert said in text


@pytest.mark.parametrize('missing', RESULTS)
def test_what_was_not_found_has_no_part(missing):
    """As when the machine went away."""
    text = markdown({name: value for name, value in RESULTS.items() if name != missing})
    titles = dict(
        machine='gpu',
        step='## Steps',
        tests='## Tests',
        benchmark='### det',
        traces='## Traces',
        training='## Training',
    )
    assert [name for name, title in titles.items() if title not in text] in ([missing], [])
    assert markdown({}).startswith('# On a GPU')


def test_published_page_is_that_of_the_published_results():
    file = ROOT / 'docs/benchmark-gpu.json'
    if not file.exists():
        pytest.skip('docs/benchmark-gpu.json is not there: nothing was measured on a GPU yet')
    assert file.with_suffix('.md').read_text() == markdown(json.loads(file.read_text()))
