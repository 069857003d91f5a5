"""How a checkpoint fits a backbone of other options."""
import re
from typing import TYPE_CHECKING

from mmengine.logging import print_log

from ..layers import fit_position_embedding

if TYPE_CHECKING:
    from .base import DynamicBackbone


def fit_checkpoint(backbone: 'DynamicBackbone', state: dict, prefix: str, *_) -> None:
    """Before loading: resize position embeddings, drop what dense prediction has no use for, take dense for dynamic.

    Raises:
        ValueError: if the checkpoint is of another architecture; it lists the tensors and shapes that differ.
    """
    own = {prefix + name: value for name, value in backbone.state_dict().items()}
    saved = {name for name in state if name.startswith(prefix)} if prefix else set(state)
    if not saved & set(own):
        return
    for name, shape, num_extra in backbone.position_embeddings():
        name = prefix + name
        if name in state and state[name].ndim == 3 and state[name].shape[2] == own[name].shape[2]:
            state[name] = fit_position_embedding(state[name], own[name], shape, num_extra, backbone.interpolate_mode)

    def is_router(name):
        return re.search(r'(^|\.)dge\.\d+\.router\.', name[len(prefix):])

    unused = [name for name in saved - set(own) if is_router(name) or re.fullmatch(
        r'cls_token|dist_token|norm\.(weight|bias)', name[len(prefix):])]
    for name in unused:
        del state[name]
    new = [name for name in own if is_router(name) and name not in state and not own[name].is_meta]
    state.update({name: own[name] for name in new})
    if unused or new:
        print_log(f'{type(backbone).__name__}: the checkpoint lacks {len(new)} tensors of routers, which keep their '
                  f'initial values, and has {len(unused)} that the model has no use for.', logger='current')

    def parts_of(names):
        blocks = [re.match(r'(stages\.\d+\.)?blocks\.\d+\.(attn\.\w+)?', name[len(prefix):]) for name in names]
        kinds = {re.sub(r'\d+', '*', match.group()) for match in blocks if match and match[2]}
        return kinds | {re.sub(r'attn\.\w+$', '', match.group()) for match in blocks if match}

    differences = [f'{name[len(prefix):]}: {tuple(state[name].shape)} in the checkpoint, {tuple(own[name].shape)} in the '
                   'model' for name in own if name in state and state[name].shape != own[name].shape]
    differences += [f'{name}*: only in the model' for name in sorted(parts_of(own) - parts_of(saved))]
    differences += [f'{name}*: only in the checkpoint' for name in sorted(parts_of(saved) - parts_of(own))]
    if differences:
        raise ValueError(f'The checkpoint is of another architecture than this {type(backbone).__name__}. Give the arch '
                         'and dge options that it was trained with. What differs:\n  ' + '\n  '.join(differences))
