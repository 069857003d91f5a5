"""The dynamic grained encoder: a router, and the way of an encoder block's tokens through it (DGE paper, fig. 1)."""
import math
from typing import NamedTuple, Optional, Sequence, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .. import native
from ..layers.linear import is_plain_inference, runs_in_pieces
from ..native import encoder as compiled
from ..native import routing as compiled_routing
from . import grains
from .grains import Grains, candidate_centres, candidate_values, grid, pool, region_table, sum_over_granularities


def check_granularities(granularities: Sequence[int], region_size: Optional[int] = None) -> Tuple[int, ...]:
    """Return the granularities as a tuple, or raise ValueError if they are no set of patch sides of one region."""
    if not isinstance(granularities, (tuple, list)):
        raise ValueError(f'granularities={granularities!r}: give a sequence of sides of patches, e.g. (1, 2, 4).')
    phis = tuple(granularities)
    if not phis or not any(phis):
        raise ValueError(f'granularities={phis} leave no query: give at least one side greater than 0, e.g. (1, 2, 4).')
    if not all(isinstance(phi, int) and phi >= 0 for phi in phis):
        raise ValueError(f'granularities={phis}: each is the side of a patch in cells, an integer >= 0 (0 skips).')
    if list(phis) != sorted(set(phis)):
        raise ValueError(f'granularities={phis} must be in ascending order without repeats: '
                         f'write {tuple(sorted(set(phis)))}.')
    if region_size is not None and not (isinstance(region_size, int) and region_size > 0):
        raise ValueError(f'region_size={region_size!r}: give the side of a region in cells, an integer greater than 0, or '
                         'None for the largest granularity.')
    region = region_size or max(phis)
    uneven = [phi for phi in phis if phi and region % phi]
    if uneven:
        raise ValueError(f'granularities {uneven} do not divide the region of {region} x {region} cells: '
                         f'choose sides that divide {region}, or another region_size.')
    return phis


def straight_through_gates(logits: Tensor, tau: float) -> Tuple[Tensor, Tensor]:
    """Sample hard gates with Gumbel noise (eq. 4) that have the gradient of the soft score (eq. 5).

    Args:
        logits: (..., K) gating logits.
        tau: temperature of the softmax.

    Returns:
        (..., K) gates, exactly 0 or 1, and the (...) indices of the ones.
    """
    noise = -torch.empty_like(logits).exponential_().log()
    soft = ((logits + noise) / tau).softmax(-1)
    choice = soft.argmax(-1)
    return F.one_hot(choice, logits.shape[-1]) + (soft - soft.detach()), choice


class Router(nn.Module):
    """Gating logits of eq. 1: the mean of a region, projected to K logits.

    Its parameters are not an ``nn.Linear``, so that a model-wide initialisation of linear layers leaves the bias alone
    with which the finest granularity starts at a probability of 0.95. It computes in float32, also under autocast.
    """

    def __init__(self, dim: int, granularities: Tuple[int, ...]):
        super().__init__()
        num = len(granularities)
        self.weight = nn.Parameter(torch.empty(num, dim))
        self.bias = nn.Parameter(torch.empty(num))
        nn.init.normal_(self.weight, std=0.01)
        nn.init.constant_(self.bias, math.log(0.05 / max(num - 1, 1)))
        finest = next(k for k, phi in enumerate(granularities) if phi)
        nn.init.constant_(self.bias[finest:finest + 1], math.log(0.95))

    def forward(self, regions: Tensor) -> Tensor:
        """(..., C) means of regions -> (..., K) logits."""
        if not torch.is_autocast_enabled(regions.device.type):
            return F.linear(regions.float(), self.weight.float(), self.bias.float())
        with torch.autocast(regions.device.type, enabled=False):
            return self(regions)

    def choose(self, tokens: Tensor, shape: Tuple[int, int], side: int, num_extra: int) -> Tensor:
        """(B, E + H*W, C) -> (B, rows, columns) indices of the greatest logits of the side x side regions."""
        if native.is_used(tokens) and all(
                type(x) is nn.Parameter and x.dtype == torch.float32 and x.is_cpu for x in (self.weight, self.bias)):
            return compiled_routing.choose(tokens, shape, side, num_extra, self.weight, self.bias)
        return self(pool(tokens, shape, side, num_extra)).argmax(-1).unflatten(1, grid(side, shape))

    def planned(self, images: int, regions: Tuple[int, int]) -> Optional[Tuple[Tensor, nn.Module, Tensor]]:
        """A choice that compiled code has yet to make: where it will be, the weights, and where these write theirs.

        Returns:
            None if :meth:`choose` must be called.
        """
        if not compiled.is_plain(self, Router):
            return None
        choice = torch.empty(images, *regions, dtype=torch.long, device='cpu')
        return choice, self, choice


class Decision(NamedTuple):
    """What an encoder decided in its last forward pass.

    Attributes:
        choice: (B, rows, columns) index of each region's granularity.
        queries: (B,) queries used, extra tokens included; in training with the straight-through gradient of eq. 7,
            otherwise on the CPU, where the lengths are.
    """
    choice: Tensor
    queries: Tensor


class DynamicGrainedEncoder(nn.Module):
    """Wraps an encoder block so that each region of its input chooses its number of queries.

    The block is an argument of the forward pass, not a submodule: the names of its weights are those of the dense model.
    It is an :class:`~mmdyn.models.layers.EncoderBlock`, or has its methods ``change``, ``job`` and ``forward``.
    If it has a true attribute ``uses_points``, it gets the centres of the queries' patches.

    Args:
        dim: channels of the tokens.
        granularities: sides of the candidate patches in cells, ascending; 0 skips the region.
        region_size: side of a region in cells. Defaults to the largest granularity.
        routing: ``'region'``, or ``'layer'`` for one decision per image.
        train_mode: ``'sparse'`` runs the chosen granularities (eq. 6), ``'dense'`` runs all of them and lets the gates
            select afterwards, so that each logit gets a gradient.
        tau: temperature of eq. 5.
        with_cp: recompute the block in the backward pass instead of keeping its activations.
    """

    def __init__(self,
                 dim: int,
                 granularities: Sequence[int] = (1, 2, 4),
                 region_size: Optional[int] = None,
                 routing: str = 'region',
                 train_mode: str = 'sparse',
                 tau: float = 1.,
                 with_cp: bool = False):
        super().__init__()
        self.granularities = check_granularities(granularities, region_size)
        self.region = region_size or max(self.granularities)
        for name, value, allowed in (('routing', routing, ('region', 'layer')),
                                     ('train_mode', train_mode, ('sparse', 'dense'))):
            if value not in allowed:
                raise ValueError(f'dge {name}={value!r}: choose from {allowed}.')
        if not tau > 0:
            raise ValueError(f'dge tau={tau}: the temperature must be greater than 0.')
        self.routing, self.train_mode, self.tau, self.with_cp = routing, train_mode, tau, with_cp
        self.router = Router(dim, self.granularities)
        self.decision: Optional[Decision] = None

    def __getstate__(self) -> dict:
        # A copy, such as a moving average of the model, starts without the graph of the last training pass.
        return {**self.__dict__, 'decision': None}

    def extra_repr(self) -> str:
        return f'granularities={self.granularities}, region={self.region}, routing={self.routing}'

    def query_bounds(self, shape: Tuple[int, int], num_extra: int = 0) -> Tuple[int, int]:
        """Fewest and most queries of an image with a map of ``shape``."""
        counts = [math.prod(grid(phi, shape)) if phi else 0 for phi in self.granularities]
        return num_extra + min(counts), num_extra + max(counts)

    def macs(self, shape: Tuple[int, int]) -> int:
        """Multiply-adds of the router on an image with a map of ``shape``."""
        decisions = 1 if self.routing == 'layer' else math.prod(grid(self.region, shape))
        return decisions * self.router.weight.numel()

    def forward(self, block: nn.Module, tokens: Tensor, shape: Tuple[int, int], num_extra: int = 0,
                inplace: bool = False) -> Tensor:
        """Run ``block`` on as many queries as the router grants.

        Args:
            block: the vanilla encoder block.
            tokens: (B, E + H*W, C), the E extra tokens first.
            shape: (H, W) of the map.
            num_extra: E; extra tokens are always queries.
            inplace: whether plain inference may overwrite ``tokens`` with the result.

        Returns:
            (B, E + H*W, C), equal to the block's own output where the granularity is 1.
        """
        phis = self.granularities
        if not self.training:
            if self.routing == 'layer':
                choice = self._per_region(self._logits(tokens, shape, num_extra).argmax(-1), shape)
            else:
                choice = self.router.choose(tokens, shape, self.region, num_extra)
            return self._infer(block, tokens, shape, choice, num_extra, inplace)

        gates, choice = straight_through_gates(self._logits(tokens, shape, num_extra), self.tau)
        gates, choice = self._per_region(gates, shape), self._per_region(choice, shape)
        if self.train_mode == 'sparse':
            gates = gates * F.one_hot(choice, len(phis))
        counts = region_table(shape, phis, self.region, tokens.device).counts
        self.decision = Decision(choice, num_extra + (gates.flatten(1, 2) * counts.T).sum((1, 2)))
        if self.train_mode == 'dense':
            return tokens + self._dense_change(block, tokens, shape, gates, num_extra)
        routing = grains.route(choice, shape, phis, self.region, num_extra)
        # A skipped region has a gate but no query.
        scores = F.pad(gates.sum(-1).flatten(1), (num_extra, 0), value=1.).flatten().repeat_interleave(
            routing.counts.flatten(), output_size=sum(routing.lengths))
        change = self._sparse_change(block, tokens, shape, routing, num_extra)
        return routing.add_changes(tokens, change * scores[:, None].type_as(change))

    def job(self, block: nn.Module, tokens: Tensor, shape: Tuple[int, int], num_extra: int = 0) -> Optional['compiled.Job']:
        """What :meth:`forward` does in inference, for compiled code; None if it does not take the layers or tokens.

        The decision is complete when it has run.
        """
        if self.training or self.routing == 'layer' or not compiled.is_plain(self, DynamicGrainedEncoder):
            return None
        planned = self.router.planned(len(tokens), grid(self.region, shape))
        return None if planned is None else self._job(block, tokens, shape, num_extra, *planned)

    def _job(self, block: nn.Module, tokens: Tensor, shape: Tuple[int, int], num_extra: int, choice: Tensor,
             *router) -> Optional['compiled.Job']:
        """The block on the queries of a choice, made or yet to be made by a router; its decision is noted."""
        job = block.job(tokens, shape, num_extra, Grains(choice, self.granularities, self.region, *router))
        if job is not None:
            self.decision = Decision(choice, job.queries)
        return job

    def _infer(self, block: nn.Module, tokens: Tensor, shape: Tuple[int, int], choice: Tensor, num_extra: int,
               inplace: bool) -> Tensor:
        """The tokens with the changes of the queries of a choice."""
        job = self._job(block, tokens, shape, num_extra, choice)
        if job is not None:
            return compiled.encode([job], tokens if inplace else tokens.clone())
        routing = grains.route(choice, shape, self.granularities, self.region, num_extra, padded=runs_in_pieces(tokens))
        self.decision = Decision(choice, routing.queries)
        plain = is_plain_inference()
        if plain and sum(routing.lengths) == tokens.shape[0] * tokens.shape[1]:
            # Every token is a query of its own: the vanilla block.
            return block(tokens, shape, num_extra, inplace)
        change = self._sparse_change(block, tokens, shape, routing, num_extra)
        return routing.add_changes_(tokens, change) if inplace and plain else routing.add_changes(tokens, change)

    def _sparse_change(self, block: nn.Module, tokens: Tensor, shape: Tuple[int, int], routing: grains.Routing,
                       num_extra: int) -> Tensor:
        """(N, C) changes of the queries of a routing."""
        places = self._places(block, tokens, shape, num_extra)
        points = None if places is None else routing.means(places)
        return self._change(block, routing.means(tokens), tokens, shape, routing.packed, num_extra, points)

    @staticmethod
    def _places(block: nn.Module, tokens: Tensor, shape: Tuple[int, int], num_extra: int) -> Optional[Tensor]:
        """(E + H*W, 2) x and y of the tokens in cells, for a block that uses them."""
        if not getattr(block, 'uses_points', False):
            return None
        places = candidate_centres(shape, (1, ), tokens.device)
        return F.pad(places, (0, 0, num_extra, 0)) if num_extra else places

    def _dense_change(self, block: nn.Module, tokens: Tensor, shape: Tuple[int, int], gates: Tensor,
                      num_extra: int) -> Tensor:
        """(B, E + H*W, C) changes of the tokens by all candidates, which the gates select from."""
        phis, extra = self.granularities, tokens[:, :num_extra]
        pooled = [pool(tokens, shape, phi, num_extra) for phi in phis if phi]
        # Extra tokens and cells lie together already where the cells are candidates themselves.
        candidates = torch.cat([tokens, *pooled[1:]] if 1 in phis else [extra, *pooled], dim=1)
        points = None
        if getattr(block, 'uses_points', False):
            points = F.pad(candidate_centres(shape, phis, tokens.device), (0, 0, num_extra, 0))
        change = self._change(block, candidates, tokens, shape, None, num_extra, points)
        scores = F.pad(candidate_values(gates, shape, phis, self.region), (num_extra, 0), value=1.)
        change = change * scores[..., None].type_as(change)
        cells = sum_over_granularities(change[:, num_extra:], shape, phis)
        return torch.cat([change[:, :num_extra], cells], dim=1) if num_extra else cells

    def _logits(self, tokens: Tensor, shape: Tuple[int, int], num_extra: int) -> Tensor:
        """(B, E + H*W, C) -> (B, regions or 1, K)."""
        if self.routing == 'layer':
            return self.router(tokens[:, num_extra:].mean(1, keepdim=True))
        return self.router(pool(tokens, shape, self.region, num_extra))

    def _per_region(self, decisions: Tensor, shape: Tuple[int, int]) -> Tensor:
        """(B, regions or 1, ...) -> (B, rows, columns, ...)."""
        rows, columns = grid(self.region, shape)
        return decisions.expand(-1, rows * columns, *decisions.shape[2:]).unflatten(1, (rows, columns))

    def _change(self, block, *args) -> Tensor:
        if self.with_cp and torch.is_grad_enabled():
            return checkpoint(block.change, *args, use_reentrant=False)
        return block.change(*args)
