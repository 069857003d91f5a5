"""What the results of a GPU depend on: card, driver and versions."""

import os
import platform
import subprocess

import torch

from ...compat import installed_version
from .results import short


def machine() -> dict:
    """Names and versions; of a machine without a GPU, that there is no device."""
    found = dict(
        python=platform.python_version(),
        cores=len(os.sched_getaffinity(0)),
        torch=torch.__version__,
        cuda=torch.version.cuda,
        gpu='no device',
        driver='no device',
    )
    if torch.cuda.is_available():
        found['gpu'] = torch.cuda.get_device_name()
        found['capability'] = '.'.join(map(str, torch.cuda.get_device_capability()))
        found['memory'] = f'{torch.cuda.get_device_properties().total_memory / 2**30:.0f} GiB'
        found['cudnn'] = torch.backends.cudnn.version()
        found['driver'] = told('nvidia-smi', '--query-gpu=driver_version', '--format=csv,noheader')
    found['nvcc'] = told('nvcc', '--version')
    for package in ('triton', 'numpy', 'timm', 'mmengine', 'mmcv', 'mmpretrain', 'mmdet', 'mmseg'):
        try:
            found[package] = installed_version(package) or 'not installed'
        except Exception as error:  # which the cases that need it meet, too
            found[package] = short(f'{type(error).__name__}: {error}')
    return found


def told(*command: str) -> str:
    """The last line that a command prints, or why there is none."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return str(error)
    return done.stdout.strip().split('\n')[-1]
