"""From images to tokens."""
import math
from typing import Optional, Tuple

import torch.nn as nn
from torch import Tensor

from ..native import encoder as compiled
from .patches import PatchProjection
from .position import Positions


def check_side(x: Tensor, patch: int) -> None:
    """Raise ValueError for a (B, C, H, W) input that holds no patch."""
    if min(x.shape[-2:]) < patch:
        raise ValueError(f'An input of {x.shape[-2]} x {x.shape[-1]} is smaller than one patch of {patch} x {patch}: '
                         'use larger images.')


class PatchEmbed(nn.Module):
    """Non-overlapping patches, projected linearly: (B, C_in, H, W) -> (B, h*w, C) and (h, w) = (H//patch, W//patch).

    Args:
        in_channels: channels of the input map.
        dim: channels of the tokens.
        patch_size: side of a patch.
        norm: whether a LayerNorm follows.
        norm_eps: its epsilon.
        of_tokens: whether the input is tokens in the form of a map, and no image.
    """

    def __init__(self, in_channels: int, dim: int, patch_size: int, norm: bool = True, norm_eps: float = 1e-6,
                 of_tokens: bool = False):
        super().__init__()
        self.proj = PatchProjection(in_channels, dim, patch_size, of_tokens)
        self.norm = nn.LayerNorm(dim, norm_eps) if norm else nn.Identity()

    def forward(self, x: Tensor, positions: Optional[Positions] = None) -> Tuple[Tensor, Tuple[int, int]]:
        """``positions`` are added to the tokens."""
        check_side(x, self.proj.kernel_size[0])
        return self.proj(x, after=self.norm, positions=positions)

    def macs(self, shape: Tuple[int, int]) -> int:
        """Multiply-adds of an image whose tokens form a map of ``shape``."""
        return math.prod(shape) * self.proj.weight.numel()


class ConvStem(nn.Module):
    """LV-ViT's patch embedding: three convolutions at half the resolution, then a projection of what remains.

    (B, C_in, H, W) -> (B, h*w, C) and (h, w) = (H//patch, W//patch).

    Args:
        in_channels: channels of the images.
        dim: channels of the tokens.
        patch_size: side of a patch, an even number.
        width: channels of the convolutions.
    """

    def __init__(self, in_channels: int, dim: int, patch_size: int = 16, width: int = 64):
        super().__init__()
        if patch_size % 2:
            raise ValueError(f'patch_size={patch_size}: the stem halves the resolution first, give an even number.')
        self.convs = nn.Sequential()
        for kernel, stride in ((7, 2), (3, 1), (3, 1)):
            self.convs.extend([
                nn.Conv2d(in_channels, width, kernel, stride, kernel // 2, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(inplace=True)
            ])
            in_channels = width
        self.proj = PatchProjection(width, dim, patch_size // 2, of_tokens=False)

    def forward(self, x: Tensor) -> Tuple[Tensor, Tuple[int, int]]:
        side = self.proj.kernel_size[0]
        check_side(x, 2 * side)
        # Half of an odd number is rounded up, and may hold one patch more.
        height, width = (pixels // (2 * side) * side for pixels in x.shape[-2:])
        return self.proj(self.convs(x)[..., :height, :width])

    def macs(self, shape: Tuple[int, int]) -> int:
        """Multiply-adds of an image whose tokens form a map of ``shape``."""
        convs = sum(module.weight.numel() for module in self.convs if isinstance(module, nn.Conv2d))
        return math.prod(shape) * (self.proj.kernel_size[0]**2 * convs + self.proj.weight.numel())


def to_maps(tokens: Tensor, shape: Tuple[int, int]) -> Tensor:
    """(B, h*w, C) -> (B, C, h, w), contiguous, because mmcv's RoIAlign reads the memory of what necks make of it."""
    maps = compiled.transpose_tokens(tokens)
    if maps is None:
        # torch transposes a matrix faster than a batch of one.
        maps = tokens[0].t().contiguous()[None] if len(tokens) == 1 else tokens.transpose(1, 2).contiguous()
    return maps.unflatten(2, shape)
