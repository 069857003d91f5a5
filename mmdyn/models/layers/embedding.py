"""From images to tokens, and from tokens to maps."""

import math

import torch
from torch import Tensor, nn

from ...values import MOST, check_choice, check_integer, check_number, is_integer
from ..replaceable import replaceable
from .macs import macs_of
from .position import Positions


def check_side(x: Tensor, patch: int) -> None:
    """Raise ValueError for a (B, C, H, W) input that holds no patch."""
    if min(x.shape[-2:]) < patch:
        raise ValueError(
            f'An input of {x.shape[-2]} x {x.shape[-1]} is smaller than one patch of {patch} x {patch}: '
            'use larger images.'
        )


@replaceable
def project_patches(maps: Tensor, proj: nn.Module, norm: nn.Module, positions: Positions | None = None) -> Tensor:
    """A convolution of patches, a norm, and position embeddings: (B, C_in, H, W) -> (B, h*w, C).

    Args:
        maps: images, or tokens in the form of a map.
        proj: the convolution, whose stride is its kernel's side.
        norm: of the last dimension.
        positions: what is added in the end.
    """
    maps = proj(maps)
    tokens = norm(maps.flatten(2).transpose(1, 2))
    return tokens if positions is None else tokens + positions.resized(tuple(maps.shape[-2:]))


class PatchEmbed(nn.Module):
    """Non-overlapping patches, projected linearly: (B, C_in, H, W) -> (B, h*w, C) and (h, w) = (H//patch, W//patch).

    What remains of a side that is no multiple of the patch's is left out.

    Args:
        in_channels: channels of the input map.
        dim: channels of the tokens.
        patch_size: side of a patch.
        norm: whether a LayerNorm follows.
        norm_eps: its epsilon.
        of_tokens: whether the input is tokens in the form of a map, whose channels lie side by side, and no image.
    """

    def __init__(
        self,
        in_channels: int,
        dim: int,
        patch_size: int,
        norm: bool = True,
        norm_eps: float = 1e-5,
        of_tokens: bool = False,
    ):
        super().__init__()
        for name, value in (('in_channels', in_channels), ('dim', dim), ('patch_size', patch_size)):
            check_integer(name, value, 1, MOST)
        check_number('norm_eps', norm_eps, '(0, inf)')
        for name, value in (('norm', norm), ('of_tokens', of_tokens)):
            check_choice(name, value, (True, False))
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_channels, dim, patch_size, patch_size)
        if of_tokens:
            self.proj.to(memory_format=torch.channels_last)
        self.norm = nn.LayerNorm(dim, norm_eps) if norm else nn.Identity()

    def forward(self, x: Tensor, positions: Positions | None = None) -> tuple[Tensor, tuple[int, int]]:
        """``positions`` are added to the tokens."""
        check_side(x, self.patch_size)
        tokens = project_patches(x, self.proj, self.norm, positions)
        return tokens, (x.shape[2] // self.patch_size, x.shape[3] // self.patch_size)

    def macs(self, shape: tuple[int, int]) -> int:
        """Multiply-adds of an image whose tokens form a map of ``shape``."""
        return math.prod(shape) * macs_of(self.proj)


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
        for name, value in (('in_channels', in_channels), ('dim', dim), ('width', width)):
            check_integer(name, value, 1, MOST)
        if not is_integer(patch_size, 2, MOST) or patch_size % 2:
            raise ValueError(f'patch_size={patch_size!r}: the stem halves the resolution first, give an even number.')
        self.convs = nn.Sequential()
        for kernel, stride in ((7, 2), (3, 1), (3, 1)):
            self.convs.extend(
                [
                    nn.Conv2d(in_channels, width, kernel, stride, kernel // 2, bias=False),
                    nn.BatchNorm2d(width),
                    nn.ReLU(inplace=True),
                ]
            )
            in_channels = width
        self.patch_size = patch_size
        self.proj = nn.Conv2d(width, dim, patch_size // 2, patch_size // 2)

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        check_side(x, self.patch_size)
        shape = tuple(pixels // self.patch_size for pixels in x.shape[-2:])
        # Half of an odd number is rounded up, and may hold one patch more.
        height, width = (side * self.patch_size // 2 for side in shape)
        return project_patches(self.convs(x)[..., :height, :width], self.proj, nn.Identity()), shape

    def macs(self, shape: tuple[int, int]) -> int:
        """Multiply-adds of an image whose tokens form a map of ``shape``."""
        convs = sum(module.weight.numel() for module in self.convs if isinstance(module, nn.Conv2d))
        return math.prod(shape) * ((self.patch_size // 2) ** 2 * convs + macs_of(self.proj))


@replaceable
def to_maps(tokens: Tensor, shape: tuple[int, int]) -> Tensor:
    """(B, h*w, C) -> (B, C, h, w), contiguous, because mmcv's RoIAlign reads the memory of what necks make of it."""
    return tokens.transpose(1, 2).contiguous().unflatten(2, shape)
