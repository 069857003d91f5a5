"""Dynamic grained queries as pure tensor functions (DGE paper, section 3.2.2).

A feature map of H x W cells is split into regions of S x S cells. A granularity phi turns a region into the means of
its phi x phi patches, one query each; granularity 0 turns it into no query at all. A routing says which cells make up
each query of a decision, and which query serves each cell.

Maps whose sides are not multiples of S have regions and patches that hang over the bottom right edge: they consist of
their valid cells only. A patch without valid cells is none.

Dense training runs all patches of all granularities of an image: its *candidates*.
"""
import math
from dataclasses import dataclass
from functools import lru_cache, wraps
from typing import List, NamedTuple, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..layers.linear import PIECE, few_sizes, runs_in_pieces


def grid(side: int, shape: Tuple[int, int]) -> Tuple[int, int]:
    """Rows and columns of the side x side patches that cover a map of ``shape`` (H, W) cells."""
    return -(-shape[0] // side), -(-shape[1] // side)


def remembered(function):
    """Cache a function of shapes that works on the CPU; its tensors may go into backward passes, whoever asks first."""

    @lru_cache(maxsize=256)
    @torch.compiler.disable
    @wraps(function)
    def call(*args):
        with torch.inference_mode(False), torch.device('cpu'):
            return function(*args)

    return call


@dataclass(frozen=True)
class Groups:
    """Rows of a table, put together in groups. Each row is in one group or in none.

    Attributes:
        rows: (R,) the rows of all groups, one group after the other.
        starts: (N,) where each group begins in ``rows``.
        group: (T,) group of each row of the table; N for rows that are in none.
        complete: whether every row is in a group.
    """
    rows: Tensor
    starts: Tensor
    group: Tensor
    complete: bool = True


def _bags(table: Tensor, groups: Groups, mode: str) -> Tensor:
    return F.embedding_bag(groups.rows, table, groups.starts, mode=mode)


def _take(values: Tensor, groups: Groups) -> Tensor:
    if not groups.complete:
        values = F.pad(values, (0, 0, 0, 1))
    return values.index_select(0, groups.group)


class _Means(torch.autograd.Function):

    @staticmethod
    def forward(ctx, table: Tensor, groups: Groups) -> Tensor:
        ctx.groups = groups
        return _bags(table, groups, 'mean')

    @staticmethod
    def backward(ctx, gradient: Tensor):
        groups = ctx.groups
        ends = F.pad(groups.starts[1:], (0, 1), value=len(groups.rows))
        return _take(gradient / (ends - groups.starts)[:, None], groups), None


class _Spread(torch.autograd.Function):

    @staticmethod
    def forward(ctx, values: Tensor, groups: Groups) -> Tensor:
        ctx.groups = groups
        return _take(values, groups)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return _bags(gradient.contiguous(), ctx.groups, 'sum'), None


def means(table: Tensor, groups: Groups) -> Tensor:
    """Mean of each group's rows: (T, C) -> (N, C)."""
    return _Means.apply(table, groups)


def spread(values: Tensor, groups: Groups) -> Tensor:
    """Hand each group's value to its rows, 0 to those without a group: (N, C) -> (T, C)."""
    return _Spread.apply(values, groups)


def add_spread_(table: Tensor, values: Tensor, groups: Groups) -> Tensor:
    """``table + spread(values, groups)`` in place, without gradients: (T, C), (N, C) -> (T, C)."""
    if not groups.complete:
        values = F.pad(values, (0, 0, 0, 1))
    count = max(PIECE // 2 // table.shape[1], 1) if runs_in_pieces(table) else max(len(table), 1)
    for rows, group in zip(table.split(count), groups.group.split(count)):
        rows += values.index_select(0, group)
    return table


def pool(tokens: Tensor, shape: Tuple[int, int], side: int, num_extra: int = 0) -> Tensor:
    """Means of the valid cells of each side x side patch: (B, E + H*W, C) -> (B, rows*columns, C)."""
    if side == 1:
        return tokens[:, num_extra:]
    groups = patch_groups(len(tokens), shape, side, num_extra, tokens.device)
    return means(tokens.flatten(0, 1), groups).unflatten(0, (len(tokens), -1))


@remembered
def patch_groups(batch: int, shape: Tuple[int, int], side: int, num_extra: int, device: torch.device) -> Groups:
    """The patches of all images' maps as groups of the (B * (E + H*W)) tokens."""
    patch = patch_of_cell(shape, side)
    count, size = math.prod(grid(side, shape)), num_extra + len(patch)
    order = patch.argsort(stable=True)
    first = torch.searchsorted(patch[order], torch.arange(count))
    images = torch.arange(batch)[:, None]
    group = torch.cat([torch.full((batch, num_extra), batch * count), patch + images * count], 1)
    parts = order + num_extra + images * size, first + images * len(patch), group
    return Groups(*(part.flatten().int().to(device) for part in parts), complete=not num_extra)


def patch_of_cell(shape: Tuple[int, int], side: int) -> Tensor:
    """(H*W,) index of the side x side patch that each cell lies in."""
    row, column = torch.arange(shape[0])[:, None], torch.arange(shape[1])
    return (row // side * grid(side, shape)[1] + column // side).flatten()


NONE = 2**30


class Grains(NamedTuple):
    """The granularities of the regions of maps.

    Attributes:
        choice: (B, rows, columns) indices into the granularities.
        granularities: sides of the patches in cells, 0 for none.
        region: side of a region in cells.
        router: a :class:`~mmdyn.models.dge.encoder.Router` that is yet to choose; without one the choice is known.
        chosen: where it writes its choice: (B, rows, columns), ``choice`` itself or another tensor.
    """
    choice: Tensor
    granularities: Tuple[int, ...]
    region: int
    router: Optional[torch.nn.Module] = None
    chosen: Optional[Tensor] = None


class RegionTable(NamedTuple):
    """What each granularity makes of each region of a map; row k * regions + r is granularity k in region r.

    Attributes:
        cells: (K*R, S*S) the region's cells, those of a patch side by side, as indices into the map. Where the region
            has fewer cells, what follows is meaningless.
        starts: (K*R, S*S) whether a patch begins at this place of ``cells``.
        used: (K*R, S*S) whether there is a cell at this place; None if every place of each row has one.
        query: (K*R, S*S) which of the region's queries serves a cell, for the cells row by row; ``NONE`` for no one.
        counts: (K, R) queries of the region.
        skips: whether a granularity is 0.
    """
    cells: Tensor
    starts: Tensor
    used: Optional[Tensor]
    query: Tensor
    counts: Tensor
    skips: bool


@remembered
def region_table(shape: Tuple[int, int], granularities: Tuple[int, ...], region: int, device: torch.device) -> RegionTable:
    """The table of a map of ``shape`` (H, W) cells."""
    rows, columns = grid(region, shape)
    # Cells of a region row by row, also those that hang over the edge.
    inside = torch.arange(region)
    row = (torch.arange(rows)[:, None, None, None] * region + inside[:, None]).expand(-1, columns, -1, region)
    column = (torch.arange(columns)[:, None, None] * region + inside).expand(rows, -1, region, -1)
    row, column = row.flatten(2).flatten(0, 1), column.flatten(2).flatten(0, 1)
    valid, cell = (row < shape[0]) & (column < shape[1]), row * shape[1] + column
    tables = []
    for phi in granularities:
        used = valid if phi else torch.zeros_like(valid)
        patch = (row % region // max(phi, 1)) * region + column % region // max(phi, 1)
        patch = patch.masked_fill(~used, region * region)  # behind the others
        patch, order = patch.sort(dim=1, stable=True)
        used = used.gather(1, order)
        starts = used & (patch != F.pad(patch, (1, 0), value=-1)[:, :-1])
        query = torch.empty_like(patch).scatter(1, order, starts.cumsum(1) - 1 if phi else NONE)
        tables.append((cell.gather(1, order), starts, used, query, starts.sum(1)))
    cells, starts, used, query, counts = (torch.stack(parts).to(device) for parts in zip(*tables))
    return RegionTable(cells.flatten(0, 1).int(), starts.flatten(0, 1), None if used.all() else used.flatten(0, 1),
                       query.flatten(0, 1).int(), counts, 0 in granularities)


@dataclass(frozen=True)
class Routing:
    """One decision in both directions: which tokens make up each query, and which query serves each token.

    Attributes:
        lengths: queries of each image, extra tokens included.
        surplus: queries of zeros behind the last image's, which serve no token.
        groups: all these queries as groups of the B * (E + H*W) tokens.
        counts: (B, E + regions) queries of each extra token and region.
    """
    lengths: List[int]
    surplus: int
    groups: Groups
    counts: Tensor

    @property
    def packed(self) -> List[int]:
        """``lengths`` with the surplus."""
        return [*self.lengths[:-1], self.lengths[-1] + self.surplus]

    @property
    def queries(self) -> Tensor:
        """``lengths`` as (B)."""
        return torch.tensor(self.lengths, device='cpu')

    def means(self, table: Tensor) -> Tensor:
        """The queries: (B, E + H*W, C), or (E + H*W, C) if all images share it -> (N, C), the surplus included."""
        rows = table.flatten(0, 1) if table.ndim == 3 else table.repeat(len(self.lengths), 1)
        return means(rows, self.groups)

    def add_changes(self, tokens: Tensor, change: Tensor) -> Tensor:
        """(B, E + H*W, C) tokens plus the (N, C) changes of the queries that serve them -> (B, E + H*W, C)."""
        return tokens + spread(change, self.groups).view_as(tokens)

    def add_changes_(self, tokens: Tensor, change: Tensor) -> Tensor:
        """:meth:`add_changes` in place, without gradients."""
        add_spread_(tokens.view(-1, tokens.shape[2]), change, self.groups)
        return tokens


def route(choice: Tensor, shape: Tuple[int, int], granularities: Tuple[int, ...], region: int,
          num_extra: int = 0, padded: bool = False) -> Routing:
    """Turn the choice of each region, (B, rows, columns) indices into ``granularities``, into a routing.

    If ``padded``, there is a surplus of queries, so that layers meet few different numbers of them.

    The queries of an image are its extra tokens, then those of region after region. No loop over images, regions or
    patches; one synchronisation on an accelerator.
    """
    batch, device, (rows, columns) = len(choice), choice.device, grid(region, shape)
    table, size = region_table(shape, granularities, region, device), num_extra + math.prod(shape)
    pick = (choice.flatten(1) * (rows * columns) + torch.arange(rows * columns, device=device)).flatten()
    extra = torch.arange(num_extra, device=device)
    counts = F.pad(table.counts.flatten()[pick].view(batch, -1), (num_extra, 0), value=1)
    used = None if table.used is None else _of_images(table.used, pick, batch, extra >= 0)
    sums = counts.sum(1)
    if table.skips:
        *lengths, total = torch.cat([sums, used.sum()[None]]).tolist()
    else:
        lengths, total = sums.tolist(), batch * size

    cells = _of_images(table.cells, pick, batch, extra - num_extra)
    if batch > 1 or num_extra:
        cells = cells + torch.arange(num_extra, batch * size, size, dtype=torch.int32, device=device)[:, None]
    starts = _of_images(table.starts, pick, batch, extra >= 0)
    cells, starts = cells.flatten(), starts.flatten()
    if used is not None:
        place = torch.nonzero_static(used.flatten(), size=total).squeeze(1)
        cells, starts = cells[place], starts[place]
    num = few_sizes(sum(lengths)) if padded else sum(lengths)
    # What lies behind the last start begins at the end: it is empty.
    starts = torch.nonzero_static(starts, size=num, fill_value=len(cells)).squeeze(1).int()

    first = (counts.flatten().cumsum(0) - counts.flatten()).int().view(batch, -1)
    query = table.query.index_select(0, pick).view(batch, rows * columns, -1) + first[:, num_extra:, None]
    query = query.view(batch, rows, columns, region, region).transpose(2, 3).reshape(batch, rows * region, -1)
    query = query[:, :shape[0], :shape[1]].flatten(1)
    if table.skips:
        query = query.clamp(max=num)
    if num_extra:
        query = torch.cat([first[:, :num_extra], query], dim=1)
    return Routing(lengths, num - sum(lengths), Groups(cells, starts, query.flatten(), not table.skips), counts)


def _of_images(rows: Tensor, pick: Tensor, batch: int, extra: Tensor) -> Tensor:
    """(K*R, S*S) rows of a table -> (B, E + R*S*S), the picked ones of each image, with ``extra`` in front."""
    picked = rows.index_select(0, pick).view(batch, -1)
    return torch.cat([extra.to(picked.dtype).expand(batch, -1), picked], dim=1) if len(extra) else picked


def tile(regions: Tensor, times: int, size: Tuple[int, int]) -> Tensor:
    """Repeat each region's value ``times`` x ``times`` and cut to ``size``: (B, rows, columns) -> (B, size[0]*size[1])."""
    batch, rows, columns = regions.shape
    tiles = regions[:, :, None, :, None].expand(-1, -1, times, -1, times)
    return tiles.reshape(batch, rows * times, columns * times)[:, :size[0], :size[1]].flatten(1)


def candidate_values(values: Tensor, shape: Tuple[int, int], granularities: Tuple[int, ...], region: int) -> Tensor:
    """Give each candidate the value that its region has for its granularity: (B, rows, columns, K) -> (B, P).

    P counts the patches of every granularity, in the order of ``granularities``, row by row.
    """
    return torch.cat([
        tile(values[..., k], region // phi, grid(phi, shape)) for k, phi in enumerate(granularities) if phi
    ], dim=1)


@remembered
def candidate_centres(shape: Tuple[int, int], granularities: Tuple[int, ...], device: torch.device) -> Tensor:
    """Centres of an image's candidates, the means of their valid cells' places: (P, 2) x and y in cells."""
    places = torch.stack(torch.meshgrid(*map(torch.arange, shape[::-1]), indexing='xy'), -1).float().flatten(0, 1)[None]
    return torch.cat([pool(places, shape, phi)[0] for phi in granularities if phi]).to(device)


def sum_over_granularities(candidates: Tensor, shape: Tuple[int, int], granularities: Tuple[int, ...]) -> Tensor:
    """Hand what each candidate holds to its cells, which are in one of each granularity: (B, P, C) -> (B, H*W, C)."""
    batch, phis = len(candidates), [phi for phi in granularities if phi]
    parts = candidates.split([math.prod(grid(phi, shape)) for phi in phis], dim=1)
    return sum(
        part if phi == 1 else
        spread(part.flatten(0, 1), patch_groups(batch, shape, phi, 0, part.device)).unflatten(0, (batch, -1))
        for phi, part in zip(phis, parts))
