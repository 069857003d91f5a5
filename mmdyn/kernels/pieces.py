"""The encoder blocks of a stage in inference on any CPU: pieces of rows that stay in cache, and products by oneDNN.

torch's float32 products on a CPU are MKL's, which on some CPUs do not use their widest instructions. oneDNN's do, and
apply the GELU to what they have just computed.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.dge import Decision, DynamicGrainedEncoder, route
from ..models.dge.router import choose
from ..models.dge.routing import centres, grid
from ..models.layers import EncoderBlock, deformable_sampling, packed_attention
from ..models.layers.attention import class_attention
from ..models.replaceable import Refused
from ..models.stage import Stage, run_blocks
from .prepared import Refusal
from .stage import layers_of

# Numbers of a piece in memory, and most rows: wide layers gain from many numbers, narrow ones do not.
NUMBERS, ROWS = 2**20, 2**12


def few_sizes(rows: int) -> int:
    """``rows``, rounded up by at most 1/32 to one of a few numbers: oneDNN prepares for each number that it meets."""
    step = min(2 ** max(rows.bit_length() - 6, 0), 64)
    return -(-rows // step) * step


def linear(x: Tensor, layer: nn.Linear, gelu: bool = False) -> Tensor:
    """A linear layer, with a GELU behind it if ``gelu``: (..., C_in) -> (..., C_out)."""
    return torch.ops.mkldnn._linear_pointwise(
        x, layer.weight, layer.bias, *(('gelu', [], 'none') if gelu else ('none', [], ''))
    )


@run_blocks.register
def run_in_pieces(
    stage: Stage,
    tokens: Tensor,
    shape: tuple[int, int],
    start: int = 0,
    stop: int | None = None,
    class_rows: list[Tensor] | None = None,
) -> Tensor | Refused:
    """:func:`~mmdyn.models.stage.run_blocks` in the memory of the tokens."""
    if not (torch.backends.mkldnn.is_available() and torch._C._get_mkldnn_enabled()):
        return Refused('oneDNN is switched off, or torch was built without it')
    if torch.is_autocast_enabled('cpu'):
        return Refused('autocast is on')
    try:
        layers = layers_of(stage, tokens, shape, start, stop, class_rows is not None)
    except Refusal as refusal:
        return Refused(str(refusal))
    for block, _, _ in layers:
        if type(block) is not EncoderBlock:
            return Refused(f'a block is a {type(block).__name__}, not an EncoderBlock')
    for block, encoder, _ in layers:
        tokens = encode(block, encoder, tokens, shape, stage.num_extra, class_rows)
    return tokens


def encode(
    block: EncoderBlock,
    encoder: DynamicGrainedEncoder | None,
    tokens: Tensor,
    shape: tuple[int, int],
    num_extra: int,
    class_rows: list[Tensor] | None = None,
) -> Tensor:
    """One block on tokens (B, E + H*W, C), which it changes."""
    images, size, channels = tokens.shape
    keys_values = _keys_values(block, tokens, shape, num_extra)
    places = centres(shape, tokens.device).expand(images, -1, -1) if block.uses_points else None
    rows = tokens.view(-1, channels)
    if class_rows is not None:
        query = linear(block.norm1(tokens[:, 0]), block.attn.q).unflatten(-1, (block.attn.num_heads, -1))
        class_rows.append(class_attention(query, keys_values[0]))
    if encoder is None:
        points = None if places is None else places.flatten(0, 1)
        for piece, change in _changes(block, rows, [size] * images, shape, keys_values, points):
            rows[piece] += change
        return tokens
    choice = choose(encoder.router, tokens, shape, encoder.decision_side(shape), num_extra)
    choice = (choice if encoder.forced is None else encoder.forced).expand(images, *grid(encoder.region, shape))
    routing = route(choice, shape, encoder.granularities, encoder.region, num_extra)
    num, lengths = sum(routing.lengths), routing.lengths.copy()
    encoder.decision = Decision(choice, torch.tensor(routing.lengths, device='cpu'))
    surplus = few_sizes(num) - num
    lengths[-1] += surplus  # queries of zeros, which serve no token
    queries = F.pad(routing.compress(tokens), (0, 0, 0, surplus))
    points = None if places is None else F.pad(routing.compress(places), (0, 0, 0, surplus))
    changes = queries.new_zeros(len(queries) + 1, channels)
    for piece, change in _changes(block, queries, lengths, shape, keys_values, points):
        changes[piece] = change
    changes[num] = 0  # of tokens without a query
    index = routing.query.flatten()
    for part, query in zip(rows.split(NUMBERS // channels), index.split(NUMBERS // channels)):
        part += changes.index_select(0, query)
    return tokens


def _keys_values(block: EncoderBlock, tokens: Tensor, shape: tuple[int, int], num_extra: int) -> tuple[Tensor, ...]:
    """What the queries attend to: tensors with a first dimension of images."""
    attn, normed = block.attn, block.norm1(tokens)
    if block.uses_points:
        return (linear(normed, attn.v).unflatten(-1, (attn.num_heads, -1)),)
    key_value = linear(attn.reduce(normed, shape, num_extra), attn.kv)
    return tuple(key_value.unflatten(-1, (2, attn.num_heads, -1)).permute(2, 0, 3, 1, 4))


def _pieces(lengths: list[int], count: int) -> Iterator[tuple[slice, slice, list[int]]]:
    """Split the packed rows of images into pieces of about ``count`` rows or fewer: whole images, or parts of one.

    Yields:
        the piece's rows, its images, and the rows of each of them.
    """
    row = first = 0
    while first < len(lengths):
        last, total = first + 1, lengths[first]
        while last < len(lengths) and total + lengths[last] <= count:
            total, last = total + lengths[last], last + 1
        parts = max(-(-total // count), 1)
        size = max(few_sizes(-(-total // parts)), 1)
        for start in range(0, total, size):
            end = min(start + size, total)
            yield (
                slice(row + start, row + end),
                slice(first, last),
                lengths[first:last] if parts == 1 else [end - start],
            )
        row, first = row + total, last


def _changes(
    block: EncoderBlock,
    queries: Tensor,
    lengths: list[int],
    shape: tuple[int, int],
    keys_values: tuple[Tensor, ...],
    points: Tensor | None,
) -> Iterator[tuple[slice, Tensor]]:
    """The rows of pieces of packed queries (N, C), and what the block adds to them."""
    attn, ffn, scale = block.attn, block.ffn, block.residual_scale
    for piece, images, of_images in _pieces(lengths, min(max(NUMBERS // queries.shape[1], 1), ROWS)):
        query, memory = queries[piece], [x[images] for x in keys_values]
        normed = block.norm1(query)
        if points is None:
            heads = linear(normed, attn.q).unflatten(-1, (attn.num_heads, -1))
            attended = packed_attention.plain(heads, *memory, of_images).flatten(1)
        else:
            offsets = linear(normed, attn.offsets).unflatten(-1, (attn.num_heads, attn.num_points, 2))
            weights = linear(normed, attn.attn_weight).unflatten(-1, (attn.num_heads, attn.num_points)).softmax(-1)
            attended = deformable_sampling(*memory, points[piece, None, None] + offsets, weights, shape, of_images)
        attended = linear(attended, attn.proj).mul_(scale)
        change = linear(linear(block.norm2(query + attended), ffn.fc1, gelu=True), ffn.fc2).mul_(scale)
        yield piece, change.add_(attended)
