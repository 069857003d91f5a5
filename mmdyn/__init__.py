"""mmdyn: vision transformers for OpenMMLab that spend compute where an image needs it.

Importing the package checks the versions of its foundations and registers every class under the scope ``mmdyn``.
"""
from .compat import allow_mmengine_checkpoints, check_versions
from .version import __version__

check_versions()
allow_mmengine_checkpoints()

from . import datasets, engine, evaluation, models  # noqa: E402
from .registry import expose_bare_names  # noqa: E402

expose_bare_names()

__all__ = ['__version__', 'datasets', 'engine', 'evaluation', 'models']
