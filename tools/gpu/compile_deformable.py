"""Give an mmcv without operators its deformable attention for CUDA: in a minute, where all of them take many.

Compiles that operator's sources, which every mmcv brings, with the CUDA toolkit that torch finds, and writes mmcv._ext,
the module that mmcv.ops loads. Its other operators say that they are missing when they are called.

This is no part of mmdyn: torch looks for the toolkit once, and importing mmengine would make it look too early.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

NAME = 'deformable_attention'
OPERATOR = f'from mmcv._{NAME}.{NAME} import ms_deform_attn_backward, ms_deform_attn_forward  # noqa: F401\n'
OTHERS = """

def __getattr__(name):
    if name.startswith('__'):
        raise AttributeError(name)

    def missing(*args, **kwargs):
        raise RuntimeError(f"mmcv's operator {name} is not compiled here: install mmcv with its operators.")

    return missing
"""


def find_toolkit() -> None:
    """Tell torch and the compilers where the CUDA toolkit is, and where headers are that it lacks.

    The nvcc in the path may be a script, whose folder says nothing; and a toolkit may lack headers that torch includes,
    which the packages that torch depends on bring.
    """
    if 'CUDA_HOME' not in os.environ and shutil.which('nvcc'):
        told = subprocess.run(['nvcc', '--dryrun', '-x', 'cu', os.devnull], capture_output=True, text=True).stderr
        if top := re.search(r'^#\$ TOP=(.+)$', told, re.MULTILINE):
            os.environ['CUDA_HOME'] = str(Path(top[1].strip()).resolve())
    packages = find_spec('nvidia')
    folders = [
        str(folder)
        for root in (packages.submodule_search_locations if packages else ())
        for folder in Path(root).glob('*/include')
    ]
    given = os.environ.get('CPLUS_INCLUDE_PATH')
    os.environ['CPLUS_INCLUDE_PATH'] = os.pathsep.join([*([given] if given else []), *folders])


def compile_operator(mmcv: Path) -> None:
    """Compile the operator beside the package mmcv, and let the package find it.

    Args:
        mmcv: folder of the package.

    Raises:
        ValueError: if it has operators already, or no sources of them.
        RuntimeError: if they do not compile. The package can be imported even then.
    """
    csrc = mmcv / 'ops/csrc'
    sources = [
        Path(__file__).with_name('deformable_attention.cpp'),
        csrc / 'pytorch/ms_deform_attn.cpp',
        csrc / 'pytorch/cuda/ms_deform_attn_cuda.cu',
    ]
    if found := [*mmcv.glob('_ext.*.so')]:
        raise ValueError(f'mmcv in {mmcv} was installed with its operators ({found[0].name}): use those.')
    if missing := [source for source in sources if not source.is_file()]:
        raise ValueError(f'{missing[0]} is missing: install mmcv 2.0 or 2.1, whose wheels have the sources.')
    folder = mmcv / f'_{NAME}'
    folder.mkdir(exist_ok=True)
    find_toolkit()
    from torch.utils import cpp_extension  # looks for the toolkit when it is imported

    (mmcv / '_ext.py').write_text(OTHERS)
    cpp_extension.load(
        NAME,
        [*map(str, sources)],
        extra_cflags=['-DMMCV_WITH_CUDA'],
        extra_cuda_cflags=['-DMMCV_WITH_CUDA'],
        extra_include_paths=[str(csrc / 'common'), str(csrc / 'common/cuda')],
        build_directory=str(folder),
        is_python_module=False,
        verbose=True,
    )
    (mmcv / '_ext.py').write_text(OPERATOR + OTHERS)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    spec = find_spec('mmcv')
    if spec is None:
        sys.exit('compile_deformable.py: there is no mmcv: install mmcv-lite==2.1.0.')
    try:
        compile_operator(Path(spec.origin).parent)
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(f'compile_deformable.py: {error}')
    from mmcv.ops.multi_scale_deform_attn import MultiScaleDeformableAttnFunction

    print(f'{MultiScaleDeformableAttnFunction.__name__} is there.')


if __name__ == '__main__':
    main()
