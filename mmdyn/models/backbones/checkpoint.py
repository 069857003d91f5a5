"""How a checkpoint fits a backbone of other options, and what is said of one that does not.

After loading, each tensor of the checkpoint is in use, or was adapted or left out in a way that the log names.
"""

import json
import math
import re
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmengine.logging import print_log
from mmengine.runner.checkpoint import CheckpointLoader
from torch import Tensor

from ..layers import fit_position_embedding

if TYPE_CHECKING:
    from .base import DynamicBackbone

# What tells the kinds of tools/model_converters/convert.py from our names, and from each other in this order.
FOREIGN_NAMES = {
    'cfvit': r'(^|\.)(pos_embed_list|reuse_block)\.',
    'lvvit': r'(^|\.)(patch_embed\.(conv|bn)\d|aux_head)\.',
    'vtpack': r'\.dge\.(splits$|router\.gate\.)|(^|\.)block\d\.\d+\.attn\.(v|offsets|attn_weight)\.',
    'pvt': r'(^|\.)block\d\.\d+\.',
    'mmdet-pvt': r'(^|\.)layers\.\d\.1\.\d+\.attn\.attn\.',
    'mmpretrain-deit': r'(^|\.)layers\.\d+\.ln1\.',
    'deit': r'(^|\.)blocks\.\d+\.(attn\.qkv|mlp)\.',
}


def foreign_kind(names: Iterable[str]) -> str | None:
    """The kind of checkpoint, of another program, that has such names."""
    text = '\n'.join(names)
    return next((kind for kind, pattern in FOREIGN_NAMES.items() if re.search(pattern, text, re.MULTILINE)), None)


@CheckpointLoader.register_scheme(prefixes=r'(?!\S+://).+\.safetensors$', force=True)
def load_from_safetensors(filename: str, map_location=None) -> dict[str, Any]:
    """The tensors of a file of safetensors, on the CPU; so ``load_from`` and ``init_cfg`` take one.

    If the file tells more than the tensors, as published ones do, they are the ``state_dict`` beside ``meta``.

    Raises:
        FileNotFoundError: if there is no such file.
        ImportError: if safetensors is not installed.
        ValueError: if it is no file of safetensors.
    """
    if not Path(filename).is_file():
        raise FileNotFoundError(f'There is no file {filename}: give the path of a checkpoint.')
    try:
        from safetensors import SafetensorError, safe_open
        from safetensors.torch import load_file
    except ImportError as error:
        raise ImportError(f'To read {filename}, install safetensors: pip install safetensors') from error
    try:
        tensors = load_file(filename)
        with safe_open(filename, 'pt') as file:
            told = json.loads((file.metadata() or {}).get('mmdyn', '{}'))
    except SafetensorError as error:
        raise ValueError(f'{filename} is no file of safetensors, or broken ({error}): get it again.') from error
    if not told:
        return tensors
    state = OrderedDict(tensors)
    state._metadata = OrderedDict(told['state_dict_metadata'])
    return dict(state_dict=state, meta=told['meta'])


def note_grids(backbone: 'DynamicBackbone', state: dict, prefix: str, local_metadata: dict) -> None:
    """After ``state_dict()``: its metadata tell what maps the position embeddings are of."""
    local_metadata['grids'] = {name: tuple(shape) for name, shape, _ in backbone.position_embeddings()}


def fit_checkpoint(
    backbone: 'DynamicBackbone',
    state: dict,
    prefix: str,
    local_metadata: dict,
    strict: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_msgs: list[str],
) -> None:
    """Before loading: adapt what was trained with other options, and refuse what would be lost.

    Position embeddings are resized, weights of RGB images fitted to other ``in_channels``; what dense prediction has no
    use for is left out, and a dense checkpoint starts a dynamic model. Extra modules, such as adapters, may be new, or
    alone in the checkpoint.

    Raises:
        ValueError: if the checkpoint has other names, which it lists with what to do, or is of another architecture,
            of which it lists the tensors and shapes that differ.
    """
    name_of = type(backbone).__name__
    own = {prefix + name: value for name, value in backbone.state_dict().items()}
    saved = {name for name in state if name.startswith(prefix)}
    if not saved & set(own):
        # A model that holds the backbone has already told which names it does not know.
        _refuse_other_names(name_of, own, prefix, saved, unexpected_keys)
        return

    adapted = _fit_positions(backbone, state, prefix, own, local_metadata.get('grids', {}))
    adapted += _fit_channels(state, prefix, own)

    def is_router(name):
        return re.search(r'(^|\.)dge\.\d+\.router\.', name[len(prefix) :])

    unused = [
        name
        for name in saved - set(own)
        if is_router(name) or re.fullmatch(r'cls_token|dist_token|norm\.(weight|bias)', name[len(prefix) :])
    ]
    for name in unused:
        del state[name]
    if unused:
        adapted.append(f'the model has no use for {_names(unused, prefix)}')
    # Adapters alone, say, are in blocks and have no patch embedding beside them.
    is_whole = _first_convolution(own) in saved or not any('blocks.' in name for name in saved)
    new = [name for name in own if is_whole and is_router(name) and name not in state and not own[name].is_meta]
    state.update({name: own[name] for name in new})
    if new:
        adapted.append(f'the checkpoint has no {_names(new, prefix)}, which keep their initial values')
    _refuse_differences(name_of, own, prefix, saved, saved - set(own) - set(unused), state, is_whole)
    if adapted:
        print_log(f'{name_of}: {"; ".join(adapted)}.', logger='current')


def _fit_positions(backbone, state, prefix, own, grids):
    """Resize position embeddings; returns what to tell of it."""
    resized, embeddings = [], list(backbone.position_embeddings())
    tokens = sum(f'{prefix}{name}' in state for name in ('cls_token', 'dist_token'))
    for index, (short, shape, num_extra) in enumerate(embeddings, start=1):
        name, shape = prefix + short, tuple(shape)
        if name not in state or state[name].ndim != 3 or state[name].shape[2] != own[name].shape[2]:
            continue
        # In a pyramid only the last stage has extra tokens, which the model may lack.
        cells = state[name].shape[1] - (tokens if num_extra or index == len(embeddings) else 0)
        grid = tuple(grids[short]) if short in grids else None
        if grid is None and cells == math.prod(shape):
            side = math.isqrt(cells)
            if side**2 == cells and shape != (side, side):
                raise ValueError(
                    f'{name} has {cells} rows, which may be a map of {side} x {side} or the {shape[0]} x {shape[1]} of '
                    f'this {type(backbone).__name__}, and the checkpoint does not say which. If it was trained on '
                    'squares, give the img_size that it was trained on: position embeddings are resized to the images '
                    'that come. If it was trained with this img_size, load the whole file, by load_from or without '
                    'prefix, so that the metadata of its state_dict() tell.'
                )
            grid = shape
        before = state[name].shape[1]
        if grid is not None and not 0 <= before - math.prod(grid) <= 2:
            grid = None  # of a state that was changed afterwards
        state[name] = fit_position_embedding(state[name], own[name], shape, num_extra, backbone.interpolate_mode, grid)
        if before != own[name].shape[1] or grid not in (None, shape):
            resized.append(short)
    return [f'{", ".join(resized)}: fitted to img_size and extra tokens'] if resized else []


def _first_convolution(own):
    """Name of the weights that see the image."""
    return next((name for name, value in own.items() if value.ndim == 4), next(iter(own)))


def _fit_channels(state, prefix, own):
    """Fit the weights that see an RGB image to images of other channels; returns what to tell of it."""
    name = _first_convolution(own)
    if name not in state or state[name].ndim != 4 or state[name].shape[1] != 3 or own[name].shape[1] == 3:
        return []
    channels = own[name].shape[1]
    state[name] = rgb_weights_for(state[name], channels)
    how = 'their sum' if channels == 1 else f'them in turns, times 3 / {channels}'
    return [f'{name[len(prefix) :]}: of three channels (RGB) in the checkpoint, for in_channels={channels} takes {how}']


def rgb_weights_for(weight: Tensor, channels: int) -> Tensor:
    """(O, 3, k, k) -> (O, channels, k, k), so that images whose channels are alike give what they gave.

    One channel gets the sum of the three; more get them in turns, scaled by 3 / channels.
    """
    if channels == 1:
        return weight.sum(1, keepdim=True)
    return weight.repeat(1, -(-channels // 3), 1, 1)[:, :channels] * (3 / channels)


def _refuse_other_names(name_of, own, prefix, saved, others):
    """Raise ValueError if none of the ``saved`` names is the backbone's, or if its names are among ``others``."""
    found = sorted(saved or others)
    kind, first = foreign_kind(found), _first_convolution(own)[len(prefix) :]  # which no whole backbone lacks
    before = next(
        (name.removesuffix(first) for name in found if re.fullmatch(rf'(.*\.)?{re.escape(first)}', name)), None
    )
    if not saved and kind is None and before is None:
        return
    told = f'Nothing in the checkpoint would be loaded into this {name_of}. '
    if kind is None and before is not None:
        of_model = f', and not {prefix!r}' if prefix else ''
        option = f', prefix={before!r}' if before else ''
        raise ValueError(
            told + f"Its names have {before or 'nothing'!r} in front{of_model}: load it by the backbone's "
            f"init_cfg=dict(type='Pretrained', checkpoint=...{option})."
        )
    raise ValueError(
        told + f'Its names are {", ".join(found[:3])}, ..., and not such as {prefix}{first}. ' + _how_to_convert(kind)
    )


def _how_to_convert(kind):
    convert = f'python tools/model_converters/convert.py {kind or "KIND"} SRC DST'
    if kind is None:
        return (
            f'If another program wrote it, convert it by: {convert} (--help lists each KIND). If it is of another '
            'backbone, give the type and arch of that one, or take its tensors out of the file.'
        )
    # The dense PVT of both authors has the same names.
    kinds = "'pvt' (or 'vtpack', if the authors of DGE trained it)" if kind == 'pvt' else repr(kind)
    return (
        f'They are of the kind {kinds}. Convert the file by: {convert}. Then load DST by load_from or, into a '
        "backbone, by init_cfg=dict(type='Pretrained', checkpoint=DST, prefix='backbone.')."
    )


def _refuse_differences(name_of, own, prefix, saved, left_over, state, is_whole):
    """Raise ValueError if tensors or blocks are of another architecture, or would be lost."""
    kind = foreign_kind(left_over)
    if kind:
        raise ValueError(
            f'Another program wrote the checkpoint: this {name_of} has no {_names(left_over, prefix)}. '
            + _how_to_convert(kind)
        )

    def parts_of(names):
        blocks = [re.match(r'(stages\.\d+\.)?blocks\.\d+\.(attn\.\w+)?', name[len(prefix) :]) for name in names]
        kinds = {re.sub(r'\d+', '*', match.group()) for match in blocks if match and match[2]}
        return kinds | {re.sub(r'attn\.\w+$', '', match.group()) for match in blocks if match}

    differences = [
        f'{name[len(prefix) :]}: {tuple(state[name].shape)} in the checkpoint, {tuple(own[name].shape)} in the model'
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    only_saved = sorted(parts_of(saved) - parts_of(own))
    differences += [f'{name}*: only in the model' for name in sorted(parts_of(own) - parts_of(saved)) if is_whole]
    differences += [f'{name}*: only in the checkpoint' for name in only_saved]
    told = '|'.join(re.escape(part).replace(r'\*', r'\d+') for part in only_saved)
    differences += [
        f'{name}: only in the checkpoint'
        for name in sorted(name[len(prefix) :] for name in left_over)
        if not told or not re.match(told, name)
    ]
    if differences:
        raise ValueError(
            f'The checkpoint is of another architecture than this {name_of}. Give the arch and dge options, '
            'and in_channels, that it was trained with; where a tensor is to be lost, take it out of the '
            'file. What differs:\n  ' + '\n  '.join(differences)
        )


def _names(names, prefix):
    """Names without the prefix; numbered ones by one name with stars."""
    short = dict.fromkeys(re.sub(r'\b\d+\b', '*', name[len(prefix) :]) for name in sorted(names))
    return ', '.join(list(short)[:5]) + ', ...' * (len(short) > 5)
