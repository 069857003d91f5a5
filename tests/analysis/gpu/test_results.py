import json
import subprocess
import sys
from pathlib import Path

import pytest

import mmdyn
from mmdyn.analysis.gpu import results

ROOT = Path(mmdyn.__file__).parents[1]
JUNIT = """<?xml version="1.0"?><testsuites><testsuite name="pytest">
<testcase classname="tests.a" name="test_good" time="0.1"/>
<testcase classname="tests.a" name="test_bad">
<failure message="AssertionError: {root}/mmdyn/a.py&#10;more">x</failure></testcase>
<testcase classname="tests.a" name="test_broken"><error message="failed on setup">x</error></testcase>
<testcase classname="tests.a" name="test_absent"><skipped message="no device"/></testcase>
</testsuite></testsuites>""".replace('{root}', str(ROOT))


def test_sections_and_their_entries_are_added(tmp_path):
    file = tmp_path / 'results.json'
    (tmp_path / 'tests.xml').write_text(JUNIT)
    (tmp_path / 'profile.json').write_text(json.dumps([dict(model='PVT', shape=[1, 3], dtype='float16', kernels=7)]))
    results.save(file, 'machine', dict(gpu='Some GPU'))
    for args in (
        'step install 3 0',
        'step tests-cuda 61 124',
        f'tests cuda {tmp_path}/tests.xml',
        f'traces {tmp_path}',
    ):
        results.main([str(file), *args.split()])
    assert json.loads(file.read_text()) == dict(
        machine=dict(gpu='Some GPU'),
        step={'install': dict(seconds=3, code=0), 'tests-cuda': dict(seconds=61, code=124)},
        tests=dict(
            cuda=dict(
                passed=1,
                failed=2,
                skipped=1,
                failures={'tests.a::test_bad': 'AssertionError: mmdyn/a.py', 'tests.a::test_broken': 'failed on setup'},
            )
        ),
        traces={'PVT [1, 3] float16': dict(model='PVT', shape=[1, 3], dtype='float16', kernels=7)},
    )
    assert results.load(file, 'machine', {}) == dict(gpu='Some GPU') and results.load(file, 'training', 5) == 5


def test_a_file_is_whole_when_writing_fails(tmp_path):
    file = tmp_path / 'results.json'
    results.save(file, 'a', 1)
    with pytest.raises(TypeError):
        results.save(file, 'b', object())
    assert json.loads(file.read_text()) == dict(a=1)


@pytest.mark.parametrize(
    'args, said',
    [
        ('tests cuda missing.xml', 'nothing to keep of tests cuda: .*missing.xml'),
        ('traces missing', 'nothing to keep of traces missing: .*profile.json'),
        ('steps install', 'steps: give step, tests or traces'),
    ],
)
def test_errors(args, said, tmp_path):
    with pytest.raises(SystemExit, match=said):
        results.main([str(tmp_path / 'results.json'), *args.split()])


def test_needs_python_alone(tmp_path):
    """As when the step before could not install anything."""
    file = tmp_path / 'results.json'
    subprocess.run([sys.executable, '-S', '-I', results.__file__, file, 'step', 'install', '3', '1'], check=True)
    assert results.load(file, 'step', {}) == dict(install=dict(seconds=3, code=1))
