import os
import zipfile

import numpy as np
import pytest
import torch
from mmengine.config.utils import MODULE2PACKAGE
from mmengine.logging import HistoryBuffer

from mmdyn import compat
from mmdyn.compat import check_versions, find_configs_of_forks, statistic_of_history_buffer


def test_installed_versions_fit():
    check_versions()


@pytest.mark.parametrize('least, unfit, found', [('99.0', '100', r'\d+'), ('0.1', '0.2', r'\d+')])
def test_unfit_version_says_what_to_install(least, unfit, found):
    with pytest.raises(
        ImportError,
        match=rf'needs mmengine>={least},<{unfit}, but {found}.* is installed. Install it with: '
        rf'pip install "mmengine>={least},<{unfit}"',
    ):
        check_versions({'mmengine': (least, unfit)})


def test_missing_package():
    with pytest.raises(ImportError, match='needs nothing>=1,<2, but none is installed'):
        check_versions({'nothing': ('1', '2')})


def test_fork_of_another_distribution_name_counts(tmp_path, monkeypatch):
    """What is imported is what counts, not what pip calls it."""
    (tmp_path / 'forked_foundation.py').write_text("__version__ = '1.5'")
    monkeypatch.syspath_prepend(tmp_path)
    check_versions({'forked_foundation': ('1', '2')})
    with pytest.raises(ImportError, match='needs forked_foundation>=2,<3, but 1.5 is installed'):
        check_versions({'forked_foundation': ('2', '3')})


def test_what_a_foundation_lacks_is_not_taken_for_the_foundation(tmp_path, monkeypatch):
    (tmp_path / 'broken_foundation.py').write_text('import surely_not_installed')
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match='surely_not_installed'):
        check_versions({'broken_foundation': ('1', '2')})


@pytest.mark.parametrize(
    'installed, expected',
    [
        (['mmsegmentation'], 'mmsegmentation'),
        (['onedl-mmsegmentation'], 'onedl-mmsegmentation'),
        (['mmsegmentation', 'onedl-mmsegmentation'], 'mmsegmentation'),
        ([], 'mmsegmentation'),
    ],
)
def test_configs_of_the_fork_of_mmseg_are_found(monkeypatch, installed, expected):
    monkeypatch.setattr(compat, 'is_installed', installed.__contains__)
    monkeypatch.setitem(MODULE2PACKAGE, 'mmseg', 'mmsegmentation')
    find_configs_of_forks()
    assert MODULE2PACKAGE['mmseg'] == expected


def test_checkpoints_may_name_statistics_of_log_buffers_only():
    assert statistic_of_history_buffer(HistoryBuffer, 'mean') is HistoryBuffer.mean
    for owner, name in ((os, 'system'), (HistoryBuffer, '__init__')):
        with pytest.raises(ValueError, match=f'asks for .*{name}, which is no statistic'):
            statistic_of_history_buffer(owner, name)


@pytest.mark.parametrize('core', [b'numpy.core', b'numpy._core'])
def test_checkpoints_of_other_versions_of_numpy_are_read(tmp_path, core):
    """As before numpy 2, and since: the names in the file are replaced by those that the other writes."""
    buffer = HistoryBuffer([1.0, 2.0], [1, 1])
    torch.save(dict(state_dict={}, loss=buffer, best=np.float64(3)), tmp_path / 'own.pth')
    with zipfile.ZipFile(tmp_path / 'own.pth') as own, zipfile.ZipFile(tmp_path / 'other.pth', 'w') as other:
        for name in own.namelist():
            content = own.read(name)
            if name.endswith('data.pkl'):
                content = content.replace(b'numpy._core', b'numpy.core').replace(b'numpy.core', core)
                assert content.count(core + b'.multiarray\n') == 2
            other.writestr(name, content)
    read = torch.load(tmp_path / 'other.pth', weights_only=True)
    assert read['loss'].mean() == 1.5 and read['best'] == 3
