"""Backbones with random weights, and the passes of them that are timed and traced."""

from collections.abc import Callable, Collection

import torch
from torch import Tensor, nn

from ..models import DPVT, PVT, DeiT
from ..models.layers import DeformableAttention
from ..values import check_type

FAMILIES = dict(PVT=PVT, DPVT=DPVT, DeiT=DeiT)
# What a pass computes in by autocast. TF32 is float32, of which CUDA rounds the factors of products.
AUTOCAST = dict(float32=None, tf32=None, bfloat16=torch.bfloat16, float16=torch.float16)


def family_and_size(name: str, allowed: Collection[str] = FAMILIES) -> tuple[str, str]:
    """The parts of a name such as PVT-small.

    Raises:
        ValueError: if it has others, or a family that is not ``allowed``.
    """
    check_type('name', name, str, 'FAMILY-SIZE')
    family, _, size = name.partition('-')
    if family not in allowed or not size or '-' in size:
        raise ValueError(
            f'{name}: give FAMILY-SIZE with a FAMILY of {", ".join(allowed)}, e.g. {next(iter(allowed))}-small.'
        )
    return family, size


def build(name: str, img_size: tuple[int, int], **dge) -> nn.Module:
    """A backbone in evaluation mode, whose weights depend on its architecture alone.

    Args:
        name: FAMILY-SIZE.
        img_size: (height, width) of its position embeddings, in pixels.
        dge: options of DGE; it has none without.
    """
    family, size = family_and_size(name)
    torch.manual_seed(0)
    options = {} if family == 'DeiT' else dict(embed_norm_eps=1e-6)  # as mmdet's PVT has it
    model = FAMILIES[family](size, img_size=img_size, dge=dge or None, **options).eval()
    for module in model.modules():
        if isinstance(module, DeformableAttention):  # a fresh one samples at centres of cells, a trained one anywhere
            nn.init.normal_(module.offsets.weight, std=0.05)
            nn.init.normal_(module.attn_weight.weight, std=0.05)
    return model


def precision(images: Tensor, autocast: torch.dtype | None) -> torch.autocast:
    """Autocast to a type, or as the weights are."""
    return torch.autocast(images.device.type, autocast or torch.bfloat16, enabled=autocast is not None)


def round_products(to_tf32: bool) -> None:
    """Let CUDA round the float32 factors of products and convolutions to TF32, or not."""
    torch.set_float32_matmul_precision('high' if to_tf32 else 'highest')
    torch.backends.cudnn.allow_tf32 = to_tf32


def inference(call: Callable, images: Tensor, autocast: torch.dtype | None) -> Callable[[], object]:
    """A function that runs one forward pass, under autocast to a type if one is given."""

    def run():
        with torch.inference_mode(), precision(images, autocast):
            return call(images)

    return run


def training_step(model: nn.Module, images: Tensor, autocast: torch.dtype | None) -> Callable[[], None]:
    """A function that runs one forward and backward pass, and leaves no gradients."""
    model.train()

    def step():
        with precision(images, autocast):
            loss = sum(out.float().pow(2).mean() for out in model(images))
        loss.backward()
        model.zero_grad()

    return step
