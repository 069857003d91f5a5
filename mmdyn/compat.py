"""What must hold between mmdyn and the packages below it."""

from importlib import import_module, metadata
from pathlib import Path

import numpy as np
import torch
from packaging.version import Version

# Module: least and first unfit version. Forks keep the names of the modules and go on with their versions.
REQUIRED = {'mmengine': ('0.10.3', '1.0.0'), 'mmcv': ('2.1.0', '3.0.0')}


def installed_version(module: str) -> str:
    """``__version__`` of a module, whose distribution may have any name; '' if it is not installed."""
    try:
        return import_module(module).__version__
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
        return ''


def check_versions(required: dict = REQUIRED) -> None:
    """Raise ImportError, which says what to install, if a foundation is missing or of an unfit version."""
    for module, (least, unfit) in required.items():
        found = installed_version(module)
        if not found or not Version(least) <= Version(found) < Version(unfit):
            raise ImportError(
                f'mmdyn needs {module}>={least},<{unfit}, but {found or "none"} is installed. Install it '
                f'with: pip install "{module}>={least},<{unfit}"; its maintained fork, onedl-{module}, will do, too.'
            )


def is_installed(distribution: str) -> bool:
    """Whether pip knows of it."""
    try:
        return bool(metadata.version(distribution))
    except metadata.PackageNotFoundError:
        return False


def find_configs_of_forks() -> None:
    """Let ``mmseg::`` in a config lead to onedl-mmsegmentation, for which its mmengine has the original's name."""
    from mmengine.config.utils import MODULE2PACKAGE

    if not is_installed(MODULE2PACKAGE['mmseg']) and is_installed('onedl-mmsegmentation'):
        MODULE2PACKAGE['mmseg'] = 'onedl-mmsegmentation'


def statistic_of_history_buffer(owner, name: str):
    """What ``getattr`` may do in a checkpoint: name a statistic of mmengine's log buffer."""
    from mmengine.logging import HistoryBuffer

    if owner is not HistoryBuffer or name not in HistoryBuffer._statistics_methods:
        raise ValueError(
            f'The checkpoint asks for {owner!r}.{name}, which is no statistic of an mmengine log buffer: do '
            'not trust this file.'
        )
    return HistoryBuffer._statistics_methods[name]


def allow_mmengine_checkpoints() -> None:
    """Let torch's safe loader read what mmengine writes beside the weights: its log buffers, which hold numpy."""
    from mmengine.logging import HistoryBuffer

    HistoryBuffer()  # the first one registers the statistics that every checkpoint names
    # A checkpoint may be of before numpy 2, which moved what rebuilds arrays and numbers.
    rebuild = [value.__reduce__()[0] for value in (np.zeros(1), np.float64(1))]
    torch.serialization.add_safe_globals(
        [
            HistoryBuffer,
            (statistic_of_history_buffer, 'builtins.getattr'),
            np.ndarray,
            np.dtype,
            *((f, f'{core}.multiarray.{f.__name__}') for f in rebuild for core in ('numpy.core', 'numpy._core')),
            *(type(np.dtype(name)) for name in ('float64', 'float32', 'int64', 'int32', 'bool')),
        ]
    )


def refuse_code_in_checkpoints() -> None:
    """Let torch's safe loader decide about local files: after it, mmengine's fork would run their code, and warn."""
    from mmengine.runner import CheckpointLoader

    if is_installed('onedl-mmengine'):

        @CheckpointLoader.register_scheme(prefixes='', force=True)
        def load_from_local(filename: str, map_location=None):
            return torch.load(Path(filename).expanduser(), map_location=map_location)
