"""Pictures of the routing, in the colours of the DGE paper's figure 4."""

from collections.abc import Sequence

import cv2
import numpy as np

from ..models.dge import DynamicGrainedEncoder, check_granularities, share_within_images
from ..values import check_number

# RGB for the granularities from fine to coarse; black for skipped regions.
COLOURS = ((230, 60, 60), (60, 200, 80), (60, 100, 230), (230, 200, 60), (180, 80, 200))


def granularity_of_pixels(
    encoder: DynamicGrainedEncoder, shape: tuple[int, int], size: tuple[int, int], image: int = 0
) -> np.ndarray:
    """The granularity that served each pixel in the encoder's last forward pass.

    Args:
        encoder: wrapper of an encoder block.
        shape: (h, w) of its map in cells.
        size: (H, W) of the network's input in pixels.
        image: index in the batch.

    Returns:
        (H, W) granularities.
    """
    choice = encoder.decision.choice[image].cpu().numpy()
    cells = np.asarray(encoder.granularities)[choice].repeat(encoder.region, 0).repeat(encoder.region, 1)
    rows, columns = (np.arange(side) * count // side for side, count in zip(size, shape))
    return cells[np.ix_(rows, columns)]


class Selectivity:
    """Where the layers choose the finest granularity: on objects, on background, and how much within images."""

    def __init__(self) -> None:
        # Of each layer for each image: pixels of the object and of the background, and the finest ones among them.
        self._pixels: dict[str, list[tuple[int, int, int, int]]] = {}

    def add(self, layer: str, is_finest: np.ndarray, mask: np.ndarray) -> None:
        """Note an image.

        Args:
            layer: name.
            is_finest: (H, W), or (N) of those pixels that count, whether the finest granularity serves a pixel.
            mask: as many, whether a pixel is of an object.
        """
        counts = mask.sum(), (~mask).sum(), (is_finest & mask).sum(), (is_finest & ~mask).sum()
        self._pixels.setdefault(layer, []).append(tuple(map(int, counts)))

    def result(self) -> dict[str, dict[str, float]]:
        """Of each layer, from all pixels of all images.

        Returns:
            ``object`` and ``background``, the shares of their pixels that the finest granularity serves;
            ``selectivity``, the first less the second; ``within_images``, see
            :func:`~mmdyn.models.dge.share_within_images`.

        Raises:
            ValueError: if there is no object, or no background, in any image.
        """
        found = {}
        for layer, pixels in self._pixels.items():
            counts = np.array(pixels, float)
            objects, background, on, off = counts.sum(0)
            if not (objects and background):
                raise ValueError(
                    f'The masks have {objects:.0f} pixels of objects and {background:.0f} of background: give masks '
                    'that have both, and the value of their background.'
                )
            shares = counts[:, 2:].sum(1) / counts[:, :2].sum(1)
            found[layer] = dict(
                object=on / objects,
                background=off / background,
                selectivity=on / objects - off / background,
                within_images=share_within_images(shares.mean(), np.square(shares).mean()),
            )
        return found


def draw_gates(
    image: np.ndarray,
    granularities: np.ndarray,
    candidates: Sequence[int],
    mask: np.ndarray | None = None,
    opacity: float = 0.45,
) -> np.ndarray:
    """Lay the colours of the granularities over an image.

    Args:
        image: (H, W, 3) uint8, RGB.
        granularities: (H, W) granularity of each pixel.
        candidates: the granularities to choose from, ascending.
        mask: (H, W) object, whose outline is drawn in white.
        opacity: of the colours.

    Returns:
        (H, W, 3) uint8, RGB.
    """
    check_number('opacity', opacity, '[0, 1]', 'of the colours')
    check_granularities(candidates)
    colour = np.zeros_like(image)
    for phi, rgb in zip([phi for phi in candidates if phi], COLOURS):
        colour[granularities == phi] = rgb
    drawn = cv2.addWeighted(image, 1 - opacity, colour, opacity, 0)
    return drawn if mask is None else draw_outline(drawn, mask)


def draw_outline(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Draw the outline of a (H, W) mask in white on a copy of a (H, W, 3) image."""
    contours, _ = cv2.findContours((mask > 0).astype(np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
    return cv2.drawContours(image.copy(), contours, -1, (255, 255, 255), 1)
