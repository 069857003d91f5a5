"""Pictures of class attention, after the CF-ViT paper's figure 1."""

import cv2
import numpy as np


def draw_attention(image: np.ndarray, score: np.ndarray, opacity: float = 0.5) -> np.ndarray:
    """Lay a score of patches over an image: blue is the lowest, red the highest.

    Args:
        image: (H, W, 3) uint8, RGB.
        score: (rows, columns), one of each patch.
        opacity: of the colours.

    Returns:
        (H, W, 3) uint8, RGB.
    """
    low, high = score.min(), score.max()
    levels = np.round(255 * (score - low) / (high - low if high > low else 1)).astype(np.uint8)
    rows, columns = (np.arange(side) * count // side for side, count in zip(image.shape[:2], score.shape))
    colours = cv2.cvtColor(cv2.applyColorMap(levels[np.ix_(rows, columns)], cv2.COLORMAP_JET), cv2.COLOR_BGR2RGB)
    return cv2.addWeighted(image, 1 - opacity, colours, opacity, 0)
