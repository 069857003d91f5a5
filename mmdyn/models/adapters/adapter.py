"""What an adapter tells of the blocks of a model that is not mmdyn's, so that DGE can run them on queries."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..dge import DynamicGrainedEncoder, Routing
from ..stage import run_blocks
from .parts import weights

if TYPE_CHECKING:
    from .apply import AppliedDGE

# The adapter of each class of models: itself, or its name in a module that is imported when it is needed.
ADAPTERS: dict[str, 'type[Adapter] | str'] = {
    'timm.models.vision_transformer.VisionTransformer': 'timm_vit.TimmViT',
    'timm.models.eva.Eva': 'timm_eva.TimmEva',
    'timm.models.pvt_v2.PyramidVisionTransformerV2': 'timm_pvt.TimmPVT',
    'timm.models.swin_transformer.SwinTransformer': 'timm_swin.TimmSwin',
    'mmpretrain.models.backbones.vision_transformer.VisionTransformer': 'mm_vit.MMViT',
    'mmdet.models.backbones.pvt.PyramidVisionTransformer': 'mm_pyramid.MMPyramid',
    'mmseg.models.backbones.mit.MixVisionTransformer': 'mm_pyramid.MiT',
    'mmdet.models.backbones.swin.SwinTransformer': 'mm_swin.MMSwin',
    'mmseg.models.backbones.swin.SwinTransformer': 'mm_swin.MMSwin',
    'mmpretrain.models.backbones.swin_transformer.SwinTransformer': 'mm_swin.MMSwin',
}


def name_of(cls: type) -> str:
    """A class's name with its module, by which it is known without an import."""
    return f'{cls.__module__}.{cls.__qualname__}'


def register_adapter(model: type | str) -> Callable[[type['Adapter']], type['Adapter']]:
    """Let :func:`~mmdyn.apply_dge` know a family of models; a decorator of its adapter.

    Args:
        model: the class of the models, or its name with its module. Subclasses are of the family too.
    """

    def register(adapter: type['Adapter']) -> type['Adapter']:
        ADAPTERS[model if isinstance(model, str) else name_of(model)] = adapter
        return adapter

    return register


class Stem(nn.Module):
    """What makes the tokens of a stage, as far as its cost is concerned.

    Args:
        modules: whose convolutions and linear layers run once for each cell.
        patch_size: cells or pixels of the map before, in each direction, that make a cell.
    """

    def __init__(self, modules: Iterable[nn.Module], patch_size: int):
        super().__init__()
        self.weights, self.patch_size = sum(map(weights, modules)), patch_size

    def macs(self, shape: tuple[int, int]) -> int:
        """Multiply-adds of an image whose tokens form a map of ``shape``."""
        return math.prod(shape) * self.weights


@dataclass(eq=False)
class AdaptedStage:
    """The blocks of one resolution; a :class:`~mmdyn.models.stage.Stage`.

    Attributes:
        modules: the blocks of the model.
        dim: channels.
        patch_embed: what makes the tokens.
        num_extra: extra tokens in front of the map's.
        blocks: an adapter for each of the modules.
        dge: as in any stage.
    """

    modules: Sequence[nn.Module]
    dim: int
    patch_embed: Stem
    num_extra: int = 0
    blocks: 'list[Adapter]' = field(default_factory=list)
    dge: nn.ModuleList = field(default_factory=nn.ModuleList)


class Adapter:
    """A block of a family of models, called as :class:`~mmdyn.models.layers.EncoderBlock` is.

    A subclass tells where the blocks of a model are (``stages``), and what one of them makes of queries (``encode``)
    and costs (``macs``), by the block's own modules. The model's weights keep their places and names.

    Attributes:
        block_types: names of the classes of blocks that ``encode`` knows, with their modules; any if empty.
        part_types: the same of modules in the block whose own modules ``encode`` calls, by their names.
        uses_routing: whether it matters which cells a query stands for, and not its content alone.
        block: the block.
        applied: the :class:`AppliedDGE` that this is a part of; ``stage`` and ``index`` are its place there.
    """

    block_types: tuple[str, ...] = ()
    part_types: dict[str, tuple[str, ...]] = {}
    uses_points = False
    uses_routing = False
    applied: 'AppliedDGE'
    stage: int
    index: int

    def __init__(self, block: nn.Module):
        self.block = block
        self._own_forward = vars(block).get('forward')  # of another tool that stands in for the block's
        reason = self.why_unknown()
        if reason:
            raise ValueError(f'{reason}: {type(self).__name__} does not know how to run it on queries.')

    @classmethod
    def stages(cls, model: nn.Module) -> list[AdaptedStage]:
        """The stages of a model, in the order in which they run."""
        raise NotImplementedError

    @classmethod
    def embedding(cls, model: nn.Module) -> nn.Module | None:
        """The module whose output tells the shape of the map, where blocks are not told it."""
        return None

    @classmethod
    def map_shape(cls, embedding: nn.Module, x: Tensor, output: Any) -> tuple[int, int]:
        """(h, w) of the map that the embedding makes of its input."""
        raise NotImplementedError

    def why_unknown(self) -> str | None:
        """Why ``encode`` would not do what the block does; None if it would."""
        for path, known in {'': self.block_types, **self.part_types}.items():
            kind = name_of(type(self.block.get_submodule(path)))
            if known and kind not in known:
                return f'{f"{path} of a block" if path else "a block"} is a {kind}, not a {" or ".join(known)}'
        return None

    def check_granularities(self, granularities: Sequence[int], stage: str) -> None:
        """Raise ValueError for granularities that make no queries of this block's."""

    def unpack(self, x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, tuple[int, int], dict[str, Any]]:
        """The arguments of the block -> tokens (B, E + H*W, C), (H, W), and keyword arguments for ``encode``."""
        shape = self.applied.shape_of_map
        if shape is None or x.ndim != 3 or x.shape[1] != self.num_extra + math.prod(shape):
            raise ValueError(
                f'A block got {tuple(x.shape)} tokens, which are no {self.num_extra} extra tokens and map of '
                f'{shape} cells, (h, w): DGE needs all tokens of an image, without dropout of patches, and the '
                'model called on images.'
            )
        wrong = [value for value in (*args, *kwargs.values()) if value is not None and value is not False]
        if wrong:
            raise ValueError('Masks of attention say what tokens attend to, and nothing of queries: leave them out.')
        return x, shape, {}

    def pack(self, tokens: Tensor, x: Tensor) -> Tensor:
        """Tokens (B, E + H*W, C) in the form that the block returns, that of its input."""
        return tokens.view(x.shape)

    def encode(
        self,
        queries: Tensor,
        tokens: Tensor,
        shape: tuple[int, int],
        num_extra: int,
        lengths: list[int],
        routing: Routing | None,
        **context: Any,
    ) -> Tensor:
        """The new values of packed queries.

        Args:
            queries: (N, C) of all images, one after the other.
            tokens: (B, E + H*W, C), which keys and values come from.
            shape: (H, W).
            num_extra: E.
            lengths: queries of each image.
            routing: which cells each query stands for, with ``uses_routing``.
            context: what ``unpack`` found.
        """
        raise NotImplementedError

    def macs(self, shape: tuple[int, int], num_extra: int) -> tuple[int, int]:
        """Multiply-adds of one query (C^l of eq. 7), and those of an image that no query can save."""
        raise NotImplementedError

    @property
    def num_extra(self) -> int:
        return self.applied.stages[self.stage].num_extra

    @property
    def encoder(self) -> DynamicGrainedEncoder | None:
        """The encoder of this block; None if it stays dense."""
        dge = self.applied.stages[self.stage].dge
        return dge[self.index] if len(dge) else None

    def attach(self) -> None:
        """Stand in for the block's forward function; a bound method, which copies and pickles with the model."""
        self.block.forward = self.forward

    def detach(self) -> None:
        """Leave the block as it was."""
        del self.block.forward
        if self._own_forward is not None:
            self.block.forward = self._own_forward

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The block's forward function, on the queries that its encoder grants."""
        tokens, shape, context = self.unpack(x, *args, **kwargs)
        if self.encoder is None:
            own = self._own_forward
            output = own(x, *args, **kwargs) if own else type(self.block).forward(self.block, x, *args, **kwargs)
        elif self.uses_routing or context:
            call = Call(self, context, self.uses_routing)
            output = self.pack(self.encoder(call, tokens, shape, self.num_extra), x)
        else:
            # The tokens are the caller's: they may not be overwritten, as those of run_blocks may.
            tokens = tokens if torch.is_grad_enabled() else tokens.clone()
            stage = self.applied.stages[self.stage]
            output = self.pack(run_blocks(stage, tokens, shape, self.index, self.index + 1), x)
        self.applied.note(self, len(tokens), shape)
        return output

    def __call__(
        self,
        queries: Tensor,
        tokens: Tensor,
        shape: tuple[int, int],
        num_extra: int = 0,
        lengths: list[int] | None = None,
        points: Tensor | None = None,
        routing: Routing | None = None,
        **context: Any,
    ) -> Tensor:
        """As :class:`~mmdyn.models.layers.EncoderBlock`.

        With ``uses_routing``, packed queries come with their routing.
        """
        packed = queries.flatten(0, -2)
        lengths = [queries.shape[1]] * len(queries) if lengths is None else lengths
        return self._encode(packed, tokens, shape, num_extra, lengths, routing, **context).view_as(queries)

    def _encode(self, *args: Any, **context: Any) -> Tensor:
        if getattr(self.block, 'with_cp', False) and torch.is_grad_enabled():
            return checkpoint(self.encode, *args, use_reentrant=False, **context)
        return self.encode(*args, **context)


class Call(NamedTuple):
    """A block with what is known in one call of it."""

    adapter: Adapter
    context: dict[str, Any]
    uses_routing: bool
    uses_points: bool = False

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.adapter(*args, **kwargs, **self.context)
