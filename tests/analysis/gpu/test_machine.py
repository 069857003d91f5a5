import platform

import torch

from mmdyn.analysis.gpu.machine import machine, told


def test_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    found = machine()
    assert found['gpu'] == found['driver'] == 'no device' and 'capability' not in found
    assert found['torch'] == torch.__version__ and found['python'] == platform.python_version()


def test_a_package_that_cannot_be_imported_has_no_version(monkeypatch):
    def installed_version(package):
        if package == 'mmdet':
            raise ModuleNotFoundError("No module named 'markdown'")
        return '1'

    monkeypatch.setattr('mmdyn.analysis.gpu.machine.installed_version', installed_version)
    found = machine()
    assert found['mmdet'] == "ModuleNotFoundError: No module named 'markdown'" and found['mmseg'] == '1'


def test_the_last_line_of_a_command_or_why_there_is_none():
    assert told('printf', r'first\nlast\n') == 'last'
    assert "No such file or directory: 'no-such-command'" in told('no-such-command')
    assert 'returned non-zero exit status 1' in told('false')
