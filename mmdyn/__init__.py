"""mmdyn: vision transformers for OpenMMLab that spend compute where an image needs it.

Importing the package checks the versions of its foundations and registers every class under the scope ``mmdyn``.
"""
from .compat import allow_mmengine_checkpoints, check_versions
from .version import __version__

check_versions()
allow_mmengine_checkpoints()

from . import engine, evaluation, models  # noqa: E402

__all__ = ['__version__', 'engine', 'evaluation', 'models']
