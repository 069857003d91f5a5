"""What a bug report should tell of the machine."""

import os
import platform
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path

import torch
from mmengine.utils.dl_utils import collect_env as collect_base_env

from ..version import __version__

MODULES = ('mmengine', 'mmcv', 'mmpretrain', 'mmdet', 'mmseg', 'mim', 'timm', 'numpy', 'safetensors')
VARIABLES = (
    'OMP_NUM_THREADS',
    'OMP_WAIT_POLICY',
    'GOMP_',
    'KMP_AFFINITY',
    'MALLOC_',
    'LD_PRELOAD',
    'CUDA_VISIBLE_DEVICES',
)
# Of mmengine's, what changes from call to call, or takes a page.
LEFT_OUT = ('numpy_random_seed', 'PyTorch compiling details')


def _operators() -> str:
    """Whether mmcv was compiled with its operators."""
    try:
        import_module('mmcv._ext')
    except Exception as error:  # of a build for another torch, the loader's error
        return f'no ({error})'
    return 'yes'


def collect_env() -> dict[str, str]:
    """Versions, the processor, what variables of the environment change, and which kernels are on, by name.

    As ``mmdet.utils.collect_env()`` and its like, with what concerns mmdyn. ``python -m mmdyn`` prints it.
    """
    env = {name: str(value) for name, value in collect_base_env().items() if name not in LEFT_OUT}
    env['glibc'] = ' '.join(platform.libc_ver()) or 'unknown'
    env['threads of torch'] = str(torch.get_num_threads())
    providers = metadata.packages_distributions()  # of mmcv, it may be onedl-mmcv
    for module in MODULES:
        found = [f'{name} {metadata.version(name)}' for name in sorted(set(providers.get(module, [])))]
        env[module] = ', '.join(found) or 'not installed'
    env['mmcv operators'] = _operators()
    env['mmdyn'] = f'{__version__} in {Path(__file__).parents[1]}'
    env.update({name: value for name, value in sorted(os.environ.items()) if name.startswith(VARIABLES)})
    if find_spec('mmdyn.kernels'):
        env['kernels'] = '\n' + '\n'.join(import_module('mmdyn.kernels.__main__').report())
    else:
        env['kernels'] = 'deleted: all is plain PyTorch'
    return env
