"""mmdyn: vision transformers for OpenMMLab that spend compute where an image needs it.

Importing the package checks the versions of its foundations, registers every class under the scope ``mmdyn``, and lets
the kernels stand in for what they compute faster.
"""

from importlib import import_module
from importlib.util import find_spec

from .compat import allow_mmengine_checkpoints, check_versions, find_configs_of_forks, refuse_code_in_checkpoints
from .version import __version__

check_versions()
allow_mmengine_checkpoints()
find_configs_of_forks()
refuse_code_in_checkpoints()

from . import datasets, engine, evaluation, models  # noqa: E402
from .apis import get_config, get_model, list_models, tell_mmpretrain  # noqa: E402
from .models.adapters import (  # noqa: E402
    WithDGE,
    apply_dge,
    budget_loss,
    cost,
    register_adapter,
    remove_dge,
    set_budget,
)
from .registry import expose_bare_names  # noqa: E402

expose_bare_names()
tell_mmpretrain()
if find_spec('mmdyn.kernels'):  # everything but speed is the same without them
    graphed = import_module('mmdyn.kernels').graphed

__all__ = [
    'WithDGE',
    '__version__',
    'apply_dge',
    'budget_loss',
    'cost',
    'datasets',
    'engine',
    'evaluation',
    'get_config',
    'get_model',
    'list_models',
    'models',
    'register_adapter',
    'remove_dge',
    'set_budget',
]
