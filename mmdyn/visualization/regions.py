"""Pictures of CF-ViT's two stages, after the CF-ViT paper's figure 9."""

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from mmengine.structures import BaseDataElement
from torch import Tensor

from ..values import check_integer, sides

GREY, LINE = 150, 255
MOST_ROWS = 1000  # of coarse patches


def split_pixels(regions: Sequence[int], coarse_size: int, size: tuple[int, int]) -> np.ndarray:
    """Which pixels lie in a coarse patch that is split.

    Args:
        regions: indices of the split patches in the coarse grid, row by row.
        coarse_size: rows and columns of the grid.
        size: (H, W) of the image in pixels.

    Returns:
        (H, W) bool.

    Raises:
        ValueError: for a region that the grid does not have.
    """
    check_integer('coarse_size', coarse_size, 1, MOST_ROWS, 'the rows and columns of the grid')
    size = sides('size', size)
    regions = np.asarray(regions)
    if regions.ndim != 1 or (len(regions) and regions.dtype.kind not in 'iu'):
        raise ValueError(f'regions={regions.tolist()!r}: give the indices of patches, a list of integers.')
    if len(regions) and not 0 <= regions.min() <= regions.max() < coarse_size**2:
        raise ValueError(
            f'Regions {regions.min()} to {regions.max()} are not all in a grid of {coarse_size} x '
            f'{coarse_size} patches, which has 0 to {coarse_size**2 - 1}: give the coarse_size of the '
            'model.'
        )
    cells = np.isin(np.arange(coarse_size**2), regions).reshape(coarse_size, coarse_size)
    return cells[np.ix_(*(np.arange(side) * coarse_size // side for side in size))]


def draw_regions(image: np.ndarray, coarse_size: int, regions: Sequence[int] | None = None) -> np.ndarray:
    """Draw the coarse patches, and the four fine ones of each that is split; the others are greyed.

    Args:
        image: (H, W, 3) uint8, RGB.
        coarse_size: rows and columns of coarse patches.
        regions: indices of the split patches; None for an image that was only looked at coarsely.

    Returns:
        (H, W, 3) uint8, RGB.
    """
    check_integer('coarse_size', coarse_size, 1, MOST_ROWS, 'the rows and columns of the grid')
    drawn, size = image.copy(), image.shape[:2]
    lines = _borders(coarse_size, size)
    if regions is not None:
        split = split_pixels(regions, coarse_size, size)
        drawn[~split] = (0.3 * image[~split].mean(1, keepdims=True) + 0.7 * GREY).astype(np.uint8)
        lines |= _borders(2 * coarse_size, size) & split
    drawn[lines] = LINE
    return drawn


def _borders(count: int, size: tuple[int, int]) -> np.ndarray:
    """(H, W), the first row and column of pixels of each patch of a count x count grid, but not at the image's edge."""
    rows, columns = (np.diff(np.arange(side) * count // side, prepend=0) > 0 for side in size)
    return rows[:, None] | columns


def describe_stages(sample: BaseDataElement, dataset_meta: dict) -> list[str]:
    """The class of each stage that ran with its confidence, e.g. ``['coarse: cat 0.41', 'fine: dog 0.83']``."""

    def describe(stage: str, score: Tensor) -> str:
        label = score.argmax().item()
        name = dataset_meta['classes'][label] if dataset_meta.get('classes') else label
        return f'{stage}: {name} {score[label].item():.2f}'

    return [describe(stage, sample.get(f'{stage}_score')) for stage in ('coarse', 'fine') if f'{stage}_score' in sample]


def with_title(picture: np.ndarray, title: str, colour: tuple[int, int, int] = (0, 0, 0)) -> np.ndarray:
    """A picture (H, W, 3) below a line of text, with a white margin on the right and at the bottom.

    Text that is wider than the picture is written smaller, by a third at most, and cut off behind that.
    """
    line, font = np.full((18, picture.shape[1], 3), 255, np.uint8), cv2.FONT_HERSHEY_SIMPLEX
    (width, _), _ = cv2.getTextSize(title, font, 0.4, 1)
    size = 0.4 * min(1.0, max(0.67, (picture.shape[1] - 4) / max(width, 1)))
    cv2.putText(line, title, (2, 13), font, size, colour, 1, cv2.LINE_AA)
    return np.pad(np.concatenate([line, picture]), ((0, 4), (0, 4), (0, 0)), constant_values=255)


def labelled(picture: np.ndarray, text: str, side: int) -> np.ndarray:
    """A picture (H, W, 3) enlarged or reduced to ``side`` pixels of height, below a line of text."""
    interpolation = cv2.INTER_NEAREST if picture.shape[0] <= side else cv2.INTER_AREA
    size = round(picture.shape[1] * side / picture.shape[0]), side
    return with_title(cv2.resize(picture, size, interpolation=interpolation), text)


def write_rows(rows: dict[str, Sequence[np.ndarray]], folder: str | Path, sheet: bool = False) -> None:
    """Write rows of pictures.

    Args:
        rows: of each image, by its name: pictures (H, W, 3) uint8, RGB.
        folder: of the files, NAME.png for each row.
        sheet: write all as one picture, sheet.jpg, in which each row is a column.
    """
    if sheet and rows:
        columns = [side_by_side([picture.swapaxes(0, 1) for picture in row]).swapaxes(0, 1) for row in rows.values()]
        picture = cv2.cvtColor(side_by_side(columns), cv2.COLOR_RGB2BGR)
        cv2.imwrite(str(Path(folder) / 'sheet.jpg'), picture, [cv2.IMWRITE_JPEG_QUALITY, 88])
    for name, row in rows.items() if not sheet else ():
        cv2.imwrite(str(Path(folder) / f'{name}.png'), cv2.cvtColor(side_by_side(row), cv2.COLOR_RGB2BGR))


def side_by_side(pictures: Sequence[np.ndarray]) -> np.ndarray:
    """Pictures as one, white below those that are not as high as others."""
    height = max(len(picture) for picture in pictures)
    whole = [np.pad(p, ((0, height - len(p)), (0, 0), (0, 0)), constant_values=255) for p in pictures]
    return np.concatenate(whole, axis=1)
