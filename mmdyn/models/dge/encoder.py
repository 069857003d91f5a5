"""The dynamic grained encoder: a router, and the way of an encoder block's tokens through it (DGE paper, fig. 1)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...values import MOST, check_integer, check_number, is_integer
from ..replaceable import replaceable
from ..thread_local import ThreadLocal
from ..tracing import is_exported, is_traced, refuse_onnx_by_torchscript
from .budget import queries_within
from .router import ROUTERS, choose, straight_through_gates
from .routing import Routing, centres, count_patches, grid, route, unpool


def check_granularities(granularities: Sequence[int], region_size: int | None = None) -> tuple[int, ...]:
    """Return the granularities as a tuple, or raise ValueError if they are no set of patch sides of one region."""
    if not isinstance(granularities, (tuple, list)):
        raise ValueError(f'granularities={granularities!r}: give a sequence of sides of patches, e.g. (1, 2, 4).')
    phis = tuple(granularities)
    if not phis or not any(phis):
        raise ValueError(f'granularities={phis} leave no query: give at least one side greater than 0, e.g. (1, 2, 4).')
    if not all(is_integer(phi, 0, MOST) for phi in phis):
        raise ValueError(f'granularities={phis}: each is the side of a patch in cells, an integer >= 0 (0 skips).')
    if list(phis) != sorted(set(phis)):
        raise ValueError(
            f'granularities={phis} must be in ascending order without repeats: write {tuple(sorted(set(phis)))}.'
        )
    if region_size is not None and not is_integer(region_size, 1, MOST):
        raise ValueError(
            f'region_size={region_size!r}: give the side of a region in cells, an integer greater than 0, or '
            'None for the largest granularity.'
        )
    region = region_size or max(phis)
    uneven = [phi for phi in phis if phi and region % phi]
    if uneven:
        raise ValueError(
            f'granularities {uneven} do not divide the region of {region} x {region} cells: '
            f'choose sides that divide {region}, or another region_size.'
        )
    return phis


class Decision(NamedTuple):
    """What an encoder decided in its last forward pass.

    Attributes:
        choice: (B, rows, columns) index of each region's granularity.
        queries: (B,) queries used, extra tokens included; in training with the straight-through gradient of eq. 7,
            otherwise on the CPU, where the lengths are, but where shapes were known beforehand.
        logits: (B, rows, columns, K) what the gates were drawn from in training, (B, 1, 1, K) if routing is by layer.
    """

    choice: Tensor
    queries: Tensor
    logits: Tensor | None = None


@dataclass
class Bound:
    """How many queries of an image a layer has places for in a pass, before it is known how many there are.

    What a choice makes above that is left out, and the pass is wrong: whoever sets a bound looks at the surplus.

    Attributes:
        share: places, as a share of the dense block's queries.
        surplus: of each time that the layer ran, (B,) queries above the places; negative where places are left over.
    """

    share: float
    surplus: list[Tensor] = field(default_factory=list)


def points_of(block: nn.Module, routing: Routing, shape: tuple[int, int], num_extra: int) -> Tensor | None:
    """Centres of the queries' patches, (N, 2) in cells, for a block that looks at places."""
    if not getattr(block, 'uses_points', False):
        return None
    return routing.compress(F.pad(centres(shape, routing.query.device), (0, 0, num_extra, 0)))


@replaceable
def encode_queries(
    block: nn.Module, tokens: Tensor, shape: tuple[int, int], num_extra: int, routing: Routing
) -> Tensor:
    """The residual of a block, enc(q) - q, on the queries of a routing.

    Args:
        block: see :class:`DynamicGrainedEncoder`.
        tokens: (B, E + H*W, C).
        shape: (H, W).
        num_extra: E.
        routing: of the tokens.

    Returns:
        (N, C).
    """
    options = dict(routing=routing) if getattr(block, 'uses_routing', False) else {}
    queries, points = routing.compress(tokens), points_of(block, routing, shape, num_extra)
    residual: Tensor = block(queries, tokens, shape, num_extra, routing.lengths, points, **options) - queries
    return residual


class DynamicGrainedEncoder(nn.Module):
    """Lets each region of an encoder block's input choose its number of queries.

    The block is an argument of the forward pass, not a submodule: its weights' names are those of the dense model.
    It is called as ``block(queries, tokens, shape, num_extra, lengths, points)``, see
    :class:`~mmdyn.models.layers.EncoderBlock`, and returns its queries' new values. With ``uses_routing`` it is told
    the :class:`Routing` of packed queries too.

    Args:
        dim: channels of the tokens.
        granularities: sides of the candidate patches in cells, ascending; 0 skips the region.
        region_size: side of a region in cells. Defaults to the largest granularity.
        routing: ``'region'``, or ``'layer'`` for one decision per image.
        train_mode: ``'dense'`` also runs the granularities that were not chosen, so that each logit learns what its
            granularity would have changed; ``'pair'`` runs one of them, drawn for each region, in place of all;
            ``'sparse'`` runs the chosen ones alone (eq. 6) and compares nothing.
        tau: temperature of eq. 5.
        router: ``'linear'``, the paper's; or one that is not trained and chooses the finest granularity until a budget
            is set: ``'random'``, ``'entropy'`` of the image's pixels, or ``'correlation'`` of tokens with the means of
            their patches, see :mod:`~mmdyn.models.dge.untrained`.

    Attributes:
        decision: the :class:`Decision` of the thread's last forward pass.
        bound: the :class:`Bound` of the thread's passes in inference; None waits for the number of queries.
        forced: (rows, columns) a choice that counts in place of the router's, for benchmarks.
        noise: scale of the noise that gates are drawn with in training.
    """

    decision: ThreadLocal[Decision] = ThreadLocal()
    bound: ThreadLocal[Bound] = ThreadLocal()

    def __init__(
        self,
        dim: int,
        granularities: Sequence[int] = (1, 2, 4),
        region_size: int | None = None,
        routing: str = 'region',
        train_mode: str = 'dense',
        tau: float = 1.0,
        router: str = 'linear',
    ):
        super().__init__()
        check_integer('dim', dim, 1, MOST, 'the channels')
        self.granularities = check_granularities(granularities, region_size)
        self.region = region_size or max(self.granularities)
        for name, value, allowed in (
            ('routing', routing, ('region', 'layer')),
            ('train_mode', train_mode, ('sparse', 'pair', 'dense')),
            ('router', router, tuple(ROUTERS)),
        ):
            if value not in allowed:
                raise ValueError(f'dge {name}={value!r}: choose from {allowed}.')
        check_number('dge tau', tau, '(0, inf)', 'the temperature of the softmax')
        self.routing, self.train_mode, self.tau = routing, train_mode, tau
        self.router = ROUTERS[router](dim, self.granularities)
        self.forced: Tensor | None = None
        self.noise = 1.0

    def extra_repr(self) -> str:
        return f'granularities={self.granularities}, region={self.region}, routing={self.routing}'

    def query_bounds(self, shape: tuple[int, int], num_extra: int = 0) -> tuple[int, int]:
        """Fewest and most queries of an image with a map of ``shape``."""
        counts = [math.prod(grid(phi, shape)) if phi else 0 for phi in self.granularities]
        return num_extra + min(counts), num_extra + max(counts)

    def decision_side(self, shape: tuple[int, int]) -> int:
        """Side of what one decision is for: a region, or all of the map."""
        return self.region if self.routing == 'region' else max(shape)

    def num_decisions(self, shape: tuple[int, int]) -> int:
        """Decisions on an image with a map of ``shape``."""
        return math.prod(grid(self.decision_side(shape), shape))

    def macs(self, shape: tuple[int, int]) -> int:
        """Multiply-adds of the router on an image with a map of ``shape``."""
        return self.router.macs(shape, self.decision_side(shape))

    def forward(self, block: nn.Module, tokens: Tensor, shape: tuple[int, int], num_extra: int = 0) -> Tensor:
        """Run ``block`` on as many queries as the router grants.

        Args:
            block: the vanilla encoder block.
            tokens: (B, E + H*W, C), the E extra tokens first.
            shape: (H, W) of the map.
            num_extra: E; extra tokens are always queries.

        Returns:
            (B, E + H*W, C), but for rounding the block's own output where the granularity is 1.
        """
        refuse_onnx_by_torchscript('the numbers of queries that DGE chooses')
        gates, choice, logits = self._decide(tokens, shape, num_extra)
        if gates is None or logits is None:
            capacity = self._capacity(tokens, shape, num_extra)
            routing, residual = self._run(block, tokens, shape, num_extra, choice, capacity)
            self._note(choice, routing, shape, num_extra, capacity)
            return routing.decompress(residual, tokens)
        others = self._others(choice, logits.shape[:-1]) if torch.is_grad_enabled() else []
        changes = [self._change_without_graph(block, tokens, shape, num_extra, other) for other in others]
        routing, residual = self._run(block, tokens, shape, num_extra, choice)
        if self.train_mode == 'sparse':
            gates = gates * F.one_hot(choice, len(self.granularities))
            of_cells = unpool(gates.sum(-1, keepdim=True), self.region, shape).flatten(1, 2)
            residual = residual * routing.compress(F.pad(of_cells, (0, 0, num_extra, 0), value=1.0)).type_as(residual)
        self.decision = Decision(choice, self._count(gates, shape, num_extra), logits)
        output = routing.decompress(residual, tokens)
        for other, change in zip(others, changes):
            # A gate of 0, whose gradient is what the other choice would have changed for the better. Where one of
            # several is compared, it stands for all.
            gate = (gates - gates.detach()).gather(-1, other[..., None]) * ((len(self.granularities) - 1) / len(others))
            of_cells = F.pad(unpool(gate, self.region, shape).flatten(1, 2), (0, 0, num_extra, 0))
            output = output + of_cells.type_as(change) * (change - routing.spread(residual.detach()))
        return output

    def _note(
        self, choice: Tensor, routing: Routing, shape: tuple[int, int], num_extra: int, capacity: int | None
    ) -> None:
        """Keep a decision in inference; an export keeps nothing."""
        if is_exported():
            return
        if capacity is None:
            queries = torch.tensor(routing.lengths, dtype=torch.long, device='cpu')
        else:
            queries = self._count(F.one_hot(choice, len(self.granularities)), shape, num_extra)
            bound = self._bound_of_pass()
            if bound is not None:
                bound.surplus.append(queries - capacity)
        self.decision = Decision(choice, queries)

    def _bound_of_pass(self) -> Bound | None:
        """A compiled pass has none; the compiler of torch 2.6 would take what keeps it for one."""
        return None if torch.compiler.is_compiling() else self.bound

    def _others(self, choice: Tensor, decisions: torch.Size) -> list[Tensor]:
        """The choices that training compares with the one that was made, each (B, rows, columns)."""
        num = len(self.granularities)
        if self.train_mode == 'sparse' or num == 1:
            return []
        if self.train_mode == 'pair':
            return [(choice + torch.randint(1, num, decisions, device=choice.device)) % num]
        return [(choice + shift) % num for shift in range(1, num)]

    @torch.no_grad()
    def _change_without_graph(
        self, block: nn.Module, tokens: Tensor, shape: tuple[int, int], num_extra: int, choice: Tensor
    ) -> Tensor:
        """(B, E + H*W, C) what a choice would change.

        A gate of 0 lets no gradient through to the block, only to the logits: what lies behind needs no graph.
        """
        kind = tokens.device.type
        # Weights that autocast rounded here, without a graph, older versions of torch would use where there is one.
        rounded = torch.autocast(
            kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind), cache_enabled=False
        )
        # The random numbers are those of the choice that was made: what drops out, drops out of both.
        with rounded, torch.random.fork_rng([tokens.device] if tokens.is_cuda else []):
            routing, residual = self._run(block, tokens, shape, num_extra, choice)
        return routing.spread(residual)

    def _run(
        self,
        block: nn.Module,
        tokens: Tensor,
        shape: tuple[int, int],
        num_extra: int,
        choice: Tensor,
        capacity: int | None = None,
    ) -> tuple[Routing, Tensor]:
        """Run the block on the queries of a choice: its routing, and what the block adds to them, (N, C)."""
        routing = route(choice, shape, self.granularities, self.region, num_extra, capacity)
        return routing, encode_queries(block, tokens, shape, num_extra, routing)

    def _decide(
        self, tokens: Tensor, shape: tuple[int, int], num_extra: int
    ) -> tuple[Tensor | None, Tensor, Tensor | None]:
        """The gates of all regions in training, (B, rows, columns, K), the choice, and in training the logits."""
        side, regions = self.decision_side(shape), grid(self.region, shape)
        forced = None if self.forced is None else self.forced.expand(tokens.shape[0], -1, -1)
        if not (self.training and self.router.is_trained):
            choice = choose(self.router, tokens, shape, side, num_extra)
            return None, choice.expand(-1, *regions) if forced is None else forced, None
        logits = self.router.logits(tokens, shape, side, num_extra)
        if self.router.training_price is not None:
            logits = logits - self.router.training_price
        gates, choice = straight_through_gates(logits, self.tau, forced, self.noise)
        return gates.expand(-1, *regions, -1), choice.expand(-1, *regions), logits

    def _capacity(self, tokens: Tensor, shape: tuple[int, int], num_extra: int) -> int | None:
        """Places for queries of an image in inference, by a bound or an exact budget; None if the number is waited for.

        A CPU waits for nothing, and would compute what is left over for nothing.
        """
        is_recorded, bound = torch.compiler.is_compiling() or is_traced(), self._bound_of_pass()
        if bound is not None:
            share = bound.share
        elif self.router.share is None or self.forced is not None or not (is_recorded or tokens.device.type != 'cpu'):
            return None
        else:
            share = self.router.share
        least, most = self.query_bounds(shape, num_extra)
        return min(max(queries_within(share, shape, num_extra), least), most)

    def _count(self, gates: Tensor, shape: tuple[int, int], num_extra: int) -> Tensor:
        """(B) queries of the gates, the sum in the numerator of eq. 7 for one layer."""
        return num_extra + (gates * count_patches(shape, self.granularities, self.region, gates.device)).sum((1, 2, 3))
