"""Attention inside of windows, for queries that stand for patches (Swin)."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..dge import Routing
from ..dge.routing import centres
from .adapter import Adapter
from .parts import heads, project, weights


class Windows(NamedTuple):
    """How a map is split into nW windows of M places.

    Attributes:
        cells: (nW, M) the cell at each place, H*W where there is none.
        areas: (nW, M) places of one window see each other if their areas are one: a cyclic shift brings cells
            together that lie at opposite edges.
    """

    cells: Tensor
    areas: Tensor


class Layout(NamedTuple):
    """Where the windows of a block lie.

    Attributes:
        window, shift: (rows, columns).
        pads_first: whether the map is filled up to whole windows before it is shifted, or afterwards.
    """

    window: tuple[int, int]
    shift: tuple[int, int]
    pads_first: bool


def split(shape: tuple[int, int], layout: Layout, device: torch.device) -> Windows:
    """The windows of a map of ``shape`` (H, W)."""
    window, back = layout.window, tuple(-side for side in layout.shift)
    cells, none = torch.arange(shape[0] * shape[1], device=device).view(shape), shape[0] * shape[1]
    pad = (0, -shape[1] % window[1], 0, -shape[0] % window[0])
    if layout.pads_first:
        cells = F.pad(cells, pad, value=none).roll(back, (0, 1))
    else:
        cells = F.pad(cells.roll(back, (0, 1)), pad, value=none)
    rows, columns = (
        (place >= side - length).long() + (place >= side - shift) if shift else torch.zeros_like(place)
        for place, side, length, shift in (
            (torch.arange(side, device=device), side, length, shift)
            for side, length, shift in zip(cells.shape, window, layout.shift)
        )
    )

    def windows(x: Tensor) -> Tensor:
        return x.unflatten(1, (-1, window[1])).unflatten(0, (-1, window[0])).transpose(1, 2).flatten(2).flatten(0, 1)

    return Windows(windows(cells), windows(3 * rows[:, None] + columns))


class WindowAdapter(Adapter):
    """A Swin block: queries attend to the window that their patch's centre is in, shifted or not.

    A query's position bias is the mean of those of its patch's cells in that window. So its score with a key is the
    mean of the scores that its content would have at each of them.

    A subclass tells where the windows are (``layout``), and what its library calls the layers.
    """

    uses_routing = True

    def layout(self, shape: tuple[int, int]) -> Layout:
        """Where the windows are on a map of ``shape``."""
        raise NotImplementedError

    @property
    def window_attention(self) -> nn.Module:
        """The layer with ``qkv``, ``proj``, ``relative_position_bias_table`` and so on."""
        raise NotImplementedError

    @property
    def window(self) -> tuple[int, int]:
        """Rows and columns of a window."""
        return tuple(self.window_attention.window_size)

    def check_granularities(self, granularities: Sequence[int], stage: str) -> None:
        uneven = [phi for phi in granularities if phi and any(side % phi for side in self.window)]
        if uneven:
            allowed = [phi for phi in range(1, 1 + min(self.window)) if not any(side % phi for side in self.window)]
            raise ValueError(
                f'granularities {uneven} do not divide the windows of {self.window[0]} x {self.window[1]} cells of '
                f'{stage}, so that patches would lie in several of them: choose from {allowed} (and 0).'
            )

    def attend(self, queries: Tensor, tokens: Tensor, shape: tuple[int, int], routing: Routing) -> Tensor:
        """Attention of normed queries (N, C) to normed tokens (B, H*W, C)."""
        attn, width = self.window_attention, self.window_attention.qkv.out_features // 3
        layout, num = self.layout(shape), shape[0] * shape[1]
        windows = split(shape, layout, tokens.device)
        query = project(attn.qkv, queries, 0, width).unflatten(-1, (attn.num_heads, -1))
        in_windows = F.pad(tokens, (0, 0, 0, 1))[:, windows.cells.flatten()]
        keys_values = project(attn.qkv, in_windows, width, 3 * width)
        key, value = heads(keys_values.view(-1, windows.cells.shape[1], 2 * width), attn.num_heads, 2)

        # Of each cell: its window, its place in it, and a number of its window and area.
        places = windows.cells.shape[1]
        where = windows.cells.new_empty(num + 1)
        where[windows.cells.flatten()] = torch.arange(windows.cells.numel(), device=tokens.device)
        window, place = where[:num] // places, where[:num] % places
        part = 9 * window + windows.areas.flatten()[where[:num]]
        # Of each query: the cell at its centre, which tells its window and area.
        centre = routing.compress(centres(shape, tokens.device)).long()
        cell = centre[:, 1] * shape[1] + centre[:, 0]
        same = F.pad(part[cell], (0, 1), value=-1)[routing.query] == part
        inside = Routing(routing.query.masked_fill(~same, len(cell)), routing.lengths)
        table = attn.relative_position_bias_table[attn.relative_position_index.flatten()]
        of_place = table.view(places, -1)  # (M, M * heads)
        bias = inside.compress(of_place[place][None]).view(len(cell), places, attn.num_heads).permute(0, 2, 1)
        if any(layout.shift):
            apart = windows.areas[window[cell]] != (part[cell] % 9)[:, None]
            bias = bias - 100.0 * apart[:, None]

        images = torch.arange(len(tokens), device=tokens.device).repeat_interleave(
            torch.tensor(routing.lengths, device=tokens.device), output_size=len(cell)
        )
        dropout = attn.attn_drop.p if attn.training else 0.0
        attended = attend_in_groups(
            query * (attn.scale * query.shape[-1] ** 0.5),
            key,
            value,
            bias.type_as(query),
            images * len(windows.cells) + window[cell],
            dropout,
        )
        return attn.proj_drop(attn.proj(attended.flatten(1)))

    def window_macs(self, shape: tuple[int, int], ffn: nn.Module) -> tuple[int, int]:
        """As ``macs``, with the feed-forward network."""
        attn, places = self.window_attention, self.window[0] * self.window[1]
        rows, columns = (-(-side // length) for side, length in zip(shape, self.window))
        of_keys = 2 * weights(attn.qkv) // 3
        query = weights(attn.qkv) - of_keys + weights(attn.proj) + weights(ffn)
        return query + 2 * places * (attn.qkv.out_features // 3), rows * columns * places * of_keys


def attend_in_groups(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor, group: Tensor, dropout: float = 0.0
) -> Tensor:
    """Attention of each query to the keys of its group, without padding: groups of as many queries run together.

    Args:
        query: (N, heads, D).
        key, value: (G, heads, M, D).
        bias: (N, heads, M) that is added to the scores.
        group: (N) which group each query is of.
        dropout: rate of the attention's.

    Returns:
        (N, heads, D).
    """
    order, counts = group.argsort(stable=True), group.bincount(minlength=len(key))
    first = counts.cumsum(0) - counts
    outputs, rows = [], []
    for count in counts.unique().tolist():
        if count:
            groups = (counts == count).nonzero()[:, 0]
            members = order[first[groups][:, None] + torch.arange(count, device=group.device)]
            q, mask = query[members].transpose(1, 2), bias[members].transpose(1, 2)
            attended = F.scaled_dot_product_attention(q, key[groups], value[groups], mask, dropout)
            outputs.append(attended.transpose(1, 2).flatten(0, 1))
            rows.append(members.flatten())
    if not outputs:
        return query
    return torch.cat(outputs)[torch.cat(rows).argsort()]
