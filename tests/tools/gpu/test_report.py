"""The command line; the page itself is tested in tests/analysis/gpu/test_report.py."""

import json

import pytest

RESULTS = dict(machine=dict(gpu='Some GPU'), step={'install': dict(seconds=3, code=0)})


def test_command(tool, tmp_path, capsys):
    (tmp_path / 'results.json').write_text(json.dumps(RESULTS))
    report = tool('report')
    report.main([str(tmp_path / 'results.json'), '--out', str(tmp_path)])
    assert json.loads((tmp_path / 'benchmark-gpu.json').read_text()) == RESULTS
    assert (tmp_path / 'benchmark-gpu.md').read_text() == report.markdown(RESULTS)
    with pytest.raises(SystemExit, match='missing.json is no results.json of tools/gpu_check.sh'):
        report.main([str(tmp_path / 'missing.json')])
