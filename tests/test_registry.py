import subprocess
import sys

import pytest
from mmengine.registry import HOOKS, MODELS, TRANSFORMS, init_default_scope

import mmdyn


@pytest.mark.parametrize('scope', ['mmpretrain', 'mmdet', 'mmseg'])
def test_bare_names_work_in_every_scope(scope):
    pytest.importorskip(scope)
    init_default_scope(scope)
    assert isinstance(MODELS.build(dict(type='PVT', arch='tiny', img_size=32)), mmdyn.models.PVT)
    assert isinstance(HOOKS.build(dict(type='BudgetHook')), mmdyn.engine.BudgetHook)


def test_names_of_others_stay_theirs():
    assert TRANSFORMS.get('LoadImageFromFile').__module__.startswith('mmcv')
    assert TRANSFORMS.get('mmdyn.LoadImageFromFile') is mmdyn.datasets.LoadImageFromFile


@pytest.mark.parametrize('scope', ['mmpretrain', 'mmdet', 'mmseg'])
def test_the_prefix_alone_finds_the_package(scope):
    pytest.importorskip(scope)
    subprocess.run([sys.executable, '-c', f'''
import sys
from {scope}.registry import MODELS
assert 'mmdyn' not in sys.modules
MODELS.build(dict(type='mmdyn.PVT', arch='tiny', img_size=32))
'''], check=True)
