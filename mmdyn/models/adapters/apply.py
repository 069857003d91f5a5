"""DGE on a model that is not mmdyn's, in one call, and back."""

from collections.abc import Sequence
from importlib import import_module
from typing import Any

import torch
from mmengine.logging import print_log
from mmengine.registry import MODELS as MMENGINE_MODELS
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ...registry import MODELS
from ...values import sides
from ..backbones.base import DynamicBackbone, DynamicStages, find_backbones, make_encoders
from ..backbones.options import budget_of, dge_of_stages
from ..cost import BackboneCost
from ..dge import check_granularities
from ..dge.budget import budget_loss as squared_distance
from ..dge.budget import mean_over_processes
from ..thread_local import ThreadLocal
from .adapter import ADAPTERS, Adapter, name_of

# The name of the module that holds the routers. A model that does not know it names it, when it is given a checkpoint
# with them, and so says what is missing.
NAME = 'mmdyn_apply_dge'
GUIDE = 'docs/any-vit.md'


class AppliedDGE(DynamicStages):
    """What :func:`apply_dge` adds to a model: an encoder for each block, and the account of what they spent.

    Args:
        model: that gets it.
        adapter: of the model's family.
        dge: options as for mmdyn's backbones; None counts the dense model.
        img_size: (H, W) of the images that budgets are reckoned for.
    """

    _shape_of_map: ThreadLocal[tuple[int, int]] = ThreadLocal()
    _shapes: ThreadLocal[dict[int, tuple[int, int]]] = ThreadLocal()

    def __init__(self, model: nn.Module, adapter: type[Adapter], dge: dict | None, img_size: tuple[int, int]):
        super().__init__()
        self._model = (model,)  # in a tuple: not as a module of this one
        self.img_size, self.stages = img_size, adapter.stages(model)
        prefixes = [prefix for _, prefix in self.named_stages()]
        options = dge_of_stages(dge, {p: len(stage.modules) for p, stage in zip(prefixes, self.stages)})
        for place, (stage, prefix, of_stage) in enumerate(zip(self.stages, prefixes, options)):
            for index, module in enumerate(stage.modules):
                block = adapter(module)
                block.applied, block.stage, block.index = self, place, index
                if of_stage is not None:
                    phis = check_granularities(of_stage['granularities'], of_stage.get('region_size'))
                    if index not in of_stage['dense_layers']:
                        block.check_granularities(phis, prefix.removesuffix('.') or 'the model')
                stage.blocks.append(block)
            stage.dge = make_encoders(len(stage.modules), stage.dim, of_stage)
            self.add_module(str(place), stage.dge)
        self._register_load_state_dict_pre_hook(fit_routers, with_module=True)
        parameter = next(model.parameters())
        self.to(parameter.device).train(model.training)
        self.set_budget(**budget_of(dge))
        self._handles = self.show_images()
        embedding = adapter.embedding(model)
        if embedding is not None:
            self._handles.append(embedding.register_forward_hook(self._note_shape))
        self._map_shape = adapter.map_shape

    @property
    def entry(self) -> nn.Module:
        return self._model[0]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's: what is done with a backbone of mmdyn's can be done with this."""
        return self.entry(*args, **kwargs)

    def register_forward_pre_hook(self, *args: Any, **kwargs: Any) -> RemovableHandle:
        """Of the model, which gets the images."""
        return self.entry.register_forward_pre_hook(*args, **kwargs)

    def named_stages(self):
        if len(self.stages) == 1:
            return iter([(self.stages[0], '')])
        return ((stage, f'stages.{i}.') for i, stage in enumerate(self.stages))

    @property
    def stage_shapes(self) -> list[tuple[int, int]]:
        shapes, shape = [], self.img_size
        for stage in self.stages:
            shape = tuple(-(-side // stage.patch_embed.patch_size) for side in shape)
            shapes.append(shape)
        return shapes

    @property
    def shape_of_map(self) -> tuple[int, int] | None:
        """(h, w) of the map that the model's embedding has made in this thread."""
        return self._shape_of_map

    def _note_shape(self, embedding: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._shape_of_map = self._map_shape(embedding, args[0], output)

    def note(self, block: Adapter, images: int, shape: tuple[int, int]) -> None:
        """Called by each block when it has run."""
        if torch._C._current_graph_task_id() != -1:  # run again in the backward pass, by checkpointing
            return
        first, last = (self.stages[i].blocks[i] for i in (0, -1))
        if block is first:
            self._shapes = {}
        if self._shapes is not None:
            self._shapes[block.stage] = shape
            if block is last and len(self._shapes) == len(self.stages):
                self.account(images, [self._shapes[i] for i in range(len(self.stages))])

    def attach(self) -> None:
        """Let each block run on queries."""
        for stage in self.stages:
            for block in stage.blocks:
                block.attach()
        self.entry.add_module(NAME, self)

    def detach(self) -> None:
        """Leave the model exactly as it was."""
        for stage in self.stages:
            for block in stage.blocks:
                block.detach()
        for handle in self._handles:
            handle.remove()
        delattr(self.entry, NAME)


def fit_routers(
    applied: AppliedDGE, state: dict, prefix: str, metadata: dict, strict: bool, missing: list, unexpected: list, errors
) -> None:
    """Before loading: a checkpoint of the dense model starts the routers as they are, and the reverse."""
    own = {prefix + name: value for name, value in applied.state_dict().items()}
    saved = {name for name in state if name.startswith(prefix)}
    if own and not saved:
        state.update(own)
        print_log('DGE: the checkpoint has no routers, which keep their initial values.', logger='current')
    elif saved and not own:
        for name in saved:
            del state[name]
        print_log('DGE: the model has no use for the routers of the checkpoint.', logger='current')


def adapter_of(model: nn.Module) -> type[Adapter] | None:
    """The adapter of the family that a module is of."""
    for cls in type(model).__mro__:
        found = ADAPTERS.get(name_of(cls))
        if isinstance(found, str):
            module, _, name = found.partition('.')
            found = getattr(import_module(f'.{module}', __package__), name)
        if found is not None:
            return found
    return None


def find_model(model: nn.Module) -> tuple[nn.Module, type[Adapter]]:
    """The one module of a known family in a model, which may be the model, and the adapter of it.

    Raises:
        ValueError: if there is none, or several; or if there is DGE already.
    """
    known = [module for module in model.modules() if isinstance(module, DynamicStages)]
    if known:
        own = isinstance(known[0], DynamicBackbone)
        raise ValueError(
            f"{type(known[0]).__name__} is mmdyn's own: give it dge=dict(granularities=(1, 2, 4)) when it is built."
            if own
            else f'The {type(known[0].entry).__name__} has DGE already: call mmdyn.remove_dge(model) first.'
        )
    found = [(module, adapter_of(module)) for module in model.modules()]
    found = [(module, adapter) for module, adapter in found if adapter is not None]
    if not found:
        is_split = any(name_of(type(module)).startswith('timm.models._features.') for module in model.modules())
        raise ValueError(
            ("timm's features_only=True has taken the model apart: give feature_cls='getter' with it. " * is_split)
            + f'No adapter knows the blocks of a {name_of(type(model))}. The families are:\n  '
            + '\n  '.join(ADAPTERS)
            + f'\nand their subclasses. {GUIDE} tells how to write an adapter, in 20 to 40 lines.'
        )
    if len(found) > 1:
        raise ValueError(
            f'The {type(model).__name__} has {len(found)} vision transformers, '
            f'{", ".join(type(module).__name__ for module, _ in found)}: call apply_dge on one of them.'
        )
    return found[0]


def image_size(model: nn.Module) -> tuple[int, int]:
    """(H, W) of the images that a model is made for, as far as it tells; 224 otherwise."""
    for owner, name in ((model, 'img_size'), (getattr(model, 'patch_embed', None), 'img_size')):
        size = getattr(owner, name, None)
        if isinstance(size, (tuple, list)) and len(size) == 2:
            return tuple(size)
    return 224, 224


def attach_dge(model: nn.Module, dge: dict | None, img_size: int | Sequence[int] | None = None) -> nn.Module:
    """Give a model DGE by the options of mmdyn's backbones; with None, the account of what it spends alone."""
    host, adapter = find_model(model)
    AppliedDGE(host, adapter, dge, image_size(host) if img_size is None else sides('img_size', img_size)).attach()
    return model


def apply_dge(
    model: nn.Module,
    granularities: Sequence[int] | Sequence[Sequence[int]] = (1, 2, 4),
    img_size: int | Sequence[int] | None = None,
    **options: Any,
) -> nn.Module:
    """Let each region of a vision transformer's maps choose its number of queries, in each block.

    The model's weights keep their names and values; the routers' are new, and below ``mmdyn_apply_dge``. Routers
    start with the finest granularity, with which the model computes what it did.

    Args:
        model: of a known family, or what holds one, such as a detector. It is changed in place.
        granularities: sides of the candidate patches in cells, ascending; 0 skips a region. One set, or one for each
            stage.
        img_size: side or (height, width) of the images that budgets are reckoned for. Defaults to what the model
            tells, or 224.
        options: more options of :class:`~mmdyn.models.dge.DynamicGrainedEncoder`, and ``dense_layers``,
            ``test_budget``, ``budget_mode`` and ``prices`` as in the ``dge`` of mmdyn's backbones. Layers are called
            ``blocks.0`` in plain models and ``stages.0.blocks.0`` in pyramids.

    Returns:
        The model.

    Raises:
        ValueError: for a model whose blocks no adapter knows, one that has DGE, or options that do not fit.
    """
    return attach_dge(model, dict(options, granularities=granularities), img_size)


def applied_to(model: nn.Module) -> list[AppliedDGE]:
    """What :func:`apply_dge` has added to a model."""
    return [module for module in model.modules() if isinstance(module, AppliedDGE)]


def remove_dge(model: nn.Module) -> nn.Module:
    """Undo :func:`apply_dge`: the model is exactly what it was, with the weights that it has now.

    Raises:
        ValueError: for a model that was not given DGE.
    """
    found = applied_to(model)
    if not found:
        raise ValueError(
            f'The {type(model).__name__} has no DGE that mmdyn.apply_dge gave it: there is none to remove.'
        )
    for applied in found:
        applied.detach()
    return model


def the_stages(model: nn.Module) -> DynamicStages:
    """The one part of a model that tells what it spends."""
    found = find_backbones(model)
    if len(found) != 1:
        raise ValueError(
            f'The {type(model).__name__} has {len(found)} backbones that tell what they spend: call '
            'mmdyn.apply_dge(model) first, or give one of the parts that have DGE.'
        )
    return found[0]


def set_budget(model: nn.Module, budget: float | None = None, mode: str = 'exact', prices: Any = None) -> None:
    """Let a model with DGE spend a budget in inference, whatever its routers would.

    Args:
        model: that :func:`apply_dge` changed, or a backbone of mmdyn's, or what holds such.
        budget, mode, prices: see :meth:`~mmdyn.models.backbones.base.DynamicStages.set_budget`.

    Raises:
        ValueError: for a model without DGE, or a budget that it cannot keep.
    """
    the_stages(model).set_budget(budget, mode, prices)


def cost(model: nn.Module) -> BackboneCost:
    """What the last forward pass of a model spent, per layer and image.

    Raises:
        ValueError: if there was none, or for a model that does not tell.
    """
    return the_stages(model).cost


def budget_loss(model: nn.Module, budget: float) -> Tensor:
    """Eq. 8 for the last forward pass in training mode: add it to the loss, times a weight lambda.

    Args:
        model: as for :func:`set_budget`.
        budget: gamma, the aspired ratio of the dynamic layers' complexity to that without DGE.

    Raises:
        ValueError: for a model without DGE, or that has not run.
    """
    stages = the_stages(model)
    if not stages.has_dge:
        raise ValueError(f'The {type(stages.entry).__name__} has no DGE, whose cost a loss could lower.')
    return squared_distance(mean_over_processes(stages.cost.query_ratio), budget)


@MODELS.register_module()
class WithDGE:
    """Any backbone of a known family, with DGE: what is made is the backbone itself, so that its checkpoints load.

    It may be a whole model that has no backbone of its own, as mmpretrain's ``TimmClassifier``.

    Args:
        backbone: its config.
        dge: options as for mmdyn's backbones, or None for the dense model, which tells what it spends.
        img_size: as for :func:`apply_dge`.
        data_preprocessor: of a whole model that has none yet; mmengine's runner gives the config's to the model.

    Raises:
        ValueError: as :func:`apply_dge`, or for something else than a config.
    """

    def __new__(
        cls,
        backbone: dict,
        dge: dict | None = None,
        img_size: int | Sequence[int] | None = None,
        data_preprocessor: dict | None = None,
    ) -> nn.Module:
        if not isinstance(backbone, dict) or 'type' not in backbone:
            raise ValueError(
                f'WithDGE: backbone={backbone!r}: give the config of a backbone, e.g. '
                "dict(type='mmdet.PyramidVisionTransformerV2', ...)."
            )
        if data_preprocessor is not None:
            backbone = dict(data_preprocessor=data_preprocessor) | backbone
        return attach_dge(MMENGINE_MODELS.build(backbone), dge, img_size)
