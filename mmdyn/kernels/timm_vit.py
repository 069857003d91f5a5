"""The encoder blocks of timm's plain vision transformers, for the kernels of a stage."""

from torch import nn

from ..models.adapters.timm_vit import TimmViT
from .library import Block
from .prepared import Prepared, Refusal
from .stage import PREPARED, PreparedBlock

FLOAT = 4  # bytes


class PreparedTimmBlock(PreparedBlock):
    """A ``Block`` of timm, which its adapter presents, and the encoder that wraps it.

    Queries, keys and values have their weights in one matrix, one after the other.
    """

    def __init__(self, adapter: TimmViT, encoder: nn.Module | None, index: int):
        from timm.layers import Attention, DropPath, LayerNorm, Mlp

        Prepared.__init__(self, f'blocks.{index}.')
        self.struct, self.region, self.granularities, self.has_points = Block(), 0, None, False
        block, struct = self._look(vars(adapter), '', 'block'), self.struct
        struct.sr_ratio, struct.residual_scale = 1, 1.0
        self._in_evaluation(block, '')
        for name in ('ls1', 'ls2', 'drop_path1', 'drop_path2'):
            self._idle(block, '', name, *((DropPath,) if 'drop' in name else ()))
        norms = [self.child(block, '', f'norm{number}', LayerNorm, nn.LayerNorm) for number in (1, 2)]
        struct.dim = dim = norms[0].normalized_shape[0]
        for number, norm in enumerate(norms, 1):
            if getattr(norm, '_fast_norm', False):
                raise Refusal(f'{self.prefix}norm{number} is a fast norm, of less precision')
            eps, addresses = self.norm(norm, f'norm{number}', dim)
            setattr(struct, f'norm{number}_eps', eps)
            self._set(f'norm{number}', addresses)
        self._attention(self.child(block, '', 'attn', Attention), dim)
        mlp = self.child(block, '', 'mlp', Mlp)
        if self.attribute(self.child(mlp, 'mlp', 'act', nn.GELU), 'mlp.act', 'approximate') != 'none':
            raise Refusal(f'{self.prefix}mlp.act approximates the GELU')
        for name in ('norm', 'drop1', 'drop2'):
            self._idle(mlp, 'mlp', name, *((nn.Dropout,) if 'drop' in name else ()))
        struct.hidden = self.attribute(self.child(mlp, 'mlp', 'fc1', nn.Linear), 'mlp.fc1', 'out_features', int)
        self._set('fc1', self.linear(mlp, 'mlp', 'fc1', struct.hidden, dim))
        self._set('fc2', self.linear(mlp, 'mlp', 'fc2', dim, struct.hidden))
        if encoder is not None:
            self.prefix = ''
            self._encoder(encoder, f'dge.{index}', dim)

    def _attention(self, attn: nn.Module, dim: int) -> None:
        self.struct.heads = heads = self.attribute(attn, 'attn', 'num_heads', int)
        if heads < 1 or dim % heads:
            raise Refusal(f'{self.prefix}attn has {heads} heads for {dim} channels')
        if self.attribute(attn, 'attn', 'scale', float) != (dim // heads) ** -0.5:
            raise Refusal(f'{self.prefix}attn scales its scores in another way')
        for name in ('q_norm', 'k_norm', 'norm', 'attn_drop', 'proj_drop'):
            self._idle(attn, 'attn', name, *((nn.Dropout,) if 'drop' in name else ()))
        if 'gate' in attn._modules and self._look(attn._modules, 'attn', 'gate') is not None:
            raise Refusal(f'{self.prefix}attn has a gate')
        weight, bias = self.linear(attn, 'attn', 'qkv', 3 * dim, dim)
        self._set('q', (weight, bias))
        self._set('kv', (weight + FLOAT * dim**2, None if bias is None else bias + FLOAT * dim))
        self._set('proj', self.linear(attn, 'attn', 'proj', dim, dim))

    def _idle(self, parent: nn.Module, path: str, name: str, *kinds: type) -> None:
        """A module that must do nothing in evaluation: an identity, or dropout of these kinds."""
        layer = self.child(parent, path, name, nn.Identity, *kinds)
        if type(layer) is not nn.Identity:
            self._in_evaluation(layer, f'{path}.{name}' if path else name)

    def _in_evaluation(self, module: nn.Module, path: str) -> None:
        if self.attribute(module, path, 'training'):
            raise Refusal(f'{self.prefix}{path}'.rstrip('.') + ' is in training mode')


PREPARED[TimmViT] = PreparedTimmBlock
