"""Routers that nobody trains: rivals of the linear one, and DGE off the shelf.

Each tells what a region would lose by a granularity, in logits that are 0 for the finest and fall from there. So each
region takes the finest, until a budget is set. They hold that budget in training as well.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..thread_local import ThreadLocal
from .routing import grid, pool, unpool

BINS = 32  # of the histogram of an image's intensities


class SeenImages:
    """The images of a thread's pass, and the entropies of their regions, which all layers share."""

    _images: ThreadLocal[Tensor] = ThreadLocal()
    _known: ThreadLocal[dict[tuple[tuple[int, int], int], Tensor]] = ThreadLocal()

    def see(self, images: Tensor) -> None:
        """Called before each pass with images (B, C, H, W)."""
        self._images, self._known = images.detach(), {}

    def entropy(self, shape: tuple[int, int], region: int) -> Tensor:
        """Bits of a pixel's intensity in each region of a map of ``shape`` (h, w): (B, rows, columns).

        Intensities are means of the channels, in :data:`BINS` steps from the least to the greatest of an image.

        Raises:
            ValueError: if no images were seen.
        """
        if self._images is None or self._known is None:
            raise ValueError(
                "dge router='entropy' looks at the images, but the blocks were called without: call the backbone."
            )
        if (shape, region) not in self._known:
            grey = self._images.float().mean(1, keepdim=True)
            least, most = grey.amin((1, 2, 3), keepdim=True), grey.amax((1, 2, 3), keepdim=True)
            steps = ((grey - least) / (most - least).clamp(min=1e-12) * BINS).long().clamp(max=BINS - 1)
            shares = torch.cat([F.adaptive_avg_pool2d((steps == step).float(), shape) for step in range(BINS)], 1)
            shares = pool(shares.flatten(2).transpose(1, 2), shape, region)
            self._known[shape, region] = -torch.special.xlogy(shares, shares).sum(-1) / math.log(2)
        return self._known[shape, region]


class UntrainedRouter(nn.Module):
    """Base of the routers without weights.

    Args:
        dim: channels.
        granularities: the K sides of patches.

    Attributes:
        price, training_price, share: as those of :class:`~mmdyn.models.dge.router.Router`.
        images: what a router that looks at the images sees them by; None for others.
    """

    price: Tensor | None
    training_price: Tensor | None
    is_trained = False

    def __init__(self, dim: int, granularities: Sequence[int]):
        super().__init__()
        self.dim, self.granularities = dim, tuple(granularities)
        self.register_buffer('price', None, persistent=False)
        self.register_buffer('training_price', None, persistent=False)
        self.share: float | None = None
        self.images: SeenImages | None = None

    def logits(self, tokens: Tensor, shape: tuple[int, int], region: int, num_extra: int) -> Tensor:
        """(B, E + H*W, C) tokens -> (B, rows, columns, K), what each region loses by each granularity, negative."""
        raise NotImplementedError

    def macs(self, shape: tuple[int, int], region: int) -> int:
        """Multiply-adds of an image with a map of ``shape``: products of channels alone are counted."""
        return 0

    def _by_detail(self, detail: Tensor, region: int) -> Tensor:
        """Each doubling of a patch's side loses the detail (B, rows, columns) of its region; so does leaving it out."""
        finest = next(phi for phi in self.granularities if phi)
        doublings = [math.log2((phi or 2 * region) / finest) for phi in self.granularities]
        return -detail[..., None] * detail.new_tensor(doublings)


class RandomRouter(UntrainedRouter):
    """Regions differ by chance, anew in each layer and pass: what any other router has to beat."""

    def logits(self, tokens: Tensor, shape: tuple[int, int], region: int, num_extra: int) -> Tensor:
        return self._by_detail(torch.rand(len(tokens), *grid(region, shape), device=tokens.device), region)


class EntropyRouter(UntrainedRouter):
    """Regions differ by the entropy of the image's pixels below them, the same for all layers of a resolution."""

    def __init__(self, dim: int, granularities: Sequence[int]):
        super().__init__(dim, granularities)
        self.images = SeenImages()

    def logits(self, tokens: Tensor, shape: tuple[int, int], region: int, num_extra: int) -> Tensor:
        assert self.images is not None
        return self._by_detail(self.images.entropy(shape, region), region)


class CorrelationRouter(UntrainedRouter):
    """Section 3.1 of the paper: tokens that correlate with the mean of their patch can be served by it.

    A region loses by a granularity what the Pearson correlations of its tokens with their patches' means lack of 1, on
    average over the tokens.
    """

    def logits(self, tokens: Tensor, shape: tuple[int, int], region: int, num_extra: int) -> Tensor:
        cells = tokens[:, num_extra:].float()
        centred, losses = cells.unflatten(1, shape) - cells.unflatten(1, shape).mean(-1, keepdim=True), []
        for phi in self.granularities:
            loss = cells.new_ones(len(cells), *shape)
            if phi:
                means = unpool(pool(cells, shape, phi), phi, shape)
                loss = loss - F.cosine_similarity(centred, means - means.mean(-1, keepdim=True), dim=-1)
            losses.append(loss)
        return -pool(torch.stack(losses, -1).flatten(1, 2), shape, region)

    def macs(self, shape: tuple[int, int], region: int) -> int:
        return 3 * math.prod(shape) * self.dim * sum(phi > 1 for phi in self.granularities)
