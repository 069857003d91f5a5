import importlib.util
import os
import re
import subprocess
from pathlib import Path

import pytest
from mmengine.config import Config

import mmdyn

ROOT = Path(mmdyn.__file__).parents[1]
spec = importlib.util.spec_from_file_location('demo', ROOT / 'tools/demo.py')
demo = importlib.util.module_from_spec(spec)
spec.loader.exec_module(demo)

COSTS = {'flops/query_ratio': 0.5, 'flops/gflops_dense': 0.02, 'flops/gflops': 0.01234, 'seconds': 61.7}


def test_a_task_has_the_columns_of_its_metrics():
    lines = demo.table({'det': {'coco/bbox_mAP_50': 0.8125, 'coco/segm_mAP_50': 0.5, 'coco/bbox_mAP': 0.4, **COSTS}})
    head, row = lines.splitlines()
    assert head.split('  ')[-1].strip() == 'training s' and 'top-1' not in head and 'mIoU' not in head
    assert row.split() == ['det', '81.2', '50.0', '0.500', '20.00', '12.34', '62']


def test_configs_of_different_tasks_share_a_table():
    lines = demo.table({'a': {'accuracy/top1': 90.0, **COSTS}, 'segmentation': {'mIoU': 33.333, **COSTS}}).splitlines()
    assert lines[0].index('top-1 %') < lines[0].index('mIoU %')
    assert lines[1].split()[:3] == ['a', '90.0', '-'] and lines[2].split()[:3] == ['segmentation', '-', '33.3']
    assert len({len(line) for line in lines}) == 1


@pytest.mark.parametrize(
    'chosen, said',
    [({}, 'spin 1000'), ({'GOMP_SPINCOUNT': '7'}, 'spin 7'), ({'OMP_WAIT_POLICY': 'active'}, 'active spin')],
)
def test_threads_of_its_subprocesses_spin_for_short_unless_asked_to(monkeypatch, tmp_path, chosen, said):
    for name in ('OMP_WAIT_POLICY', 'GOMP_SPINCOUNT'):
        monkeypatch.delenv(name, raising=False)
    for name, value in chosen.items():
        monkeypatch.setenv(name, value)
    mim = tmp_path / 'mim'
    mim.write_text(f'#!/bin/sh\necho $1 $OMP_WAIT_POLICY spin $GOMP_SPINCOUNT > {tmp_path}/said\n')
    mim.chmod(0o755)
    monkeypatch.setattr(demo, 'MIM', mim)
    demo.run_mim('train')
    assert (tmp_path / 'said').read_text() == f'train {said}\n'


@pytest.mark.parametrize('start', [None, 'work_dirs/demo/dense_digits/epoch_10.pth'])
def test_a_config_starts_from_what_another_has_left_in_the_same_folder(monkeypatch, tmp_path, start):
    said, (config, folder) = [], (tmp_path / 'dynamic_digits.py', tmp_path / 'out/dynamic_digits')
    config.write_text(f"load_from = {start!r}\nmodel = dict(type='ImageClassifier')")

    def run_mim(*args):
        said.append([str(arg) for arg in args])
        (folder / 'test/time').mkdir(parents=True, exist_ok=True)
        (folder / 'last_checkpoint').write_text('last.pth')
        (folder / 'test/time/time.json').write_text('{"accuracy/top1": 50.0}')

    monkeypatch.setattr(demo, 'run_mim', run_mim)
    assert demo.run(config, folder)['accuracy/top1'] == 50
    train, test = said
    assert train[:5] == ['train', 'mmdyn', str(config), '--work-dir', str(folder)]
    assert train[5:] == (['--cfg-options', f'load_from={tmp_path}/out/dense_digits/epoch_10.pth'] if start else [])
    assert test[:5] == ['test', 'mmdyn', str(config), '--checkpoint', 'last.pth'] and 'load_from' not in str(test)


@pytest.mark.parametrize(
    'configs', [line.split() for line in re.findall(r'\t\$\(call run-demo,([^,]+),', (ROOT / 'Makefile').read_text())]
)
def test_the_demos_run_what_others_start_from_first(configs):
    for i, name in enumerate(configs):
        start = Config.fromfile(ROOT / f'configs/demo/{name}.py').get('load_from')
        assert start is None or Path(start).parent in [Path('work_dirs/demo') / other for other in configs[:i]]
    assert start is not None and len(configs) == 3  # the last is the dynamic one


@pytest.mark.parametrize('policy', [None, 'passive'])
@pytest.mark.parametrize('target', ['demo', 'demo-det', 'demo-seg', 'demo-cls-cf', 'bench'])
def test_threads_of_the_demos_spin_for_short(target, policy):
    """`make bench` measures what users get without such a variable."""
    environment = {
        name: value for name, value in os.environ.items() if name not in ('OMP_WAIT_POLICY', 'GOMP_SPINCOUNT')
    }
    environment |= {'OMP_WAIT_POLICY': policy} if policy else {}
    printed = subprocess.run(['make', '-np', target], cwd=ROOT, env=environment, capture_output=True, text=True).stdout
    assert (f'\n{target}: GOMP_SPINCOUNT = 1000\n' in printed) == (target != 'bench' and not policy)
    assert f'\n{target}: ' in printed
