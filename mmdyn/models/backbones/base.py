"""What the dynamic backbones share: options, checkpoints, frozen parts, and the account of what they spent."""
import inspect
import math
import re
from typing import Iterator, List, Optional, Sequence, Tuple, Union

import torch
import torch.nn as nn
from mmengine.logging import print_log
from mmengine.model import BaseModule
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ...analysis.complexity import BackboneCost, CostMeter, LayerCost
from ..dge import DynamicGrainedEncoder
from ..layers import EncoderBlock, fit_position_embedding
from ..layers.linear import is_plain_inference
from ..native.encoder import Job, encode

OUT_TYPES = ('featmap', 'cls_token', 'avg_featmap', 'raw')


def choose_arch(arch: Union[str, dict], archs: dict) -> dict:
    """The numbers of an architecture, given by name or as a dict of them."""
    keys = set(next(iter(archs.values())))
    if isinstance(arch, dict):
        if set(arch) != keys:
            raise ValueError(f'arch has the keys {sorted(arch)}, but needs exactly {sorted(keys)}.')
        return arch
    if arch not in archs:
        raise ValueError(f'Unknown arch {arch!r}: choose from {sorted(archs)}, or give a dict of {sorted(keys)}.')
    return archs[arch]


def choose_out_indices(out_indices: Union[int, Sequence[int], None], num: int, default: Sequence[int]) -> List[int]:
    """Non-negative indices of the stages or blocks to return."""
    if out_indices is None:
        return list(default)
    indices = [out_indices] if isinstance(out_indices, int) else list(out_indices)
    wrong = [i for i in indices if not -num <= i < num]
    if wrong or not indices:
        raise ValueError(f'out_indices={out_indices}: choose one or more of 0 to {num - 1} (negative ones count from '
                         'the end).')
    return [i % num for i in indices]


def image_sides(img_size: Union[int, Sequence[int]], patch: int) -> Tuple[int, int]:
    """(H, W) of ``img_size``, which must hold a patch."""
    sides = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
    if len(sides) != 2 or min(sides) < patch:
        raise ValueError(f'img_size={img_size}: give the side of a square, or (height, width), of at least {patch} '
                         'pixels, which is the total stride.')
    return sides


def dge_of_stages(dge: Optional[dict], num_stages: int) -> List[Optional[dict]]:
    """Split the ``dge`` option: ``granularities`` may be one set for all stages or a sequence of one for each."""
    if dge is None:
        return [None] * num_stages
    if not isinstance(dge, dict):
        raise TypeError(f'dge={dge!r}: give None for the dense model, or a dict, e.g. dict(granularities=(1, 2, 4)).')
    allowed = set(inspect.signature(DynamicGrainedEncoder).parameters) - {'dim', 'with_cp'}
    unknown = set(dge) - allowed
    if unknown:
        raise ValueError(f'dge has no option {sorted(unknown)}: it takes {sorted(allowed)}.')
    sets = dge.get('granularities', (1, 2, 4))
    if not isinstance(sets, (tuple, list)) or not sets or not isinstance(sets[0], (tuple, list)):
        return [dge] * num_stages
    if len(sets) != num_stages:
        raise ValueError(f'granularities={sets} are {len(sets)} sets for {num_stages} stages: give one for each stage, '
                         'or one for all.')
    return [{**dge, 'granularities': tuple(phis)} for phis in sets]


class DynamicBackbone(BaseModule):
    """Base of the backbones whose encoder blocks may be wrapped by DGE.

    A subclass makes ``stages``: modules that have ``blocks`` (the encoder blocks), ``dge`` (one wrapper for each, or
    none), ``patch_embed`` and ``num_extra``, or is one such stage itself.

    Args:
        frozen_stages: -1 freezes nothing, 0 the first patch and position embedding and n > 0 also the first n stages
            (of a plain ViT: blocks).
        with_cp: recompute the blocks in the backward pass instead of keeping their activations.
        init_cfg: initialisation in mmengine's manner.
    """

    def __init__(self, frozen_stages: int = -1, with_cp: bool = False, interpolate_mode: str = 'bilinear',
                 init_cfg: Union[dict, List[dict], None] = None):
        super().__init__(init_cfg or [
            dict(type='TruncNormal', layer='Linear', std=.02),
            dict(type='Constant', layer='LayerNorm', val=1., bias=0.)
        ])
        self.frozen_stages, self.with_cp, self.interpolate_mode = frozen_stages, with_cp, interpolate_mode
        self.last_shapes: List[Tuple[int, int]] = []
        self._batch = 0
        self._register_load_state_dict_pre_hook(fit_checkpoint, with_module=True)

    def run_block(self, stage: nn.Module, index: int, tokens: Tensor, shape: Tuple[int, int],
                  inplace: bool = False) -> Tensor:
        """One encoder block of a stage, with or without DGE, which may overwrite ``tokens`` if ``inplace``."""
        block = stage.blocks[index]
        if len(stage.dge):
            return stage.dge[index](block, tokens, shape, stage.num_extra, inplace)
        if self.with_cp and torch.is_grad_enabled():
            return checkpoint(block, tokens, shape, stage.num_extra, use_reentrant=False)
        return block(tokens, shape, stage.num_extra, inplace)

    def run_blocks(self, stage: nn.Module, tokens: Tensor, shape: Tuple[int, int], inplace: bool = True, start: int = 0,
                   stop: Optional[int] = None) -> Tensor:
        """Encoder blocks of a stage, from ``start`` on, one after another; ``tokens`` may be overwritten if ``inplace``.

        In inference on a CPU they are one call of compiled code, if it takes them all.
        """
        indices, may_overwrite = range(len(stage.blocks))[start:stop], self.may_overwrite(stage)
        jobs = self._jobs(stage, indices, tokens, shape) if may_overwrite else None
        if jobs:
            return encode(jobs, tokens if inplace else tokens.clone())
        for index in indices:
            tokens = self.run_block(stage, index, tokens, shape, inplace and may_overwrite)
        return tokens

    @staticmethod
    def _jobs(stage: nn.Module, indices: Sequence[int], tokens: Tensor, shape: Tuple[int, int]) -> Optional[List[Job]]:
        """Blocks for compiled code; None if it does not take one of them."""
        jobs = []
        for index in indices:
            block = stage.blocks[index]
            job = (stage.dge[index].job(block, tokens, shape, stage.num_extra) if len(stage.dge) else
                   block.job(tokens, shape, stage.num_extra))
            if job is None:
                return None
            jobs.append(job)
        return jobs

    @staticmethod
    def may_overwrite(stage: nn.Module) -> bool:
        """Whether each block may overwrite what the one before returned: in inference, unless hooks look at it."""
        layers = (*stage.dge, *stage.blocks)
        return is_plain_inference() and not any(layer._forward_hooks or layer._forward_pre_hooks for layer in layers)

    def account(self, batch: int, shapes: List[Tuple[int, int]]) -> None:
        """Note the shapes of a forward pass, which its cost follows from, and tell those who listen."""
        self._batch, self.last_shapes = batch, shapes
        CostMeter.publish(self)

    @property
    def has_dge(self) -> bool:
        return any(len(stage.dge) for stage, _ in self.named_stages())

    def named_stages(self) -> Iterator[Tuple[nn.Module, str]]:
        """The stages, each with the prefix of its blocks' names."""
        raise NotImplementedError

    def position_embeddings(self) -> Iterator[Tuple[str, Tuple[int, int], int]]:
        """Name of each position embedding, (h, w) of its map, and number of its extra tokens."""
        for (stage, prefix), shape in zip(self.named_stages(), self.stage_shapes):
            yield f'{prefix}pos_embed', shape, stage.num_extra

    @property
    def cost(self) -> BackboneCost:
        """What the last forward pass spent, per layer and image.

        Raises:
            ValueError: if there was none.
        """
        if not self.last_shapes:
            raise ValueError(f'{type(self).__name__} has not run yet: call it on images before you ask for its cost.')
        return self._cost_of(self.last_shapes, lambda encoder, bounds: encoder.decision.queries)

    def ratio_bounds(self) -> Tuple[float, float]:
        """Least and greatest query ratio that the granularities allow on images of ``img_size``."""
        least = self._cost_of(self.stage_shapes, lambda encoder, bounds: bounds[:1])
        most = self._cost_of(self.stage_shapes, lambda encoder, bounds: bounds[1:])
        return least.query_ratio.item(), most.query_ratio.item()

    def _cost_of(self, shapes, queries_of) -> BackboneCost:
        layers, stem, device = [], 0, next(self.parameters()).device
        for (stage, prefix), shape in zip(self.named_stages(), shapes):
            dense = stage.num_extra + math.prod(shape)
            stem += stage.patch_embed.macs(shape)
            for i, block in enumerate(stage.blocks):
                encoder = stage.dge[i] if len(stage.dge) else None
                queries = [dense] * self._batch if encoder is None else queries_of(
                    encoder, encoder.query_bounds(shape, stage.num_extra))
                layers.append(
                    LayerCost(f'{prefix}blocks.{i}', *block.macs(shape, stage.num_extra),
                              encoder.macs(shape) if encoder else 0, torch.as_tensor(queries, device=device), dense,
                              encoder is not None))
        return BackboneCost(layers, stem)

    @property
    def out_channels(self) -> List[int]:
        """Channels of each output."""
        raise NotImplementedError

    def frozen_modules(self) -> Iterator[Union[nn.Module, nn.Parameter]]:
        """Modules and parameters that ``frozen_stages`` names."""
        raise NotImplementedError

    def freeze(self) -> None:
        """Stop the gradients of the frozen parts; ``train`` keeps them in evaluation mode."""
        for part in self.frozen_modules():
            part.requires_grad_(False)

    def train(self, mode: bool = True):
        super().train(mode)
        if mode and self.frozen_stages >= 0:
            for part in self.frozen_modules():
                if isinstance(part, nn.Module):
                    part.eval()
        return self


def find_backbones(model: nn.Module) -> List[DynamicBackbone]:
    """The backbones of a model that are mmdyn's, dense or dynamic."""
    return [module for module in model.modules() if isinstance(module, DynamicBackbone)]


def make_blocks(owner: nn.Module, blocks: List[EncoderBlock], dim: int, dge: Optional[dict], with_cp: bool) -> None:
    """Give a stage its blocks and, with ``dge``, a wrapper for each."""
    owner.blocks = nn.ModuleList(blocks)
    owner.dge = nn.ModuleList([] if dge is None else
                              [DynamicGrainedEncoder(dim, with_cp=with_cp, **dge) for _ in blocks])


def fit_checkpoint(backbone: DynamicBackbone, state: dict, prefix: str, *_) -> None:
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
    new = [name for name in own if is_router(name) and name not in state]
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
