import json
import shutil
import sys
from pathlib import Path

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
KERNELS = ROOT / 'mmdyn/kernels/csrc'

# An older setuptools does not read pyproject.toml: it would install a package without a name, and say nothing.
if int(setuptools.__version__.split('.')[0]) < 77 and 'build_ext' not in sys.argv:
    sys.exit(
        f'mmdyn is built with setuptools>=77, but {setuptools.__version__} is installed here: let pip fetch the right '
        'one for the build, without --no-build-isolation.'
    )


class BuildWithMim(build_py):
    """Let mim find the tools and configs: it looks for <location of the distribution>/mmdyn/.mim.

    A wheel gets copies. An editable install uses the links in the source tree, which must be the distribution's
    location: it is where its metadata are found first, so a path file puts it before site-packages.
    """

    def run(self):
        # An earlier build may have left modules there that are gone.
        shutil.rmtree(Path(self.build_lib) / 'mmdyn', ignore_errors=True)
        super().run()
        if getattr(self, 'editable_mode', False):
            site_packages = Path(self.get_finalized_command('install').install_lib)
            site_packages.mkdir(parents=True, exist_ok=True)
            (site_packages / 'mmdyn-source.pth').write_text(f'import sys; sys.path.insert(0, {str(ROOT)!r})\n')
            # mim's fork looks into the folder that an editable install is said to be in.
            url = dict(url=(ROOT / 'mmdyn').as_uri(), dir_info=dict(editable=True))
            (ROOT / 'mmdyn.egg-info/direct_url.json').write_text(json.dumps(url))
            return
        mim = Path(self.build_lib) / 'mmdyn' / '.mim'
        for folder in ('tools', 'configs'):
            shutil.copytree(ROOT / folder, mim / folder, ignore=shutil.ignore_patterns('__pycache__'))
        shutil.copy(ROOT / 'model-index.yml', mim)


# What is built; pyproject.toml has the rest.
setup(
    # Without a compiler mmdyn runs the same in plain PyTorch. The same files make functions for AVX-512 and for AVX2.
    ext_modules=[
        Extension(
            f'mmdyn.kernels.{name}',
            [str(path.relative_to(ROOT)) for path in sorted(KERNELS.glob('*.c'))],
            depends=[str(path.relative_to(ROOT)) for path in KERNELS.glob('*.h')],
            define_macros=[('LANES', str(lanes))],
            extra_compile_args=['-O3', '-fopenmp', '-fvisibility=hidden'],
            extra_link_args=['-fopenmp'],
            optional=True,
        )
        for name, lanes in (('_cpu', 16), ('_cpu_avx2', 8))
    ]
    if KERNELS.is_dir()
    else [],
    cmdclass=dict(build_py=BuildWithMim),
)
