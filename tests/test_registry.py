import subprocess
import sys

import pytest
from mmengine.config import Config
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
    subprocess.run(
        [
            sys.executable,
            '-c',
            f"""
import sys
from {scope}.registry import MODELS
assert 'mmdyn' not in sys.modules
MODELS.build(dict(type='mmdyn.PVT', arch='tiny', img_size=32))
""",
        ],
        check=True,
    )


PUBLIC = {
    'models': [
        'CFViT',
        'CoarseToFineClassifier',
        'DPVT',
        'DeiT',
        'LVViT',
        'LVViTHead',
        'MaskTTAModel',
        'MixTokenPreprocessor',
        'WithDGE',
        'PVT',
    ],
    'engine': [
        'BudgetHook',
        'DenseTeacherHook',
        'FineSelectionHook',
        'FrozenStartHook',
        'GateNoiseHook',
        'LossGuardHook',
        'RandomStateHook',
    ],
    'evaluation': ['CoarseToFineMetric', 'DynamicFLOPs', 'GateQuality'],
    'datasets': [
        'ADE20KDataset',
        'BaseSegDataset',
        'CocoDataset',
        'CustomDataset',
        'ImageNet',
        'LoadImageFromFile',
        'LoadTokenLabels',
        'TokenLabelCrop',
        'TokenLabelFlip',
    ],
}
PURE_PYTHON = """
from mmdyn.{module} import {name}
part = dict(type={name})
"""


@pytest.mark.parametrize('module, name', [(module, name) for module, names in PUBLIC.items() for name in names])
def test_pure_python_configs_import_every_class(module, name, tmp_path):
    (tmp_path / 'config.py').write_text(PURE_PYTHON.format(module=module, name=name))
    kind = Config.fromfile(tmp_path / 'config.py').part.type
    assert isinstance(kind, type) and kind.__name__ == name and kind.__module__.startswith(f'mmdyn.{module}')


def test_every_name_that_is_registered_is_public():
    registered = {
        name
        for registry in (mmdyn.registry.MODELS, mmdyn.registry.HOOKS, mmdyn.registry.METRICS, mmdyn.registry.TRANSFORMS)
        for name in registry.module_dict
    }
    data_sets = set(mmdyn.datasets.LAZY)
    assert registered | data_sets == {name for names in PUBLIC.values() for name in names}


@pytest.mark.parametrize('module', [mmdyn.models, mmdyn.datasets])
def test_other_names_are_no_attributes(module):
    with pytest.raises(AttributeError, match='has no attribute .Nothing.'):
        module.Nothing


@pytest.mark.parametrize(
    'module, name, framework, others',
    [
        ('models', 'MaskTTAModel', 'mmdet', ['mmseg']),
        ('datasets', 'CocoDataset', 'mmdet', ['mmseg', 'mmpretrain']),
    ],
)
def test_a_name_imports_its_framework_alone(module, name, framework, others):
    subprocess.run(
        [
            sys.executable,
            '-c',
            f"""
import sys
from mmdyn import {module}
assert {framework!r} not in sys.modules
{module}.{name}
assert {framework!r} in sys.modules and not set({others}) & set(sys.modules)
""",
        ],
        check=True,
    )


def test_a_data_set_imports_its_framework_alone():
    subprocess.run(
        [
            sys.executable,
            '-c',
            """
import sys
from mmengine.registry import DATASETS
assert len(DATASETS.get('mmdyn.ImageNet').METAINFO['classes']) == 1000
assert 'mmpretrain' in sys.modules and not {'mmdet', 'mmseg'} & set(sys.modules)
""",
        ],
        check=True,
    )
