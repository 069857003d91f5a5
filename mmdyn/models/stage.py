"""The encoder blocks of a stage, one after another."""

from typing import Protocol

from torch import Tensor, nn

from .replaceable import replaceable


class Stage(Protocol):
    """What the blocks of one resolution need to run; a plain ViT is one such stage itself.

    Attributes:
        blocks: the encoder blocks.
        dge: for each block a :class:`~mmdyn.models.dge.DynamicGrainedEncoder`, or None if it stays dense; empty for the
            dense model.
        num_extra: extra tokens, such as a class token, in front of the map's.
        patch_embed: makes the tokens; its ``macs(shape)`` are its multiply-adds.
    """

    blocks: nn.ModuleList
    dge: nn.ModuleList
    num_extra: int
    patch_embed: nn.Module


@replaceable
def run_blocks(
    stage: Stage,
    tokens: Tensor,
    shape: tuple[int, int],
    start: int = 0,
    stop: int | None = None,
    class_rows: list[Tensor] | None = None,
) -> Tensor:
    """Run the blocks ``start`` to ``stop`` of a stage, each with its DGE if there is any.

    The caller gives its tokens up: what stands in for this function may overwrite them.

    Args:
        stage: see :class:`Stage`.
        tokens: (B, E + H*W, C), the E = ``stage.num_extra`` extra tokens first.
        shape: (H, W) of the map.
        start, stop: as in a slice of the blocks.
        class_rows: a list that is given the class attention of each block without DGE, see
            :class:`~mmdyn.models.layers.Attention`.

    Returns:
        (B, E + H*W, C).
    """
    for index in range(len(stage.blocks))[start:stop]:
        block, encoder = stage.blocks[index], stage.dge[index] if len(stage.dge) else None
        if encoder is None:
            options = {} if class_rows is None else dict(class_rows=class_rows)
            tokens = block(tokens, tokens, shape, stage.num_extra, **options)
        else:
            tokens = encoder(block, tokens, shape, stage.num_extra)
    return tokens
