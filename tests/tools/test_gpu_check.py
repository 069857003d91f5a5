"""The script runs a python that does nothing but what a test says, and the real one to keep results."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import mmdyn

ROOT = Path(mmdyn.__file__).parents[1]
SCRIPT = ROOT / 'tools/gpu_check.sh'
STEPS = [
    'install',
    'machine',
    'operator',
    'tests-cuda',
    'benchmark',
    'trace-pvt',
    'trace-deit',
    'data',
    'training',
    'kernels',
    'tests-models',
]


@pytest.fixture
def check(tmp_path):
    """Run the script with a python that does as a line of shell says, and return its log and results."""

    def check(line='', **environment):
        python = tmp_path / 'python'
        python.write_text(f'#!/bin/bash\ncase "$*" in *gpu/results.py*) exec {sys.executable} "$@";; esac\n{line}\n')
        python.chmod(0o755)
        (tmp_path / 'some.whl').touch()
        done = subprocess.run(
            ['bash', SCRIPT, tmp_path / 'out'],
            capture_output=True,
            text=True,
            timeout=60,
            env={**os.environ, 'PYTHON': str(python), 'KIT': str(tmp_path), **environment},
        )
        assert done.returncode == 0, done.stderr
        results = tmp_path / 'out/results.json'
        return (tmp_path / 'out/log.txt').read_text(), json.loads(results.read_text())['step']

    return check


def test_no_failure_stops_the_others(check):
    log, steps = check('case "$*" in *gpu/compile*) exit 7;; *gpu/benchmark*) echo no device; exit 1;; esac')
    assert list(steps) == STEPS
    assert {name: step['code'] for name, step in steps.items() if step['code']} == dict(operator=7, benchmark=1)
    assert re.search(r'== benchmark, at most 180 s: .*\nno device\n== benchmark: exit status 1 after \d s\n', log)


def test_a_step_that_takes_too_long_is_ended_and_the_end_is_kept(check):
    log, steps = check('case "$*" in *gpu/machine.py*) exec sleep 60;; esac', GPU_CHECK_SECONDS='2')
    assert list(steps) == STEPS[:2] and steps['machine']['code'] == 124
    assert all(f'== {name}: no time is left' in log for name in STEPS[2:])


def test_mmpretrain_finds_no_transformers(check):
    """It cannot be imported beside those of version 5."""
    code = 'import importlib.metadata as m; print("version", m.version("transformers")); import transformers'
    log, _ = check(f'case "$*" in *gpu/machine.py*) exec {sys.executable} -c \'{code}\';; esac')
    assert '\nversion 0\n' in log and 'ImportError: gpu_check.sh hides transformers from mmpretrain' in log


def test_what_it_runs_is_there():
    subprocess.run(['bash', '-n', SCRIPT], check=True)
    text = SCRIPT.read_text()
    files = re.findall(r'"\$PYTHON" ([\w/]+\.py)', text)
    assert len(files) >= 9 and all((ROOT / file).is_file() for file in files)
    folders = re.findall(r'\btests/\w+', text)
    assert folders == ['tests/models', 'tests/kernels'] and (ROOT / folders[0]).is_dir()
    assert (ROOT / folders[1]).is_dir() or not (ROOT / 'mmdyn/kernels').is_dir()  # which may be deleted
    limits = dict(re.findall(r'step ([a-z-]+) (\d+)', text))
    assert list(limits) == STEPS and int(limits['benchmark']) <= 180
    assert sum(int(limits[name]) for name in STEPS[: STEPS.index('benchmark')]) < 300  # in practice half of that
    for name in ('PVT-small+DGE --shape 800 1280', 'DeiT-small+DGE --shape 224 224'):
        assert f'--models {name}' in text


def test_options_are_those_of_the_tools():
    """Each tool names what the script gives it, be it as a parameter."""
    commands = re.sub(r'\\\n\s*', '', SCRIPT.read_text())
    found = re.findall(r'"\$PYTHON" (tools/\w+/(?!results)\w+\.py)(.*)', commands)
    assert len(found) == 7
    for file, given in found:
        text = (ROOT / file).read_text()
        for option in re.findall(r'--[a-z-]+', given):
            assert f"'{option}'" in text or f'{option[2:].replace("-", "_")}:' in text, (file, option)


@pytest.mark.parametrize(
    'args, said',
    [
        ([], 'usage: bash tools/gpu_check.sh OUT'),
        (['out'], "There are no wheels in missing: run 'make gpu-kit' where there is a package index."),
    ],
)
def test_errors(args, said, tmp_path):
    done = subprocess.run(
        ['bash', SCRIPT, *args], capture_output=True, text=True, cwd=tmp_path, env={**os.environ, 'KIT': 'missing'}
    )
    assert done.returncode == 2 and said in done.stderr


def test_the_kit_has_one_version_of_each_package():
    """Those of requirements.txt, and of others that versions are written of in requirements-gpu.txt."""
    lines = {
        name: [line for line in (ROOT / name).read_text().splitlines() if line and line[0] != '#']
        for name in ('requirements.txt', 'requirements-gpu.txt')
    }
    assert all(re.fullmatch(r'[a-z0-9-]+==[0-9.]+', line) for line in lines['requirements-gpu.txt'])
    pinned, more = ({line.split('==')[0] for line in of} for of in lines.values())
    named = re.search(r'GPU_PACKAGES := (.+)', (ROOT / 'Makefile').read_text())[1].split()
    assert set(named) <= pinned and not more & pinned
