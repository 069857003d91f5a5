"""Dynamic grained queries as pure tensor functions (DGE paper, section 3.2.2).

A feature map of H x W cells is split into regions of S x S cells. A granularity phi turns a region into the means of
its phi x phi patches, one query each; granularity 0 turns it into no query at all. All patches of all granularities of
an image are its *candidates*; a routing selects those of the chosen granularity of each region.

Maps whose sides are not multiples of S have regions and patches that hang over the bottom right edge: they consist of
their valid cells only. A patch without valid cells is no candidate.
"""
from dataclasses import dataclass
from functools import lru_cache
from typing import List, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor


def grid(side: int, shape: Tuple[int, int]) -> Tuple[int, int]:
    """Rows and columns of the side x side patches that cover a map of ``shape`` (H, W) cells."""
    return -(-shape[0] // side), -(-shape[1] // side)


def pool(cells: Tensor, shape: Tuple[int, int], side: int) -> Tensor:
    """Means of the valid cells of each side x side patch: (B, H*W, C) -> (B, rows*columns, C)."""
    if side == 1:
        return cells
    # ceil_mode divides by the number of cells inside of the map, so nothing outside of it leaks in.
    maps = cells.transpose(1, 2).unflatten(2, shape)
    return F.avg_pool2d(maps, side, ceil_mode=True).flatten(2).transpose(1, 2)


def spread(regions: Tensor, times: int, size: Tuple[int, int]) -> Tensor:
    """Repeat each region's value ``times`` x ``times`` and cut to ``size``: (B, rows, columns) -> (B, size[0]*size[1])."""
    batch, rows, columns = regions.shape
    tiles = regions[:, :, None, :, None].expand(-1, -1, times, -1, times)
    return tiles.reshape(batch, rows * times, columns * times)[:, :size[0], :size[1]].flatten(1)


def candidate_values(values: Tensor, shape: Tuple[int, int], granularities: Tuple[int, ...], region: int) -> Tensor:
    """Give each candidate the value that its region has for its granularity: (B, rows, columns, K) -> (B, P).

    P counts the patches of every granularity, in the order of ``granularities``, row by row.
    """
    return torch.cat([
        spread(values[..., k], region // phi, grid(phi, shape)) for k, phi in enumerate(granularities) if phi
    ], dim=1)


@lru_cache(maxsize=256)
def candidate_of_cell(shape: Tuple[int, int], granularities: Tuple[int, ...], device: torch.device) -> Tensor:
    """Which candidate covers a cell: (K, H*W) indices into an image's P candidates (0 for granularity 0)."""
    row, column = torch.arange(shape[0], device=device)[:, None], torch.arange(shape[1], device=device)
    tables, offset = [], 0
    for phi in granularities:
        if not phi:
            tables.append(torch.zeros(shape[0] * shape[1], dtype=torch.long, device=device))
            continue
        rows, columns = grid(phi, shape)
        tables.append((offset + row // phi * columns + column // phi).flatten())
        offset += rows * columns
    return torch.stack(tables)


@lru_cache(maxsize=256)
def candidate_centres(shape: Tuple[int, int], granularities: Tuple[int, ...], device: torch.device) -> Tensor:
    """Centres of an image's candidates, the means of their valid cells' places: (P, 2) x and y in cells."""
    row, column = torch.arange(shape[0], device=device), torch.arange(shape[1], device=device)
    places = torch.stack(torch.meshgrid(column, row, indexing='xy'), -1).float().flatten(0, 1)[None]
    return torch.cat([pool(places, shape, phi)[0] for phi in granularities if phi])


@dataclass(frozen=True)
class Routing:
    """One decision in both directions: which candidates are queries, and which query serves each token.

    Attributes:
        lengths: queries of each image, extra tokens included; they sum to N.
        source: (N,) index of each query among the B * (E + P) extra tokens and candidates of the batch.
        query: (B, E + H*W) index of the query that serves a token; N where the region is skipped.
        skips: whether any region may be skipped.
    """
    lengths: List[int]
    source: Tensor
    query: Tensor
    skips: bool


def route(choice: Tensor, shape: Tuple[int, int], granularities: Tuple[int, ...], region: int,
          num_extra: int = 0) -> Routing:
    """Turn the choice of each region, (B, rows, columns) indices into ``granularities``, into a routing.

    No loop over images, regions or patches; one synchronisation on an accelerator.
    """
    batch, device = choice.shape[0], choice.device
    one_hot = choice[..., None] == torch.arange(len(granularities), device=device)
    chosen = F.pad(candidate_values(one_hot, shape, granularities, region), (num_extra, 0), value=True)
    rank = chosen.flatten().cumsum(0) - 1
    lengths = chosen.sum(1).tolist()
    source = torch.nonzero_static(chosen.flatten(), size=sum(lengths)).squeeze(1)

    choice = spread(choice, region, shape)
    first = torch.arange(batch, device=device)[:, None] * chosen.shape[1]
    table = candidate_of_cell(shape, granularities, device)
    candidate = table[choice, torch.arange(table.shape[1], device=device)] + first + num_extra
    query = rank[candidate]
    if 0 in granularities:
        query = query.masked_fill(choice == granularities.index(0), sum(lengths))
    extra = rank[first + torch.arange(num_extra, device=device)]
    return Routing(lengths, source, torch.cat([extra, query], dim=1), 0 in granularities)


def compress(candidates: Tensor, routing: Routing) -> Tensor:
    """Pack the selected candidates of all images: (B, E + P, C) -> (N, C)."""
    return candidates.flatten(0, 1).index_select(0, routing.source)


def decompress(change: Tensor, routing: Routing) -> Tensor:
    """Hand the change of each query to the tokens that it serves: (N, C) -> (B, E + H*W, C)."""
    if routing.skips:
        change = F.pad(change, (0, 0, 0, 1))
    return F.embedding(routing.query, change)
