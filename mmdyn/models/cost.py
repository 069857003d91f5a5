"""What a forward pass cost, in multiply-adds (supplement B.3 of the DGE paper).

Counted are linear layers, convolutions and both matrix products of attention; norms, activations, softmax, pooling and
additions are not. A *layer* is an encoder block. Its cost is split into what an image costs in any case (keys and
values, the router) and what each query costs (C^l of eq. 7: its projections, its share of attention, its FFN).
"""

import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .stage import Stage
from .tracing import is_exported


@dataclass
class LayerCost:
    """Cost of one encoder block in one forward pass.

    Attributes:
        name: name of the block in its backbone.
        per_query: multiply-adds of one query.
        static: multiply-adds of an image that do not depend on the number of queries, without the router.
        router: multiply-adds of an image's router.
        queries: (B,) queries of each image, extra tokens included.
        dense_queries: queries of an image without DGE.
        dynamic: whether the block has a router.
        finest: (B,) share of each image's regions that ask for the finest granularity; None without a router.
        decisions: of the router on an image; 0 without one.
    """

    name: str
    per_query: int
    static: int
    router: int
    queries: Tensor
    dense_queries: int
    dynamic: bool
    finest: Tensor | None = None
    decisions: int = 0

    @property
    def spent(self) -> Tensor:
        """(B,) multiply-adds of each image."""
        return self.static + self.router + self.per_query * self.queries

    @property
    def dense(self) -> int:
        """Multiply-adds of an image without DGE."""
        return self.static + self.per_query * self.dense_queries

    @property
    def query_ratio(self) -> Tensor:
        """(B,) share of the dense block's queries."""
        return self.queries / self.dense_queries

    def spent_at(self, query_ratio: float) -> float:
        """Multiply-adds of an image if the router granted this share of the dense block's queries."""
        granted = query_ratio if self.dynamic else 1.0
        return self.static + self.router + self.per_query * granted * self.dense_queries


@dataclass
class BackboneCost:
    """Cost of a backbone in one forward pass.

    Attributes:
        layers: the encoder blocks.
        stem: multiply-adds of an image outside of them (patch embeddings).
    """

    layers: list[LayerCost]
    stem: int

    @property
    def spent(self) -> Tensor:
        """(B,) multiply-adds of each image."""
        return self.stem + sum(layer.spent.double() for layer in self.layers)

    @property
    def dense(self) -> int:
        """Multiply-adds of an image without DGE."""
        return self.stem + sum(layer.dense for layer in self.layers)

    @property
    def query_ratio(self) -> Tensor:
        """(B,) beta of eq. 7: the spent share of what DGE can save on. 1 for a model without DGE."""
        dynamic = [layer for layer in self.layers if layer.dynamic]
        if not dynamic:
            return torch.ones_like(self.layers[0].queries, dtype=torch.float)
        total = sum(layer.per_query * layer.dense_queries for layer in dynamic)
        return sum(layer.per_query / total * layer.queries for layer in dynamic)

    def spent_at(self, query_ratio: float) -> float:
        """Multiply-adds of an image if each router granted this share of its block's queries."""
        return self.stem + sum(layer.spent_at(query_ratio) for layer in self.layers)


def stage_cost(
    stage: Stage, prefix: str, shape: tuple[int, int], queries_of: Callable[[nn.Module | None], Tensor]
) -> BackboneCost:
    """What the blocks of a stage, and the embedding before them, spend.

    Args:
        stage: see :class:`~mmdyn.models.stage.Stage`.
        prefix: of the blocks' names.
        shape: (H, W) of its map.
        queries_of: (B) queries of a block, from its encoder; None for a block without DGE.
    """
    layers, dense = [], stage.num_extra + math.prod(shape)
    for i, block in enumerate(stage.blocks):
        encoder = stage.dge[i] if len(stage.dge) else None
        layers.append(
            LayerCost(
                f'{prefix}blocks.{i}',
                *block.macs(shape, stage.num_extra),
                encoder.macs(shape) if encoder else 0,
                queries_of(encoder),
                dense,
                encoder is not None,
                decisions=encoder.num_decisions(shape) if encoder else 0,
            )
        )
    return BackboneCost(layers, stage.patch_embed.macs(shape))


class CostMeter:
    """Collects the costs of the forward passes of dynamic backbones for as long as it is referenced.

    Args:
        training: collect passes in training mode, or those in evaluation mode.
        backbones: the backbones to listen to. Defaults to all.
    """

    # Not a WeakSet: the compiler of torch 2.6 does not look into it.
    _meters: 'list[weakref.ref[CostMeter]]' = []

    def __init__(self, training: bool, backbones: list | None = None):
        self.training, self.backbones = training, backbones
        self.costs: list[BackboneCost] = []
        self._meters.append(weakref.ref(self, self._meters.remove))

    @classmethod
    def publish(cls, backbone) -> None:
        """Called by a backbone at the end of its forward pass, which is none in an export."""
        for reference in tuple(cls._meters) if backbone.is_counted and not is_exported() else ():
            meter = reference()
            if meter is None or meter.training != backbone.training:
                continue
            if meter.backbones is None or any(backbone is other for other in meter.backbones):
                meter.costs.append(backbone.cost)

    def take(self) -> list[BackboneCost]:
        """The costs since the last call."""
        costs, self.costs = self.costs, []
        return costs
