"""Dynamic grained queries as pure tensor functions (DGE paper, section 3.2.2).

A map of H x W cells is split into regions of S x S cells. A granularity phi turns a region into the means of its
phi x phi patches, one query each; granularity 0 turns it into no query at all.

On maps whose sides are not multiples of S, regions and patches hang over the bottom right edge: they consist of their
valid cells only. A patch without valid cells is none.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..replaceable import replaceable
from ..tracing import to_integers


def grid(side: int, shape: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of the side x side patches that cover a map of ``shape`` (H, W) cells."""
    return -(-shape[0] // side), -(-shape[1] // side)


def pool(tokens: Tensor, shape: tuple[int, int], side: int, num_extra: int = 0) -> Tensor:
    """Means of the valid cells of each side x side patch: (B, E + H*W, C) -> (B, rows, columns, C)."""
    cells = tokens[:, num_extra:].unflatten(1, shape)
    if side == 1:
        return cells
    means = F.avg_pool2d(cells.permute(0, 3, 1, 2), (side, side), ceil_mode=True, count_include_pad=False)
    return means.permute(0, 2, 3, 1)


def unpool(patches: Tensor, side: int, shape: tuple[int, int]) -> Tensor:
    """Hand each patch's value to its side x side cells: (B, rows, columns, C) -> (B, H, W, C)."""
    batch, rows, columns, channels = patches.shape
    cells = patches[:, :, None, :, None].expand(-1, -1, side, -1, side, -1)
    return cells.reshape(batch, rows * side, columns * side, channels)[:, : shape[0], : shape[1]]


def centres(shape: tuple[int, int], device: torch.device | None = None) -> Tensor:
    """The places of a map's cells: (1, H*W, 2), x and y."""
    y, x = torch.meshgrid(*(torch.arange(side, device=device, dtype=torch.float32) for side in shape), indexing='ij')
    return torch.stack([x, y], -1).flatten(0, 1)[None]


def count_patches(
    shape: tuple[int, int], granularities: Sequence[int], region: int, device: torch.device | None = None
) -> Tensor:
    """Queries that each granularity makes of each region: (rows, columns, K)."""

    def patches(phi: int) -> Tensor:
        rows, columns = (
            torch.arange(side, 0, -region, device=device).clamp(max=region).add(phi - 1) // phi for side in shape
        )
        return rows[:, None] * columns

    none = torch.zeros(grid(region, shape), dtype=torch.long, device=device)
    return torch.stack([patches(phi) if phi else none for phi in granularities], -1)


def look_up(numbers: Sequence[int], index: Tensor) -> Tensor:
    """The number of each index, without a table that would have to be copied to an accelerator."""
    return torch.stack([number * (index == k) for k, number in enumerate(numbers)]).sum(0)


@dataclass(frozen=True)
class Routing:
    """One decision in both directions: which tokens make up each query, and which query serves each token.

    Attributes:
        query: (B, E + H*W) the query of each token, numbered through all images; N where no query serves it.
        lengths: places for the queries of each image, N in all. Those that are left over are of no token, and 0.
    """

    query: Tensor
    lengths: list[int]

    def compress(self, tokens: Tensor) -> Tensor:
        """Eq. 3: the packed queries, means of their tokens. (B or 1, E + H*W, C) -> (N, C)."""
        num, index = sum(self.lengths), self.query.flatten()
        tokens = tokens.expand(self.query.shape[0], -1, -1).flatten(0, 1)
        full = torch.promote_types(tokens.dtype, torch.float32)  # a sum may not fit into half precision
        sums = tokens.new_zeros(num + 1, tokens.shape[1], dtype=full).index_add(0, index, tokens.to(full))
        # Not by bincount, which synchronises on an accelerator.
        counts = sums.new_zeros(num + 1).index_add(0, index, sums.new_ones(1).expand(index.shape[0]))
        return (sums.narrow(0, 0, num) / counts.narrow(0, 0, num)[:, None].clamp(min=1)).to(tokens.dtype)

    def spread(self, change: Tensor) -> Tensor:
        """Un-pooling: (N, C) changes of the queries -> (B, E + H*W, C), 0 where no query serves a token."""
        return F.pad(change, (0, 0, 0, 1)).index_select(0, self.query.flatten()).unflatten(0, self.query.shape)

    def decompress(self, change: Tensor, tokens: Tensor) -> Tensor:
        """Un-pooling plus the input: (N, C) changes of the queries, (B, E + H*W, C) -> (B, E + H*W, C)."""
        return tokens + self.spread(change)


@replaceable
def route(
    choice: Tensor,
    shape: tuple[int, int],
    granularities: Sequence[int],
    region: int,
    num_extra: int = 0,
    capacity: int | None = None,
) -> Routing:
    """Turn the choice of each region into queries.

    The queries of an image are its extra tokens, then its patches, here by their first cells.

    Args:
        choice: (B, rows, columns) indices into ``granularities``.
        shape: (H, W).
        granularities: sides of the patches in cells, 0 for none.
        region: side of a region in cells, a multiple of them.
        num_extra: E.
        capacity: places for the queries of each image. Then all shapes are known beforehand; otherwise an accelerator
            has to be waited for. Patches of an image that there is no place for have no query.
    """
    device = choice.device
    side = look_up(granularities, choice).int()
    side = unpool(side[..., None], region, shape)[..., 0]  # of the patch of each cell
    row, column = (torch.arange(length, dtype=torch.int32, device=device) for length in shape)
    step = side.clamp(min=1)
    first = (row[:, None] - row[:, None] % step) * shape[1] + column - column % step  # cell of the patch
    begins = (side > 0) & (first == row[:, None] * shape[1] + column)

    begins = F.pad(begins.flatten(1), (num_extra, 0), value=True)
    if capacity is None:
        lengths, number = to_integers(begins.sum(1)), (begins.flatten().long().cumsum(0) - 1).view_as(begins)
    else:
        lengths, place = [capacity] * choice.shape[0], begins.long().cumsum(1) - 1
        starts = capacity * torch.arange(choice.shape[0], device=device)
        number = (starts[:, None] + place).where(place < capacity, sum(lengths))
    first = torch.cat(
        [torch.arange(num_extra, device=device).expand(choice.shape[0], -1), num_extra + first.flatten(1)], 1
    )
    query = number.gather(1, first)
    return Routing(query.masked_fill(F.pad(side.flatten(1) == 0, (num_extra, 0)), sum(lengths)), lengths)
