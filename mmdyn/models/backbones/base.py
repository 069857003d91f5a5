"""What the dynamic backbones share: frozen parts, initialisation, and the account of what they spent."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from mmengine.model import BaseModule
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ...values import check_choice, check_number, check_type
from ..cost import BackboneCost, CostMeter, stage_cost
from ..dge import DynamicGrainedEncoder, share_of_finest
from ..dge.prices import Prices
from ..layers import ConvStem, DeformableAttention, EncoderBlock
from ..stage import Stage
from ..thread_local import ThreadLocal
from .budget import (
    check_budget,
    check_layers,
    decide_by,
    dynamic_layers,
    encoders_of,
    prices_of_layers,
    shares_of_layers,
)
from .checkpoint import fit_checkpoint, note_grids


class NoPassError(AttributeError, ValueError):
    """There is no cost yet; an AttributeError, so that what lists the attributes of a module passes it by."""

    @classmethod
    def of(cls, backbone: 'DynamicStages') -> 'NoPassError':
        return cls(f'{type(backbone.entry).__name__} has not run yet: call it on images before you ask for its cost.')


class DynamicStages(nn.Module):
    """Stages whose encoder blocks may be wrapped by DGE, and the account of what they spent.

    Attributes:
        last_pass: images, and (h, w) of each stage's map, in the thread's last forward pass.
        is_counted: whether a :class:`~mmdyn.models.cost.CostMeter` hears of its passes.
    """

    is_counted = True
    last_pass: ThreadLocal[tuple[int, list[tuple[int, int]]]] = ThreadLocal()

    @property
    def entry(self) -> nn.Module:
        """The module that takes the images."""
        return self

    def show_images(self) -> list[RemovableHandle]:
        """Let the routers that look at images see those of each pass; called once, when the encoders are made."""
        routers = [encoder.router for encoder in encoders_of(self) if encoder.router.images is not None]
        for router in routers:
            router.images = routers[0].images
        if not routers:
            return []
        self._images = routers[0].images
        return [self.register_forward_pre_hook(self._see)]

    def _see(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._images.see(args[0])

    def account(self, images: int, shapes: list[tuple[int, int]]) -> None:
        """Note the shapes of a forward pass, which its cost follows from, and tell those who listen."""
        self.last_pass = images, shapes
        CostMeter.publish(self)

    def __getattr__(self, name: str) -> Any:
        """As of all modules, which Python asks for whatever raised an AttributeError; their message would not help."""
        return self._cost() if name == 'cost' else super().__getattr__(name)

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
    def cost(self) -> BackboneCost:
        """What the thread's last forward pass spent, per layer and image.

        Raises:
            NoPassError: if there was none.
        """
        return self._cost()

    def _cost(self) -> BackboneCost:
        if self.last_pass is None:
            raise NoPassError.of(self)
        images, shapes = self.last_pass
        cost = self._cost_of(
            shapes, lambda encoder, bounds: encoder.decision.queries if encoder else bounds[1:] * images
        )
        dynamic = [layer for layer in cost.layers if layer.dynamic]
        for layer, encoder in zip(dynamic, encoders_of(self), strict=True):
            layer.finest = share_of_finest(encoder.decision, encoder.granularities)
        return cost

    def ratio_bounds(self) -> tuple[float, float]:
        """Least and greatest query ratio that the granularities allow on images of ``img_size``."""
        layers = dynamic_layers(self)
        if not layers:
            return 1.0, 1.0
        dense = sum(cost.per_query * cost.dense_queries for cost, _ in layers)
        least, most = (sum(cost.per_query * bounds[i] for cost, bounds in layers) / dense for i in range(2))
        return least, most

    def set_budget(
        self,
        budget: float | None = None,
        mode: str = 'exact',
        prices: Prices | Mapping[str, Any] | str | Path | None = None,
    ) -> None:
        """Spend a budget in inference, whatever the routers were trained for; training is as before.

        ``'average'`` lowers logits by the price that made the budget on the images it was measured on. Easy images
        spend less, others more. It costs no time.

        ``'exact'`` lets all images spend the same. Each layer has a share of the budget, fixed before the pass, because
        layers decide one after another: none can know what those behind it need. In a layer, each image's own price
        makes it spend its share, and never more; less by fewer queries than one step of a region would take. With
        ``prices``, a layer's share is what it spent on average at that budget; without, all layers have an equal share,
        as far as their granularities allow on images of ``img_size``, which costs accuracy if the routers wanted
        different ones. On images of other sizes a layer's share is the same; where the granularities cannot keep it,
        as on tiny maps, it spends its least.

        Args:
            budget: query ratio beta of eq. 7; None lets the routers decide.
            mode: ``'exact'`` or ``'average'``.
            prices: what tools/analysis_tools/sweep_budget.py measured, or its file. Necessary for ``'average'``.

        Raises:
            TypeError: for prices that are neither a file nor what one holds.
            ValueError: for a backbone without DGE, a budget that its granularities or the prices do not reach, an exact
                one with a routing by layer, or an average one without prices.
        """
        check_choice('budget mode', mode, ('exact', 'average'))
        check_type(
            'prices', prices, (str, Path, Mapping, Prices, type(None)), "the file that was measured, e.g. 'prices.json'"
        )
        if budget is None:
            decide_by(self)
            return
        check_budget(self, budget, mode)
        table = None if prices is None else Prices.read(prices)
        if mode == 'average':
            if table is None:
                raise ValueError(
                    "An average budget needs prices that were measured: give prices='prices.json', which "
                    "tools/analysis_tools/sweep_budget.py writes, or choose the mode 'exact'."
                )
            check_layers(self, table)
            self.set_price(table.at(budget)[0])
        else:
            decide_by(self, shares=shares_of_layers(self, budget, table))

    def set_price(self, price: float | None) -> None:
        """Lower the logits in inference by a price for each query; what is spent on average has to be measured.

        Args:
            price: lambda, of a query of a layer whose complexity C^l is the mean of the dynamic layers'. A query of
                another layer costs in proportion to its C^l on images of ``img_size``. None lets the routers decide.

        Raises:
            ValueError: for a backbone without DGE, or a price that is no number.
        """
        if price is not None:
            check_number('price', price, '(-inf, inf)', 'what each query lowers a logit by')
        decide_by(self, prices=None if price is None else prices_of_layers(self, price))

    def _cost_of(self, shapes: list[tuple[int, int]], queries_of: Callable) -> BackboneCost:
        """Cost of maps of these shapes; ``queries_of`` takes an encoder or None, and its least and greatest number."""
        device = next(self.entry.parameters()).device

        def queries(stage: Stage, shape: tuple[int, int]) -> Callable[[nn.Module | None], Tensor]:
            dense = stage.num_extra + math.prod(shape)
            return lambda encoder: torch.as_tensor(
                queries_of(encoder, encoder.query_bounds(shape, stage.num_extra) if encoder else (dense, dense)),
                device=device,
            )

        costs = [
            stage_cost(stage, prefix, shape, queries(stage, shape))
            for (stage, prefix), shape in zip(self.named_stages(), shapes)
        ]
        return BackboneCost([layer for cost in costs for layer in cost.layers], sum(cost.stem for cost in costs))


class DynamicBackbone(DynamicStages, BaseModule):
    """Base of the backbones whose encoder blocks may be wrapped by DGE.

    A subclass makes ``stages``, or is a :class:`~mmdyn.models.stage.Stage` itself.

    Args:
        frozen_stages: -1 freezes nothing, 0 the first patch and position embedding and n > 0 also the first n stages
            (of a plain ViT: blocks).
        interpolate_mode: how position embeddings are resized.
        init_cfg: initialisation in mmengine's manner.
    """

    def __init__(
        self, frozen_stages: int = -1, interpolate_mode: str = 'bilinear', init_cfg: dict | list[dict] | None = None
    ):
        super().__init__(
            init_cfg
            or [
                dict(type='TruncNormal', layer='Linear', std=0.02),
                dict(type='Constant', layer='LayerNorm', val=1.0, bias=0.0),
            ]
        )
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

    @property
    def out_channels(self) -> list[int]:
        """Channels of each output."""
        raise NotImplementedError

    def position_embeddings(self) -> Iterator[tuple[str, tuple[int, int], int]]:
        """Name of each position embedding, (h, w) of its map, and number of its extra tokens."""
        for (stage, prefix), shape in zip(self.named_stages(), self.stage_shapes):
            yield f'{prefix}pos_embed', shape, stage.num_extra

    def get_layer_depth(self, param_name: str, prefix: str = '') -> tuple[int, int]:
        """How deep a parameter lies, for layer-wise decay of the learning rate, as mmpretrain asks for it.

        The first embeddings have depth 0, the blocks 1 to L through all stages, whatever is behind them L + 1. A router
        is of its block's depth. What a later stage begins with, its embeddings and a class token, is of the depth of
        the last block before it.

        Args:
            param_name: name of the parameter.
            prefix: of the backbone's parameters; others lie behind it.

        Returns:
            The depth, and the number of depths, L + 2.
        """
        stages = list(self.named_stages())
        num = 2 + sum(len(stage.blocks) for stage, _ in stages)
        name, before = param_name.removeprefix(prefix), 0
        if not param_name.startswith(prefix):
            return num - 1, num
        for stage, start in stages:
            part, _, rest = name.removeprefix(start).partition('.')
            of_stage = name.startswith(start)
            if of_stage and part in ('blocks', 'dge'):
                return before + 1 + int(rest.partition('.')[0]), num
            if (of_stage and part.endswith('_embed')) or (part.endswith('_token') and stage is stages[-1][0]):
                return before, num
            before += len(stage.blocks)
        return num - 1, num

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


def find_backbones(model: nn.Module) -> list[DynamicStages]:
    """The stages of a model, dense or dynamic, that tell what they spend."""
    return [module for module in model.modules() if isinstance(module, DynamicStages)]


def make_encoders(num: int, dim: int, dge: dict | None) -> nn.ModuleList:
    """A wrapper for each of ``num`` blocks but the ``dense_layers``, which are indices; none without ``dge``."""
    encoders = nn.ModuleList()
    options = {name: value for name, value in (dge or {}).items() if name != 'dense_layers'}
    for index in range(num if dge is not None else 0):
        is_dense = index in dge.get('dense_layers', ())
        # A module may be None, which then has a number, but no weights.
        encoders.add_module(str(index), None if is_dense else DynamicGrainedEncoder(dim, **options))
    return encoders


def least_side(backbone: DynamicStages) -> int:
    """Pixels of the shorter side that an image needs, so that each stage has a patch, and what its keys are made of."""
    least, stride = 1, 1
    if not isinstance(backbone, DynamicBackbone):  # others say so themselves, or pad
        return least
    for stage, _ in backbone.named_stages():
        halved = 2 if isinstance(stage.patch_embed, ConvStem) else 1
        stride *= halved * stage.patch_embed.proj.kernel_size[0]
        least = max(least, stride * max([getattr(block.attn, 'sr_ratio', 1) for block in stage.blocks], default=1))
    return least


def check_sides(backbone: DynamicStages, shape: tuple, images: Sequence[str] = ()) -> None:
    """Compare the sides of a batch with what the backbone needs.

    Args:
        backbone: that gets it.
        shape: (B, C, H, W) of the batch.
        images: files of the batch, as far as they are known.

    Raises:
        ValueError: if they are too small; it names them.
    """
    least = least_side(backbone)
    if min(shape[-2:]) < least:
        raise ValueError(
            f'Images of {shape[-2]} x {shape[-1]} pixels are too small for the {type(backbone).__name__}, '
            f'which needs {least} x {least}: resize or pad them in the pipeline, e.g. with '
            f'data_preprocessor=dict(pad_size_divisor={least}), or leave them out.'
            + (f' Images: {", ".join(images)}' if images else '')
        )


def make_blocks(owner: nn.Module, blocks: list[EncoderBlock], dim: int, dge: dict | None) -> None:
    """Give a stage its blocks and, with ``dge``, their wrappers."""
    owner.blocks, owner.dge = nn.ModuleList(blocks), make_encoders(len(blocks), dim, dge)
