"""What models do otherwise while a tracer records them: numbers that depend on the images must not become constants."""

import torch
from torch import Tensor

TELLS_EXPORTS = hasattr(torch.compiler, 'is_exporting')  # since torch 2.7


def is_exported() -> bool:
    """Whether torch.export records this pass, on tensors without values."""
    if TELLS_EXPORTS:
        return torch.compiler.is_exporting()
    return torch.compiler.is_compiling() and not torch.compiler.is_dynamo_compiling()  # but for strict exports


def is_traced() -> bool:
    """Whether torch.export or torch.jit records this pass, as exporters to ONNX and counters of operations have it."""
    return torch.jit.is_tracing() or is_exported()


def refuse_onnx_by_torchscript(what: str) -> None:
    """Stop torch's older exporter to ONNX, whose graphs would be of one image, and wrong for others.

    Args:
        what: cannot be expressed.

    Raises:
        RuntimeError: if it is this exporter that records; it names the other.
    """
    if torch.jit.is_tracing() and torch.onnx.is_in_onnx_export():
        raise RuntimeError(
            f'torch.onnx.export(..., dynamo=False) cannot express {what}: write dynamo=True, or count operations with '
            'tools/analysis_tools/get_flops.py.'
        )


def to_integers(counts: Tensor) -> list[int]:
    """As ``counts.tolist()``, but torch.jit would take integers for constants: there, tensors of no dimension.

    Raises:
        RuntimeError: in an export, for a number of counts that is left open, or by a torch that cannot export them.
    """
    if torch.jit.is_tracing():
        return list(counts.unbind())
    if is_exported() and not TELLS_EXPORTS:
        raise RuntimeError(
            f'torch {torch.__version__} exports no numbers of queries that DGE chooses: install torch 2.7 or newer, or '
            'give the model an exact budget, which makes them known, by model.set_budget(0.5).'
        )
    if is_exported() and isinstance(counts.shape[0], torch.SymInt):
        raise RuntimeError(
            'A model with DGE is exported for a fixed number of images, each of which has its own number of queries: '
            'leave the first dimension out of dynamic_shapes.'
        )
    return counts.tolist()


def image_of_each(lengths: list[int], num: int, device: torch.device) -> Tensor:
    """The number of the image that each of ``num`` packed queries belongs to: (N,), ascending."""
    if is_traced():
        return torch.cat([torch.full((length,), image, device=device) for image, length in enumerate(lengths)])
    images = torch.arange(len(lengths), device=device)
    if len(set(lengths)) == 1:  # which need not be copied to an accelerator
        return images.repeat_interleave(lengths[0])
    counts = torch.tensor(lengths, dtype=torch.long, device=device)
    return images.repeat_interleave(counts, output_size=num)
