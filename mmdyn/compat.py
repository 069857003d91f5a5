"""What must hold between mmdyn and the packages below it."""

from importlib import metadata

import numpy as np
import torch
from packaging.version import Version

# Import name: distributions that provide it (the maintained forks keep the import name), least and first unfit version.
REQUIRED = {
    'mmengine': (('mmengine', 'onedl-mmengine', 'mmengine-lite'), '0.10.0', '1.0.0'),
    'mmcv': (('mmcv', 'onedl-mmcv', 'mmcv-lite'), '2.0.0', '3.0.0'),
}


def installed_version(distributions) -> str:
    """Version of the first distribution that is installed, or ''."""
    for name in distributions:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return ''


def check_versions(required: dict = REQUIRED) -> None:
    """Raise ImportError, which says what to install, if a foundation is missing or of an unfit version."""
    for module, (distributions, least, unfit) in required.items():
        found = installed_version(distributions)
        if not found or not Version(least) <= Version(found) < Version(unfit):
            raise ImportError(
                f'mmdyn needs {module}>={least},<{unfit}, but {found or "none"} is installed. Install it '
                f'with: pip install "{module}>={least},<{unfit}"'
            )


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
    numpy_core = getattr(np, '_core', None) or np.core
    torch.serialization.add_safe_globals(
        [
            HistoryBuffer,
            (statistic_of_history_buffer, 'builtins.getattr'),
            np.ndarray,
            np.dtype,
            numpy_core.multiarray._reconstruct,
            numpy_core.multiarray.scalar,
            *(type(np.dtype(name)) for name in ('float64', 'float32', 'int64', 'int32', 'bool')),
        ]
    )
