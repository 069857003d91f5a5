"""The commands of the README, from another folder, on a handful of images."""
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mmdyn  # noqa: F401

ROOT = Path(mmdyn.__file__).parents[1]
MIM = Path(sys.executable).with_name('mim')
CONFIG = 'pvt-mini-dge_digits.py'


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A folder that holds the demo data, with two images of each class."""
    folder = tmp_path_factory.mktemp('user')
    subprocess.run([sys.executable, ROOT / 'tools/dataset_tools/make_demo_dataset.py', '--cls-train', '20', '--cls-val',
                    '20', '--dense-train', '1', '--dense-val', '1'], cwd=folder, check=True)
    return folder


def mim(folder, *args, epochs=1):
    command = [MIM, *args, '--cfg-options', f'train_cfg.max_epochs={epochs}', 'train_cfg.val_interval=1',
               'train_dataloader.batch_size=4', 'default_hooks.logger.interval=1']
    result = subprocess.run(list(map(str, command)), cwd=folder, capture_output=True, text=True,
                            env={**os.environ, 'OMP_NUM_THREADS': '1'})
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result.stdout + result.stderr


def metrics(work_dir):
    newest = max(Path(work_dir).glob('*/*.json'), key=lambda path: path.stat().st_mtime)
    return json.loads(newest.read_text().splitlines()[-1])


@pytest.fixture(scope='module')
def trained(folder):
    """Trained for one epoch by `mim train mmdyn` with the config's bare name."""
    log = mim(folder, 'train', 'mmdyn', CONFIG, '--work-dir', 'run')
    assert 'loss_budget' in log and 'query_ratio' in log
    return folder / 'run/epoch_1.pth'


@pytest.mark.parametrize('package', ['mmdyn', 'mmpretrain'])
def test_mim_test_reads_the_checkpoint(folder, trained, package):
    config = CONFIG if package == 'mmdyn' else ROOT / 'configs/demo' / CONFIG
    mim(folder, 'test', package, config, '--checkpoint', trained, '--work-dir', package)
    result = metrics(folder / package)
    assert 0 <= result['accuracy/top1'] <= 100
    assert 0 < result['flops/gflops'] <= result['flops/gflops_dense'] * 1.01


def test_mim_train_resumes(folder, trained):
    shutil.copytree(trained.parent, folder / 'resumed')
    log = mim(folder, 'train', 'mmpretrain', ROOT / 'configs/demo' / CONFIG, '--work-dir', 'resumed', '--resume', 'auto',
              epochs=2)
    steps = re.findall(r'Epoch\(train\) +\[(\d)\]\[ *(\d)/5\]', log)
    assert [step for step in steps if step[0] == '2'] == steps[-5:] == [('2', str(i)) for i in range(1, 6)]
    assert 'resumed epoch: 1, iter: 5' in log
    assert torch.load(folder / 'resumed/epoch_2.pth')['meta']['iter'] == 10


def test_the_safe_loader_stays_on(trained, tmp_path):
    checkpoint = torch.load(trained, weights_only=True)
    assert checkpoint['message_hub']['log_scalars']['train/loss'].current() > 0

    class Evil:

        def __reduce__(self):
            return os.system, ('true', )

    torch.save(dict(state_dict=Evil()), tmp_path / 'evil.pth')
    with pytest.raises(Exception, match='Weights only load failed'):
        torch.load(tmp_path / 'evil.pth')
