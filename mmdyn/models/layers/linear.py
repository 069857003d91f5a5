"""Linear layers, and pieces of rows that are small enough to stay in cache from one layer to the next."""
import math
from pathlib import Path
from typing import Callable, Iterable, Iterator, List, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula

# Types that oneDNN computes in on this CPU.
ONEDNN = set()
if torch.backends.mkldnn.is_available():
    ONEDNN = {torch.float32, torch.bfloat16} if torch.ops.mkldnn._is_mkldnn_bf16_supported() else {torch.float32}
# Numbers that a piece of rows has in memory.
PIECE = 2**20


def cpuinfo(field: str, file: Path = Path('/proc/cpuinfo')) -> str:
    """What Linux tells of the first processor, e.g. its ``model name``; '' where it does not."""
    lines = file.read_text().splitlines() if file.exists() else []
    values = (value.strip() for name, _, value in (line.partition(':') for line in lines) if name.strip() == field)
    return next(values, '')


def uses_onednn(x: Tensor, weight: Tensor, bias: Optional[Tensor] = None) -> bool:
    """Whether :func:`linear` calls oneDNN's operator: on a CPU, when nothing is recorded, traced or cast by autocast.

    ``torch.backends.mkldnn.enabled`` (``with torch.backends.mkldnn.flags(enabled=False)``) switches it off.
    """
    return bool(is_plain_inference(x, weight, weight if bias is None else bias) and x.device.type == 'cpu'
            and x.dtype == weight.dtype and x.dtype in ONEDNN and weight.numel() and torch._C._get_mkldnn_enabled()
            and (x.dtype == torch.bfloat16 or not torch.is_autocast_enabled('cpu')))


def is_plain_inference(*inputs: Tensor) -> bool:
    """Whether nothing that happens to the inputs is recorded for a backward pass, or traced, or transformed."""
    if (torch.compiler.is_compiling() or torch.jit.is_tracing() or forward_ad._current_level >= 0
            or torch._C._functorch.peek_interpreter_stack() is not None):
        return False
    return not (torch.is_grad_enabled() and (not inputs or any(x.requires_grad for x in inputs)))


def runs_in_pieces(x: Tensor) -> bool:
    """Whether functions of rows run on some of them at a time: in inference on a CPU, for the sake of its caches."""
    return x.device.type == 'cpu' and is_plain_inference()


def linear(x: Tensor, weight: Tensor, bias: Optional[Tensor] = None, gelu: bool = False) -> Tensor:
    """A linear layer, with a GELU behind it if ``gelu``: (..., C_in), (C_out, C_in), (C_out) -> (..., C_out).

    torch's float32 products on a CPU are MKL's, which on some CPUs does not use their widest instructions. oneDNN's do,
    and apply the GELU to what they have just computed.
    """
    if uses_onednn(x, weight, bias):
        bias = None if bias is None else bias.contiguous()
        return torch.ops.mkldnn._linear_pointwise(
            x, weight.contiguous(), bias, *(('gelu', [], 'none') if gelu else ('none', [], '')))
    x = F.linear(x, weight, bias)
    return F.gelu(x) if gelu else x


def _linear_flops(x_shape, weight_shape, *args, **kwargs) -> int:
    """Operations of oneDNN's operator, for torch's counter, which has no formula of its own."""
    return 2 * math.prod(x_shape) * weight_shape[0]


if ONEDNN:
    register_flop_formula(torch.ops.mkldnn._linear_pointwise)(_linear_flops)


def add_into(change: Tensor, x: Tensor) -> Tensor:
    """``change + x``, in the memory of ``change`` unless ``x`` is of a wider type."""
    return change.add_(x) if change.dtype == x.dtype else change + x


class Linear(nn.Linear):
    """``nn.Linear`` by :func:`linear`."""

    def forward(self, x: Tensor, gelu: bool = False) -> Tensor:
        return linear(x, self.weight, self.bias, gelu)


class StartLinear(nn.Module):
    """A linear layer that starts with weights of 0 and the given bias.

    It is no ``nn.Linear``, so that a model-wide initialisation of linear layers leaves it alone.
    """

    def __init__(self, dim: int, bias: Tensor):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(len(bias), dim))
        self.bias = nn.Parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def few_sizes(rows: int) -> int:
    """``rows``, rounded up by at most 1/32 to one of a few numbers: oneDNN prepares for each number that it meets."""
    step = min(2**max(rows.bit_length() - 6, 0), 64)
    return -(-rows // step) * step


def packed_pieces(lengths: List[int], count: int) -> Iterator[Tuple[slice, slice, List[int]]]:
    """Split the packed rows of images into pieces of about ``count`` rows or fewer: whole images, or parts of one.

    Args:
        lengths: rows of each image.
        count: rows of a piece.

    Yields:
        the piece's rows, its images, and the rows of each of them.
    """
    row = first = 0
    while first < len(lengths):
        last, total = first + 1, lengths[first]
        while last < len(lengths) and total + lengths[last] <= count:
            total, last = total + lengths[last], last + 1
        parts = max(-(-total // count), 1)
        size = few_sizes(-(-total // parts))
        for start in range(0, max(total, 1), max(size, 1)):
            end = min(start + size, total)
            yield slice(row + start, row + end), slice(first, last), lengths[first:last] if parts == 1 else [end - start]
        row, first = row + total, last


def by_pieces(function: Callable[..., Tensor], pieces: Iterable[tuple], count: int,
              into: Optional[Tensor] = None) -> Tensor:
    """The rows that ``function`` returns for each piece, put together: (count, C).

    Args:
        function: of a piece.
        pieces: what it takes, the slice of its rows first.
        count: rows of all pieces.
        into: (count, C) that they are added to instead, each as soon as it is known.
    """
    out = into
    for piece in pieces:
        part = function(*piece)
        if into is not None:
            into[piece[0]] += part
            continue
        if len(part) == count:
            return part
        out = part.new_empty(count, *part.shape[1:]) if out is None else out
        out[piece[0]] = part
    return out


def by_pieces_of_rows(function: Callable[[Tensor], Tensor], x: Tensor, width: int) -> Tensor:
    """``function`` of the rows of (..., C), each by itself, in pieces where that helps.

    Args:
        function: e.g. a feed-forward network.
        x: (..., C).
        width: numbers that the function has in memory for each row.
    """
    count = PIECE // max(width, 1)
    if not runs_in_pieces(x) or x.numel() <= count * x.shape[-1]:
        return function(x)
    rows = x.flatten(0, -2)
    pieces = ((piece, ) for piece, _, _ in packed_pieces([len(rows)], count))
    return by_pieces(lambda piece: function(rows[piece]), pieces, len(rows)).unflatten(0, x.shape[:-1])
