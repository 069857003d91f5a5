import re
import shutil
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
KERNELS = ROOT / 'mmdyn/kernels/csrc'
VERSION = re.search(r"__version__ = '(.+)'", (ROOT / 'mmdyn/version.py').read_text()).group(1)


class BuildWithMim(build_py):
    """Let mim find the tools and configs: it looks for <location of the distribution>/mmdyn/.mim.

    A wheel gets copies. An editable install uses the links in the source tree, which must be the distribution's location:
    it is where its metadata are found first, so a path file puts it before site-packages.
    """

    def run(self):
        super().run()
        if getattr(self, 'editable_mode', False):
            site_packages = Path(self.get_finalized_command('install').install_lib)
            site_packages.mkdir(parents=True, exist_ok=True)
            (site_packages / 'mmdyn-source.pth').write_text(f'import sys; sys.path.insert(0, {str(ROOT)!r})\n')
            return
        mim = Path(self.build_lib) / 'mmdyn' / '.mim'
        shutil.rmtree(mim, ignore_errors=True)
        for folder in ('tools', 'configs'):
            shutil.copytree(ROOT / folder, mim / folder, ignore=shutil.ignore_patterns('__pycache__'))
        shutil.copy(ROOT / 'model-index.yml', mim)


# mmengine and mmcv are no hard requirement: forks of other names provide them too, and mmcv needs a build of its own.
# `import mmdyn` checks them.
MIM = ['openmim>=0.3.9', 'mmengine>=0.10,<1', 'mmcv>=2.0,<3']
CLS = ['mmpretrain>=1.1,<2']
DET = ['mmdet>=3.1,<4', 'ftfy', 'regex', 'pycocotools']
SEG = ['mmsegmentation>=1.1,<2', 'ftfy', 'regex']
DEMO = ['openmim>=0.3.9', 'opencv-python', 'scikit-learn>=1.3']
TESTS = ['pytest>=7', 'timm>=0.9', 'fvcore']

setup(
    name='mmdyn',
    version=VERSION,
    description='Vision transformers for OpenMMLab that spend compute where an image needs it',
    long_description=(ROOT / 'README.md').read_text(),
    long_description_content_type='text/markdown',
    python_requires='>=3.10',
    packages=find_packages(include=('mmdyn', 'mmdyn.*')),
    install_requires=['torch>=2.6', 'numpy', 'packaging'],
    extras_require=dict(
        mim=MIM, cls=CLS, det=DET, seg=SEG, demo=DEMO, tests=TESTS, all=[*MIM, *CLS, *DET, *SEG, *DEMO, *TESTS]),
    # Without a compiler mmdyn runs the same in plain PyTorch.
    ext_modules=[
        Extension('mmdyn.kernels._cpu', [str(path.relative_to(ROOT)) for path in sorted(KERNELS.glob('*.c'))],
                  depends=[str(path.relative_to(ROOT)) for path in KERNELS.glob('*.h')],
                  extra_compile_args=['-O3', '-fopenmp', '-fvisibility=hidden'], extra_link_args=['-fopenmp'], optional=True)
    ] if KERNELS.is_dir() else [],
    cmdclass=dict(build_py=BuildWithMim))
