"""What the dynamic backbones share: frozen parts, initialisation, and the account of what they spent."""
import math
from collections.abc import Callable, Iterator

import torch
from mmengine.model import BaseModule
from torch import Tensor, nn

from ..cost import BackboneCost, CostMeter, stage_cost
from ..dge import DynamicGrainedEncoder
from ..layers import DeformableAttention, EncoderBlock
from ..stage import Stage
from ..thread_local import ThreadLocal
from .checkpoint import fit_checkpoint, note_grids


class DynamicBackbone(BaseModule):
    """Base of the backbones whose encoder blocks may be wrapped by DGE.

    A subclass makes ``stages``, or is a :class:`~mmdyn.models.stage.Stage` itself.

    Args:
        frozen_stages: -1 freezes nothing, 0 the first patch and position embedding and n > 0 also the first n stages
            (of a plain ViT: blocks).
        interpolate_mode: how position embeddings are resized.
        init_cfg: initialisation in mmengine's manner.

    Attributes:
        last_pass: images, and (h, w) of each stage's map, in the thread's last forward pass.
        is_counted: whether a :class:`~mmdyn.models.cost.CostMeter` hears of its passes.
    """
    is_counted = True
    last_pass: ThreadLocal[tuple[int, list[tuple[int, int]]]] = ThreadLocal()

    def __init__(self, frozen_stages: int = -1, interpolate_mode: str = 'bilinear',
                 init_cfg: dict | list[dict] | None = None):
        super().__init__(init_cfg or [
            dict(type='TruncNormal', layer='Linear', std=.02),
            dict(type='Constant', layer='LayerNorm', val=1., bias=0.)
        ])
        self.frozen_stages, self.interpolate_mode = frozen_stages, interpolate_mode
        self._register_state_dict_hook(note_grids)
        self._register_load_state_dict_pre_hook(fit_checkpoint, with_module=True)

    def init_weights(self) -> None:
        """As mmengine's; but deformable attention starts as it must, whatever linear layers are initialised with."""
        configs = self.init_cfg if isinstance(self.init_cfg, list) else [self.init_cfg]
        is_new = not self.is_init and all(config['type'] != 'Pretrained' for config in configs)
        super().init_weights()
        for module in self.modules() if is_new else ():
            if isinstance(module, DeformableAttention):
                module.start()

    def account(self, images: int, shapes: list[tuple[int, int]]) -> None:
        """Note the shapes of a forward pass, which its cost follows from, and tell those who listen."""
        self.last_pass = images, shapes
        CostMeter.publish(self)

    @property
    def last_shapes(self) -> list[tuple[int, int]]:
        """(h, w) of each stage's map in the thread's last forward pass; empty before."""
        return self.last_pass[1] if self.last_pass else []

    @property
    def has_dge(self) -> bool:
        return any(encoder is not None for stage, _ in self.named_stages() for encoder in stage.dge)

    def named_stages(self) -> Iterator[tuple[Stage, str]]:
        """The stages, each with the prefix of its blocks' names."""
        raise NotImplementedError

    @property
    def stage_shapes(self) -> list[tuple[int, int]]:
        """(h, w) of each stage's map on images of ``img_size``."""
        raise NotImplementedError

    @property
    def out_channels(self) -> list[int]:
        """Channels of each output."""
        raise NotImplementedError

    def position_embeddings(self) -> Iterator[tuple[str, tuple[int, int], int]]:
        """Name of each position embedding, (h, w) of its map, and number of its extra tokens."""
        for (stage, prefix), shape in zip(self.named_stages(), self.stage_shapes):
            yield f'{prefix}pos_embed', shape, stage.num_extra

    @property
    def cost(self) -> BackboneCost:
        """What the thread's last forward pass spent, per layer and image.

        Raises:
            ValueError: if there was none.
        """
        if self.last_pass is None:
            raise ValueError(f'{type(self).__name__} has not run yet: call it on images before you ask for its cost.')
        images, shapes = self.last_pass
        return self._cost_of(shapes, lambda encoder, bounds: encoder.decision.queries if encoder else bounds[1:] * images)

    def ratio_bounds(self) -> tuple[float, float]:
        """Least and greatest query ratio that the granularities allow on images of ``img_size``."""
        least = self._cost_of(self.stage_shapes, lambda encoder, bounds: bounds[:1])
        most = self._cost_of(self.stage_shapes, lambda encoder, bounds: bounds[1:])
        return least.query_ratio.item(), most.query_ratio.item()

    def _cost_of(self, shapes: list[tuple[int, int]], queries_of: Callable) -> BackboneCost:
        """Cost of maps of these shapes; ``queries_of`` takes an encoder or None, and its least and greatest number."""
        device = next(self.parameters()).device

        def queries(stage: Stage, shape: tuple[int, int]) -> Callable[[nn.Module | None], Tensor]:
            dense = stage.num_extra + math.prod(shape)
            return lambda encoder: torch.as_tensor(queries_of(
                encoder, encoder.query_bounds(shape, stage.num_extra) if encoder else (dense, dense)), device=device)

        costs = [stage_cost(stage, prefix, shape, queries(stage, shape))
                 for (stage, prefix), shape in zip(self.named_stages(), shapes)]
        return BackboneCost([layer for cost in costs for layer in cost.layers], sum(cost.stem for cost in costs))

    def frozen_modules(self) -> Iterator[nn.Module | nn.Parameter]:
        """Modules and parameters that ``frozen_stages`` names."""
        raise NotImplementedError

    def freeze(self) -> None:
        """Stop the gradients of the frozen parts; ``train`` keeps them in evaluation mode."""
        for part in self.frozen_modules():
            part.requires_grad_(False)

    def train(self, mode: bool = True) -> 'DynamicBackbone':
        super().train(mode)
        if mode and self.frozen_stages >= 0:
            for part in self.frozen_modules():
                if isinstance(part, nn.Module):
                    part.eval()
        return self


def find_backbones(model: nn.Module) -> list[DynamicBackbone]:
    """The backbones of a model that are mmdyn's, dense or dynamic."""
    return [module for module in model.modules() if isinstance(module, DynamicBackbone)]


def make_blocks(owner: nn.Module, blocks: list[EncoderBlock], dim: int, dge: dict | None) -> None:
    """Give a stage its blocks and, with ``dge``, a wrapper for each but the ``dense_layers``, which are indices."""
    owner.blocks, owner.dge = nn.ModuleList(blocks), nn.ModuleList()
    if dge is None:
        return
    options = {name: value for name, value in dge.items() if name != 'dense_layers'}
    for index in range(len(blocks)):
        is_dense = index in dge.get('dense_layers', ())
        # A module may be None, which then has a number, but no weights.
        owner.dge.add_module(str(index), None if is_dense else DynamicGrainedEncoder(dim, **options))
