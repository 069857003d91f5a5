"""What kinds of attention have in common."""
from typing import Dict, Iterator, List, Optional, Sequence, Tuple

from torch import Tensor, nn

from ..dge.grains import candidate_centres
from .linear import by_pieces, packed_pieces, runs_in_pieces

# Most numbers and most queries in a piece. Wide layers gain from many numbers; in narrow ones so many take memory that
# the allocator gives back to the system after each layer.
NUMBERS, ROWS = 2**20, 2**12


class AttentionBase(nn.Module):
    """What attention layers share: they take queries and tokens, which may be the same.

    ``uses_points`` tells whether the places of the queries count, or the content of the tokens alone, and
    ``keeps_class_attention`` whether :meth:`attend` must see the queries of an image together.
    """
    uses_points = False
    keeps_class_attention = False
    num_points = 0

    def compiled_layers(self, shape: Tuple[int, int], num_extra: int) -> Optional[Dict[str, nn.Module]]:
        """Those of :class:`~mmdyn.models.native.encoder.Layers` that are the attention's, if they are all there is to it.

        Args:
            shape: (H, W).
            num_extra: E.

        Returns:
            None if :meth:`keys_values` and :meth:`attend` must be called.
        """
        return None

    def keys_values(self, tokens: Tensor, shape: Tuple[int, int], num_extra: int = 0,
                    norm: Optional[nn.Module] = None) -> Tuple[Tensor, ...]:
        """What queries attend to: tensors with a first dimension of images.

        Args:
            tokens: (B, E + H*W, C).
            shape: (H, W).
            num_extra: E.
            norm: norm of the tokens, if they still need it.
        """
        raise NotImplementedError

    def attend(self, queries: Tensor, memory: Tuple[Tensor, ...], shape: Tuple[int, int], lengths: List[int],
               points: Optional[Tensor] = None) -> Tensor:
        """From queries to what :meth:`keys_values` returned.

        Args:
            queries: packed (N, C).
            memory: of the images.
            shape: (H, W).
            lengths: queries of each of the B images; they sum to N.
            points: (N, 2), the queries' places: x and y in cells, where ``uses_points``.

        Returns:
            (N, C).
        """
        raise NotImplementedError

    def forward(self, queries: Tensor, tokens: Tensor, shape: Tuple[int, int], lengths: Optional[List[int]] = None,
                num_extra: int = 0, points: Optional[Tensor] = None) -> Tensor:
        """Attend from the queries to the tokens.

        Args:
            queries: (B, n, C), or packed (N, C) with the ``lengths`` of the images.
            tokens: (B, E + H*W, C).
            shape: (H, W).
            num_extra: E.
            points: (n, 2) or (N, 2), the queries' places, where ``uses_points``. Default to the cells' own.

        Returns:
            as ``queries``.
        """
        packed, lengths, points = self.pack(queries, shape, lengths, points)
        memory = self.keys_values(tokens, shape, num_extra)
        if not self.runs_in_pieces(packed):
            return self.attend(packed, memory, shape, lengths, points).view_as(queries)
        return by_pieces(lambda rows, memory, *of_rows: self.attend(packed[rows], memory, shape, *of_rows),
                         self.pieces(packed, memory, lengths, points), len(packed)).view_as(queries)

    def runs_in_pieces(self, packed: Tensor) -> bool:
        """Whether packed queries (N, C) attend some at a time."""
        num, dim = packed.shape
        return num > self.rows_of_piece(dim) and runs_in_pieces(packed) and not self.keeps_class_attention

    @staticmethod
    def rows_of_piece(dim: int) -> int:
        """Packed queries of ``dim`` channels in a piece."""
        return min(max(NUMBERS // dim, 1), ROWS)

    def pieces(self, packed: Tensor, memory: Sequence[Tensor], lengths: List[int],
               points: Optional[Tensor]) -> Iterator[tuple]:
        """Pieces of packed queries (N, C): their rows, memory, lengths and points."""
        for rows, images, of_images in packed_pieces(lengths, self.rows_of_piece(packed.shape[1])):
            yield rows, [x[images] for x in memory], of_images, None if points is None else points[rows]

    def pack(self, queries: Tensor, shape: Tuple[int, int], lengths: Optional[List[int]],
             points: Optional[Tensor]) -> Tuple[Tensor, List[int], Optional[Tensor]]:
        """Queries, lengths and points as :meth:`attend` takes them, from what :meth:`forward` takes."""
        if self.uses_points and points is None:
            points = candidate_centres(shape, (1, ), queries.device)
        if lengths is not None:
            return queries, lengths, points
        images, num = queries.shape[:2]
        points = points.repeat(images, 1) if self.uses_points and images > 1 else points
        return queries.flatten(0, 1), [num] * images, points
