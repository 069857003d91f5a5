"""What tools/train.py and tools/test.py share beside :mod:`mmdyn.engine.command`."""

import argparse
import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
from mmengine.config import Config, DictAction
from mmengine.device import get_device
from mmengine.registry import RUNNERS
from mmengine.runner import Runner

from .command import output_folder, read_config


def config_parser(description: str) -> argparse.ArgumentParser:
    """A parser of the options that training and testing have in common."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument('config', help='config file of any task')
    parser.add_argument('--work-dir', help='folder of logs and checkpoints (default: work_dirs/<name of the config>)')
    parser.add_argument('--amp', action='store_true', help='automatic mixed precision')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, help='override options of the config: key=value')
    parser.add_argument('--launcher', choices=['none', 'pytorch', 'slurm', 'mpi'], default='none')
    # torch.distributed.launch passes it to each process.
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0, help=argparse.SUPPRESS)
    return parser


def load_config(args: argparse.Namespace) -> Config:
    """Read the config and apply the common options."""
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    cfg = read_config(args.config, args.cfg_options)
    cfg.launcher = args.launcher
    cfg.work_dir = args.work_dir or cfg.get('work_dir') or str(Path('work_dirs') / Path(args.config).stem)
    output_folder(cfg.work_dir)
    return cfg


def prepare_processes_without_devices(cfg: Config) -> None:
    """Let several processes that torch's launcher started run on CPUs, where mmengine expects a device for each.

    They communicate by gloo, and what works on devices only is changed in the config: the device that a model's wrapper
    is told, and batch norms over all processes, which become those of each process.
    """
    seconds = cfg.get('env_cfg', {}).get('dist_cfg', {}).get('timeout')
    if not dist.is_initialized():
        # mmengine leaves a group alone that it finds.
        dist.init_process_group('gloo', timeout=None if seconds is None else timedelta(seconds=seconds))
    defaults = dict(
        type='MMDistributedDataParallel',
        broadcast_buffers=False,
        find_unused_parameters=cfg.get('find_unused_parameters', False),
    )
    cfg.model_wrapper_cfg = {**(cfg.get('model_wrapper_cfg') or defaults), 'device_ids': None}

    def revert(part: Any) -> None:
        if isinstance(part, dict) and part.get('type') in ('SyncBN', 'MMSyncBN'):
            part['type'] = 'BN'
        for child in part.values() if isinstance(part, dict) else part if isinstance(part, (list, tuple)) else ():
            revert(child)

    revert(cfg.model)


def build_runner(cfg: Config) -> Runner:
    """The runner that a config asks for."""
    if cfg.get('launcher') == 'pytorch' and get_device() == 'cpu':
        prepare_processes_without_devices(cfg)
    return RUNNERS.build(cfg) if 'runner_type' in cfg else Runner.from_cfg(cfg)


def build_tester(cfg: Config, out: Path) -> Runner:
    """The runner of a tool that runs tests of its own, with files in the folder ``out``."""
    cfg.work_dir = str(out)
    cfg.setdefault('test_cfg', {})
    return build_runner(cfg)
