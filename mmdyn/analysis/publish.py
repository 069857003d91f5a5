"""Checkpoints of a training, made ready for others."""

import hashlib
import json
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config

from ..engine.command import check_checkpoint, config_with_dge, output_folder, read_config
from ..version import __version__
from .flops import build_model

# Of a checkpoint's meta, what others need.
KEPT = ('dataset_meta', 'epoch', 'iter', 'mmengine_version', 'seed')


def budget_of(cfg: Config) -> dict[str, float]:
    """What a config says of budgets: ``train`` of the hook, ``test`` of DGE in inference, ``threshold`` of CF-ViT."""
    hooks = [hook for hook in cfg.get('custom_hooks') or [] if str(hook['type']).split('.')[-1] == 'BudgetHook']
    found = dict(
        train=hooks[0].get('budget') if hooks else None,
        test=(config_with_dge(cfg.model).get('dge') or {}).get('test_budget'),
        threshold=(cfg.model.get('test_cfg') or {}).get('threshold'),
    )
    return {name: value for name, value in found.items() if value is not None}


def _config_of(checkpoint: dict[str, Any], src: str | Path, path: str | Path | None) -> Config:
    """The config at ``path``, or the one that the training kept in the checkpoint; without what belongs to a run."""
    text = checkpoint.get('meta', {}).get('cfg')
    if path is None and not text:
        raise ValueError(f'{src} does not hold its config, as checkpoints of a training do: give it with --config.')
    cfg = read_config(path) if path else Config.fromstring(text, file_format='.py')
    for name in ('work_dir', 'load_from', 'resume', 'launcher'):
        cfg.pop(name, None)
    return cfg


def _metrics_of(checkpoint: dict[str, Any], path: str | Path | None) -> dict[str, float]:
    """Those of a test's file, or of the validation after which the checkpoint was saved.

    A checkpoint that was saved before its validation holds the metrics of the one before: they are not its own.
    """
    hub = checkpoint.get('message_hub', {})
    if path is not None:
        try:
            values = json.loads(Path(path).read_text().strip().splitlines()[-1])
            found = {name: float(value) for name, value in values.items()}
        except (OSError, ValueError, AttributeError, TypeError, IndexError) as error:
            raise ValueError(
                f'--metrics {path}: {error}. Give the .json file that a test writes, <work_dir>/<time>/<time>.json.'
            ) from error
    elif hub.get('runtime_info', {}).get('loop_stage') == 'val':
        logged = hub.get('log_scalars', {}).items()
        found = {name[4:]: float(buffer.current()) for name, buffer in logged if name.startswith('val/')}
    else:
        found = {}
    return {name: value for name, value in found.items() if name not in ('time', 'data_time')}


def _check_weights(state: dict[str, torch.Tensor], cfg: Config, src: str | Path) -> None:
    """Raise ValueError if the model of the config has other tensors."""
    own = {name: tuple(tensor.shape) for name, tensor in build_model(cfg).state_dict().items()}
    given = {name: tuple(tensor.shape) for name, tensor in state.items()}
    wrong = [name for name in {**own, **given} if own.get(name) != given.get(name)]
    if wrong:
        lines = (f'  {name}: {given.get(name, "-")} in SRC, {own.get(name, "-")} in the model' for name in wrong[:8])
        raise ValueError(
            f'{src} and the model of its config differ in {len(wrong)} tensors:\n'
            + '\n'.join(lines)
            + '\nGive the config that it was trained with by --config.'
        )


def publish(
    src: str | Path, *targets: str | Path, config: str | Path | None = None, metrics: str | Path | None = None
) -> list[Path]:
    """Write a checkpoint's weights without optimizer and log, and what tells where they come from.

    The ``meta`` of the files has ``cfg``, the text of the config, without folders of the training; ``budget``, as
    :func:`budget_of` gives it; ``metrics``; ``dataset_meta``, ``epoch``, ``iter``, ``seed``; and the versions. A file
    of safetensors holds it as JSON; mmengine's loader gives it back. Where weights are averaged in training
    (``EMAHook``), the averages are what is kept.

    Args:
        src: checkpoint of a training.
        targets: files to write; ``'x.pth'`` becomes ``x-<hash>.pth`` and ``'x.safetensors'`` ``x-<hash>.safetensors``
            with the first 8 digits of the file's SHA-256, which ``torch.hub`` compares (``check_hash=True``).
        config: config of the model, if the checkpoint does not hold it.
        metrics: ``.json`` file of a test; by default those of the validation after which SRC was saved, if it was.

    Returns:
        The files written.

    Raises:
        ValueError: if SRC is no checkpoint of the config's model, for a target of another kind, or if nothing can be
            written there.
        ImportError: for a target of safetensors, which is not installed.
    """
    for target in targets:
        if Path(target).suffix == '.safetensors':
            _safetensors()
        elif Path(target).suffix != '.pth':
            raise ValueError(f'{target}: give a name that ends in .pth or .safetensors.')
    checkpoint = check_checkpoint(src)
    state = checkpoint.get('state_dict')
    if not isinstance(state, dict):
        raise ValueError(f'{src} has no state_dict: give a checkpoint of a training, or of convert.py.')
    cfg = _config_of(checkpoint, src, config)
    _check_weights(state, cfg, src)
    meta = {name: value for name, value in checkpoint.get('meta', {}).items() if name in KEPT}
    meta.update(
        cfg=cfg.pretty_text,
        budget=budget_of(cfg),
        metrics=_metrics_of(checkpoint, metrics),
        mmdyn_version=__version__,
    )
    return [_write(state, meta, Path(target)) for target in targets]


def _safetensors():
    try:
        return import_module('safetensors.torch')
    except ImportError as error:
        raise ImportError('To write a file of safetensors, install it: pip install safetensors') from error


def _write(state: dict[str, torch.Tensor], meta: dict[str, Any], target: Path) -> Path:
    partial = output_folder(target.parent) / f'{target.name}.partial'
    if target.suffix == '.pth':
        torch.save(dict(state_dict=state, meta=meta), partial)
    else:
        # Tensors that share memory are refused there.
        tensors = {name: tensor.clone().contiguous() for name, tensor in state.items()}
        told = dict(meta=meta, state_dict_metadata=getattr(state, '_metadata', {}))
        partial.write_bytes(_safetensors().save(tensors, metadata=dict(format='pt', mmdyn=json.dumps(told))))
    digest = hashlib.sha256(partial.read_bytes()).hexdigest()
    return partial.rename(target.with_name(f'{target.stem}-{digest[:8]}{target.suffix}'))
