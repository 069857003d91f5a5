"""Linear projections of patches."""
import math
from typing import Optional, Tuple

import torch
from torch import Tensor, nn

from ..native import encoder as compiled
from .linear import PIECE, add_into, by_pieces, linear, packed_pieces, runs_in_pieces
from .position import Positions


class PatchProjection(nn.Conv2d):
    """A convolution of non-overlapping patches, as a linear layer of each: (B, C_in, H, W) -> (B, h*w, C_out), (h, w).

    What remains of a side that is no multiple of the patch's is left out. The weights are those of ``nn.Conv2d``.

    Args:
        in_channels, out_channels: channels.
        side: side of a patch.
        of_tokens: whether the maps are tokens, whose channels lie side by side in memory. So do the weights' then.
    """

    def __init__(self, in_channels: int, out_channels: int, side: int, of_tokens: bool):
        super().__init__(in_channels, out_channels, side, side)
        if of_tokens:
            self.to(memory_format=torch.channels_last)
        self.of_tokens = of_tokens

    def forward(self, maps: Tensor, before: Optional[nn.Module] = None, after: Optional[nn.Module] = None,
                positions: Optional[Positions] = None) -> Tuple[Tensor, Tuple[int, int]]:
        """``before`` and ``after`` are run on the last dimension, e.g. norms, on pieces that stay in cache.

        In the end ``positions`` are added, if they are given.
        """
        side = self.kernel_size[0]
        height, width = maps.shape[2] // side, maps.shape[3] // side
        if compiled.takes(maps[:1, :1, :1, :1]):
            tokens = compiled.project(maps.permute(0, 2, 3, 1), self.weight.permute(0, 2, 3, 1), self.bias, before, after,
                                      positions)
            if tokens is not None:
                return tokens, (height, width)
        # (B, h, w, C_in, side, side)
        if maps.shape[2:] != (height * side, width * side):
            maps = maps[:, :, :height * side, :width * side]
        patches = maps.unflatten(3, (width, side)).unflatten(2, (height, side)).permute(0, 2, 4, 1, 3, 5)
        count = max(PIECE // math.prod(patches.shape[2:]), 1)

        def run(rows, images, _):
            top, num = rows.start - images.start * height, (rows.stop - rows.start) // (images.stop - images.start)
            return self._project(patches[images, top:top + num], before, after).flatten(0, 1)

        if not runs_in_pieces(maps) or len(maps) * height <= count:
            tokens = self._project(patches, before, after)
        else:
            tokens = by_pieces(run, packed_pieces([height] * len(maps), count), len(maps) * height)
        tokens = tokens.view(len(maps), height * width, -1)
        if positions is not None:
            tokens = add_into(tokens, positions.resized((height, width)))
        return tokens, (height, width)

    def _project(self, patches: Tensor, before: Optional[nn.Module], after: Optional[nn.Module]) -> Tensor:
        """(B, h, w, C_in, side, side) -> (B, h, w, C_out)."""
        weight = self.weight
        if self.of_tokens:
            patches, weight = patches.permute(0, 1, 2, 4, 5, 3), weight.permute(0, 2, 3, 1)
        patches = patches if before is None else before(patches)
        tokens = linear(patches.flatten(3), weight.flatten(1), self.bias)
        return tokens if after is None else after(tokens)
