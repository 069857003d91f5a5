import pytest

from mmdyn.analysis.gpu.aims import AIMS, aims_table


def group(arch, shape, efficiency, suite='det', dtype='float16', row='DGE clustered', batch=1, **entries):
    rows = {row: dict(efficiency=efficiency, **entries)}
    return dict(suite=suite, arch=arch, shape=list(shape), batch=batch, dtype=dtype, rows=rows)


GROUPS = [
    group('PVT-small', (800, 1280), 0.95),
    group('PVT-small', (512, 2048), 0.875, suite='seg'),
    group('PVT-medium', (800, 1280), 0.5, dtype='tf32'),
    group('PVT-small', (64, 64), 0.1),  # of no aim
    dict(
        suite='det', arch='PVT-medium', shape=[800, 1280], batch=1, dtype='float16', rows={}, error='OutOfMemoryError'
    ),
    group('PVT-small', (256, 256), 1.0, 'train', row='DGE sparse', batch=64, time_ratio=0.7, memory_ratio=0.6),
]


def test_each_aim_is_of_cases_that_are_measured():
    assert [len(aim.cases) for aim in AIMS] == [4, 4, 4, 4, 4, 4, 1, 1, 1, 1]


@pytest.mark.parametrize(
    'line',
    [
        ['PVT with DGE, a large image', 'efficiency', '>= 0.9', '0.88 (2 of 4)', '0.50 (1 of 4)', '-', '-'],
        ['sparse training, time', 'time ratio', '<= 0.667', '0.70 (1 of 1)', '-', '-', '-'],
        ['DPVT with DGE, a large image', 'efficiency', '>= 0.85', '-', '-', '-', '-'],
    ],
)
def test_the_worst_case_counts(line):
    assert line in list(aims_table(GROUPS))
