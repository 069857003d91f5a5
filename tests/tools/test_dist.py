"""Training and testing in two processes on the CPU, killed while a checkpoint is being written."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mmengine.config import Config

import mmdyn
from mmdyn.engine.launch import prepare_processes_without_devices

ROOT = Path(mmdyn.__file__).parents[1]
MODULE = '''
import os, random, signal
import numpy as np, torch
from mmengine.fileio import LocalBackend, register_backend
from mmengine.registry import DATASETS
from mmpretrain.structures import DataSample


@DATASETS.register_module()
class Images(torch.utils.data.Dataset):
    metainfo = dict(classes=('a', 'b', 'c'))

    def __init__(self, count, noise):
        self.count, self.noise = count, noise

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        image = torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(index)) * (1 + index)
        if self.noise:
            image = image + torch.rand(3, 32, 32) + np.random.rand() + random.random()
        return dict(inputs=image, data_samples=DataSample().set_gt_label(index % 3))


class CutOff(LocalBackend):
    """Kills the process in the middle of writing the file that KILL_AT names."""

    def put(self, obj, filepath):
        killed = os.path.basename(filepath) == os.environ.get('KILL_AT')
        super().put(obj[:len(obj) // 2] if killed else obj, filepath)
        if killed:
            os.kill(os.getpid(), signal.SIGKILL)


register_backend('cut_off', CutOff)
'''
CONFIG = """
default_scope = 'mmpretrain'
custom_imports = dict(imports=['mmdyn', 'tiny_images'])
arch = dict(embed_dims=(16, 24), depths=(1, 1), num_heads=(2, 3), mlp_ratios=(2, 3), sr_ratios=(2, 1))
model = dict(
    type='ImageClassifier',
    backbone=dict(type='mmdyn.PVT', arch=arch, img_size=32, patch_size=4, dge=dict(granularities=(1, 2)),
                  drop_path_rate=0.5, out_type='avg_featmap'),
    head=dict(type='LinearClsHead', num_classes=3, in_channels=24))
train_dataloader = dict(batch_size=2, num_workers=0, dataset=dict(type='Images', count=9, noise=True),
                        sampler=dict(type='DefaultSampler', shuffle=True))
test_dataloader = dict(batch_size=3, num_workers=0, dataset=dict(type='Images', count=7, noise=False),
                       sampler=dict(type='DefaultSampler', shuffle=False))
train_cfg = dict(by_epoch=True, max_epochs=3)
test_cfg = dict()
test_evaluator = [dict(type='Accuracy', topk=1), dict(type='mmdyn.DynamicFLOPs')]
optim_wrapper = dict(optimizer=dict(type='AdamW', lr=1e-2))
default_hooks = dict(
    logger=dict(type='LoggerHook', interval=1), sampler_seed=dict(type='DistSamplerSeedHook'),
    checkpoint=dict(type='CheckpointHook', interval=1, max_keep_ckpts=2, backend_args=dict(backend='cut_off')),
    random_state=dict(type='mmdyn.RandomStateHook'))
custom_hooks = [dict(type='mmdyn.BudgetHook', budget=0.5, log_interval=1)]
env_cfg = dict(dist_cfg=dict(backend='nccl', timeout=120))
randomness = dict(seed=None)
"""
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason='these processes would use the GPU')


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp('dist')
    (folder / 'tiny_images.py').write_text(MODULE)
    (folder / 'config.py').write_text(CONFIG)
    return folder


def call(script, *args, cwd=ROOT, **environment):
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    path = f'{Path(sys.executable).parent}:{os.environ["PATH"]}'
    environment = {
        **os.environ,
        'PATH': path,
        'PYTHONPATH': f'{ROOT}:{cwd}',
        'PORT': str(port),
        'OMP_NUM_THREADS': '1',
        'GLOO_SOCKET_IFNAME': 'lo',
        **environment,
    }
    return subprocess.run(
        ['bash', str(ROOT / 'tools' / script), *map(str, args)],
        cwd=cwd,
        env=environment,
        timeout=300,
        capture_output=True,
        text=True,
    )


def losses(work_dir):
    """{iteration: loss} of a training's runs."""
    lines = [
        json.loads(line)
        for path in sorted(Path(work_dir).glob('*/vis_data/scalars.json'))
        for line in path.read_text().splitlines()
    ]
    return {line['step']: line['loss'] for line in lines if 'loss' in line}


@pytest.fixture(scope='module')
def trained(folder):
    """Trained without a break by two processes."""
    ran = call('dist_train.sh', 'config.py', 2, '--work-dir', 'whole', '--cfg-options', 'randomness.seed=3', cwd=folder)
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-3000:]
    log = ran.stdout + ran.stderr
    assert 'query_ratio by layer in iteration 2 ' in log and 'within images): stages.0.blocks.0 ' in log
    return folder / 'whole'


def test_killed_while_a_checkpoint_is_written(folder, trained):
    options = ['config.py', 2, '--work-dir', 'killed', '--cfg-options', 'randomness.seed=3']
    killed = call('dist_train.sh', *options, cwd=folder, KILL_AT='epoch_3.pth')
    assert killed.returncode and (folder / 'killed/epoch_3.pth').is_file()
    # As if it had been written once more to note the best checkpoint.
    (folder / 'killed/last_checkpoint').write_text(str(folder / 'killed/epoch_3.pth'))
    resumed = call('dist_train.sh', 'config.py', 2, '--work-dir', 'killed', '--resume', cwd=folder)
    said = resumed.stdout + resumed.stderr
    assert resumed.returncode == 0, said[-3000:]
    assert 'epoch_3.pth, which is missing or was not written to its end: going on from' in said
    assert 'resumed epoch: 2, iter: 6' in said
    assert losses(folder / 'killed') == losses(trained) and len(losses(trained)) == 9
    whole, again = (torch.load(path / 'epoch_3.pth')['state_dict'] for path in (trained, folder / 'killed'))
    for name, weight in whole.items():
        assert torch.equal(weight, again[name]), name


def test_testing_in_two_processes(folder, trained):
    results = []
    for processes, batch in ((2, 3), (1, 7)):
        ran = call(
            'dist_test.sh',
            'config.py',
            trained / 'epoch_3.pth',
            processes,
            '--work-dir',
            f'test{processes}',
            '--cfg-options',
            f'test_dataloader.batch_size={batch}',
            cwd=folder,
        )
        assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-3000:]
        (path,) = (folder / f'test{processes}').glob('*/*.json')
        found = json.loads(path.read_text().splitlines()[-1])
        results.append({name: value for name, value in found.items() if 'time' not in name})
    assert results[0] == results[1] and 0 < results[0]['flops/query_ratio'] <= 1


@pytest.mark.parametrize(
    'script, args, usage',
    [
        ('dist_train.sh', [], 'Usage: dist_train.sh CONFIG PROCESSES [options of train.py]'),
        ('dist_train.sh', ['config.py'], 'Usage: dist_train.sh'),
        ('dist_train.sh', ['config.py', '--resume'], 'Usage: dist_train.sh'),
        ('dist_test.sh', ['config.py', 'epoch_1.pth'], 'Usage: dist_test.sh CONFIG CHECKPOINT PROCESSES [options'),
        ('dist_test.sh', ['config.py', '2', 'epoch_1.pth'], 'Usage: dist_test.sh'),
    ],
)
def test_usage(script, args, usage):
    ran = call(script, *args)
    assert ran.returncode == 2 and usage in ran.stderr and not ran.stdout and 'unbound' not in ran.stderr


def test_config_of_processes_without_devices(monkeypatch):
    monkeypatch.setattr(torch.distributed, 'is_initialized', lambda: True)
    cfg = Config(
        dict(
            find_unused_parameters=True,
            model=dict(neck=[dict(norm_cfg=dict(type='SyncBN', eps=1e-3))], head=dict(norm_cfg=dict(type='GN'))),
        )
    )
    prepare_processes_without_devices(cfg)
    assert cfg.model.neck[0].norm_cfg == dict(type='BN', eps=1e-3) and cfg.model.head.norm_cfg.type == 'GN'
    assert cfg.model_wrapper_cfg == dict(
        type='MMDistributedDataParallel', broadcast_buffers=False, find_unused_parameters=True, device_ids=None
    )
    cfg.model_wrapper_cfg = dict(type='MMFullyShardedDataParallel')
    prepare_processes_without_devices(cfg)
    assert cfg.model_wrapper_cfg == dict(type='MMFullyShardedDataParallel', device_ids=None)
