"""The three sets of versions: that they hold the same packages, and that the oldest is what the metadata allow."""

import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import mmdyn
from mmdyn.compat import REQUIRED

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10, where pytest brings it
    import tomli as tomllib

ROOT = Path(mmdyn.__file__).parents[1]
PROJECT = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']
FORKS = dict(
    mmcv='onedl-mmcv',
    mmdet='onedl-mmdetection',
    mmengine='onedl-mmengine',
    mmpretrain='onedl-mmpretrain',
    mmsegmentation='onedl-mmsegmentation',
    openmim='onedl-mim',
)
LINT = {'clang-format', 'mypy', 'pre-commit', 'ruff'}


def pins(name):
    """The packages of a requirements file, and the pinned versions of each."""
    found = {}
    for line in (ROOT / name).read_text().splitlines():
        if line and not line.startswith('#'):
            requirement = Requirement(line)
            assert re.fullmatch(r'==[^=,*]+', str(requirement.specifier)), line
            found.setdefault(requirement.name, []).append(Version(str(requirement.specifier)[2:]))
    return found


def lower_bounds():
    """Of the packages in the metadata, where they have one."""
    for line in [*PROJECT['dependencies'], *sum(PROJECT['optional-dependencies'].values(), [])]:
        requirement = Requirement(line)
        least = [Version(part.version) for part in requirement.specifier if part.operator == '>=']
        if least:
            yield requirement.name, least[0]


def test_each_set_has_each_package():
    wanted = set(pins('requirements.txt')) - LINT - set(PROJECT['optional-dependencies']['bench'])
    assert wanted <= set(pins('requirements-oldest.txt'))
    assert {FORKS.get(name, name) for name in wanted} <= set(pins('requirements-forks.txt'))


def test_runtimes_of_the_benchmark_are_pinned():
    pinned = {*pins('requirements.txt'), *pins('requirements-bench.txt')}
    assert pinned >= set(PROJECT['optional-dependencies']['bench'])


@pytest.mark.parametrize('name, least', list(lower_bounds()))
def test_oldest_set_is_what_the_metadata_allow(name, least):
    assert pins('requirements-oldest.txt')[name] == [least]


@pytest.mark.parametrize('module', REQUIRED)
def test_what_is_checked_at_import_is_what_the_metadata_allow(module):
    least, unfit = REQUIRED[module]
    (written,) = (
        requirement.specifier
        for requirement in map(Requirement, PROJECT['optional-dependencies']['mim'])
        if requirement.name == module
    )
    assert {part.operator: Version(part.version) for part in written} == {'>=': Version(least), '<': Version(unfit)}


def test_newer_sets_are_within_what_is_checked_at_import():
    for file, rename in (('requirements.txt', {}), ('requirements-forks.txt', FORKS)):
        for module, (least, unfit) in REQUIRED.items():
            (pinned,) = pins(file)[rename.get(module, module)]
            assert Version(least) <= pinned < Version(unfit)
