"""What a wheel and the source tree give to mim, and that mmdet and mmseg are optional."""

import subprocess
import sys
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest

import mmdyn

ROOT = Path(mmdyn.__file__).parents[1]


def names(folder):
    return {
        str(path.relative_to(ROOT))
        for path in (ROOT / folder).rglob('*')
        if path.is_file() and '__pycache__' not in path.parts
    }


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    """The wheel that pip builds, with the setuptools that pyproject.toml asks for."""
    folder = tmp_path_factory.mktemp('wheel')
    subprocess.run([sys.executable, '-m', 'pip', 'wheel', '-q', '--no-deps', '-w', folder, ROOT], check=True)
    return zipfile.ZipFile(next(folder.glob('mmdyn-*.whl')))


def test_wheel_holds_tools_and_configs_for_mim(wheel):
    content = set(wheel.namelist())
    wanted = {f'mmdyn/.mim/{name}' for name in names('tools') | names('configs') | {'model-index.yml'}}
    assert wanted <= content


def test_wheel_holds_the_modules_and_none_that_is_gone(wheel):
    modules, own = (
        {name for name in all_names if name.endswith('.py') and '.mim' not in name}
        for all_names in (wheel.namelist(), names('mmdyn'))
    )
    assert modules == own


def test_wheel_says_that_it_has_types(wheel):
    assert 'mmdyn/py.typed' in wheel.namelist()


def test_wheel_holds_the_page_of_reports(wheel):
    assert 'mmdyn/visualization/page.html' in wheel.namelist()


def test_metadata_of_the_wheel(wheel):
    folder = f'mmdyn-{mmdyn.__version__}.dist-info'
    metadata = message_from_bytes(wheel.read(f'{folder}/METADATA'))
    assert metadata['Name'] == 'mmdyn' and metadata['Version'] == mmdyn.__version__
    assert metadata['License-Expression'] == 'Apache-2.0' and metadata['Summary']
    assert b'Apache License, Version 2.0' in wheel.read(f'{folder}/licenses/{metadata["License-File"]}')
    assert metadata['Requires-Python'] == '>=3.10'
    assert {'torch>=2.6', 'numpy>=1.26.4', 'packaging'} <= set(metadata.get_all('Requires-Dist'))
    extras = {'mim', 'cls', 'det', 'seg', 'analysis', 'bench', 'demo', 'tests', 'all'}
    assert set(metadata.get_all('Provides-Extra')) == extras
    assert metadata.get_payload().strip() == (ROOT / 'README.md').read_text().strip()


def test_changelog_has_the_version():
    assert f'\n## [{mmdyn.__version__}] - 2' in (ROOT / 'CHANGELOG.md').read_text()


def test_setuptools_that_does_not_read_pyproject_is_refused():
    result = subprocess.run(
        [
            sys.executable,
            '-c',
            """
import runpy, setuptools, sys
setuptools.__version__ = '60.2.0'
sys.argv = ['setup.py', '--version']
runpy.run_path(sys.argv[0])
""",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1
    assert 'mmdyn is built with setuptools>=77, but 60.2.0 is installed here' in result.stderr


def test_source_tree_links_to_the_same_places():
    for name in ('tools/train.py', 'tools/test.py', 'configs/_base_/default_runtime.py', 'model-index.yml'):
        assert (ROOT / 'mmdyn/.mim' / name).samefile(ROOT / name)


def test_imports_and_classifies_without_mmdet_mmseg_and_operators():
    subprocess.run(
        [
            sys.executable,
            '-c',
            """
import sys
for name in ('mmdet', 'mmseg', 'mmcv._ext'):
    sys.modules[name] = None
import mmdyn, torch
from mmengine.config import Config
from mmdyn.analysis.flops import build_model
cfg = Config.fromfile(sys.argv[1])
assert build_model(cfg)(torch.zeros(1, 3, 64, 64)).shape == (1, 10)
""",
            ROOT / 'configs/demo/pvt-mini-dge_digits.py',
        ],
        check=True,
    )
