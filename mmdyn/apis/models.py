"""The models of the model index, by name."""

import copy
import difflib
import functools
import sys
from collections.abc import Sequence
from fnmatch import fnmatchcase
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType

import torch
import yaml
from mmengine.config import Config
from mmengine.device import get_device
from torch import nn

from ..engine.command import check_checkpoint, config_with_dge, read_config
from ..models.checks import check_channels

MIM = Path(__file__).parents[1] / '.mim'
HUB = 'mmpretrain.apis.model'  # where mmpretrain keeps the names of models
# Who builds the models of a config's default scope, from config, checkpoint and device; and our extra that installs it.
BUILDERS = dict(
    mmpretrain=(HUB, 'get_model', 'cls'),
    mmdet=('mmdet.apis', 'init_detector', 'det'),
    mmseg=('mmseg.apis', 'init_model', 'seg'),
)


@functools.cache
def _configs() -> dict[str, Path]:
    """The config of each model of the index."""
    index = yaml.safe_load((MIM / 'model-index.yml').read_text())
    metafiles = [yaml.safe_load((MIM / path).read_text()) for path in index['Import']]
    return {model['Name']: MIM / model['Config'] for metafile in metafiles for model in metafile['Models']}


def list_models(pattern: str = '*') -> list[str]:
    """The names of the model index, sorted.

    Args:
        pattern: what the names have to match, e.g. ``'mask-rcnn*dge*'``.
    """
    return sorted(name for name in _configs() if fnmatchcase(name, pattern))


def get_config(name: str | Path | Config, budget: float | None = None) -> Config:
    """The config of a model, which the inferencers of mmpretrain, mmdet and mmseg take, from any folder.

    mmdet's and mmseg's look names up in their own package alone::

        DetInferencer(mmdyn.get_config('mask-rcnn_pvt-s-dge_fpn_1x_coco'), weights='epoch_12.pth')

    Args:
        name: a name of :func:`list_models`, the path of a config file, or a config, of which a copy is returned.
        budget: query ratio to spend on each image (``test_budget`` of DGE); None leaves the config as it is.

    Raises:
        ValueError: for a name that is not in the index, a file that is no config, or a budget for a model without DGE.
    """
    if isinstance(name, Config):
        cfg = copy.deepcopy(name)
    elif str(name).endswith('.py'):
        cfg = read_config(name)
    elif name in _configs():
        cfg = read_config(_configs()[name])
    else:
        close = difflib.get_close_matches(str(name), _configs(), n=3)
        raise ValueError(
            f'There is no model {name!r}: '
            + (f'did you mean {" or ".join(map(repr, close))}? ' if close else '')
            + 'Choose one of mmdyn.list_models(), or give the path of a config, which ends in .py.'
        )
    if budget is not None:
        backbone = config_with_dge(cfg.model)
        if not backbone.get('dge'):
            raise ValueError(
                f'budget={budget}: the {backbone.get("type", "model")} of this config has no DGE: choose a model with '
                "DGE, such as those of mmdyn.list_models('*-dge*'), or leave the budget out."
            )
        backbone.dge.test_budget = budget
    return cfg


def get_model(
    name: str | Path | Config,
    checkpoint: str | Path | None = None,
    budget: float | None = None,
    device: str | torch.device | None = None,
) -> nn.Module:
    """A classifier, detector or segmentor in evaluation mode, as the framework of its task builds it.

    It is a ``torch.nn.Module`` as any other. Images (B, 3, H, W) are those that its ``data_preprocessor`` would hand
    on: RGB, normalised, for detectors and segmentors padded to multiples of 32::

        model = mmdyn.get_model('pvt-small-dge_8xb16_in1k-256px', checkpoint='epoch_300.pth', budget=0.4)
        logits = model(images)  # (B, 1000); CF-ViT: those of the coarse stage and of the fine one
        features = model.backbone(images)  # a tuple; detectors and segmentors: maps (B, C, h, w) of each stage
        model.backbone.cost  # the queries and multiply-adds of each layer and image
        model.backbone.set_budget(0.5)

    The result is also what the frameworks' functions take: mmpretrain's ``ImageClassificationInferencer(model)``,
    mmdet's ``inference_detector(model, image)`` and mmseg's ``inference_model(model, image)``.

    Without a checkpoint, weights are as torch's layers begin: call ``model.init_weights()`` before you train it.

    Args:
        name: a name of :func:`list_models`, the path of a config file, or a config.
        checkpoint: weights to load; a file of torch.save or of safetensors, or a URL.
        budget: query ratio to spend on each image, whatever the routers were trained for. None lets them decide.
        device: where the model goes: a GPU if there is one, by default.

    Raises:
        ValueError: if there is no such model, for a checkpoint that cannot be read, or for a budget that the model
            cannot keep.
        ImportError: if the framework of the model's task is not installed.
    """
    cfg = get_config(name, budget)
    scope = cfg.get('default_scope', 'mmpretrain')
    if scope not in BUILDERS:
        raise ValueError(f'default_scope={scope!r} of this config: models are built for {", ".join(BUILDERS)}.')
    module, function, extra = BUILDERS[scope]
    try:
        build = getattr(import_module(module), function)
    except ImportError as error:
        raise ImportError(
            f'{scope} builds the model of this config, but cannot be imported ({error}): pip install "mmdyn[{extra}]"'
        ) from error
    if checkpoint is not None:
        check_checkpoint(checkpoint)
        checkpoint = str(checkpoint)
    # mmpretrain's says False for none.
    model = build(cfg, checkpoint or (False if scope == 'mmpretrain' else None), device=str(device or get_device()))
    check_channels(model)
    return model.eval()


def _register_names(module: ModuleType) -> None:
    """Give mmpretrain's hub of models the index. Names that it knows already stay its own."""
    if not any(map(module.ModelHub.has, _configs())):
        module.ModelHub.register_model_index(MIM / 'model-index.yml', config_prefix=MIM)


class _WhenImported(MetaPathFinder):
    """Registers the names at the end of the import of mmpretrain's hub."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """The hub's module as Python finds it, but for what follows its execution."""
        if name != HUB:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(name, path)
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            _register_names(module)

        spec.loader.exec_module = execute_and_register
        return spec


def tell_mmpretrain() -> None:
    """Let mmpretrain's functions and inferencers find the models of the index by name, now or when it is imported.

    It is not imported for that: a detector has no use for it. ``import mmdyn`` calls this.
    """
    if HUB in sys.modules:
        _register_names(sys.modules[HUB])
    else:
        sys.meta_path.insert(0, _WhenImported())
