"""A report as one page of HTML, which needs nothing beside itself."""

import base64
import html
import json
import math
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from .gates import COLOURS

TEMPLATE = Path(__file__).with_name('page.html')
# Smaller images stay as they are, to the pixel.
LOSSLESS = 128 * 128


def data_uri(image: np.ndarray) -> str:
    """An image (H, W, 3) uint8, RGB, as an address that holds it."""
    kind = 'png' if image.shape[0] * image.shape[1] <= LOSSLESS else 'jpeg'
    _, content = cv2.imencode(f'.{kind}', cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
    return f'data:image/{kind};base64,{base64.b64encode(content.tobytes()).decode()}'


def finite(value: Any) -> Any:
    """The same with None in place of numbers that JSON does not have."""
    if isinstance(value, dict):
        return {name: finite(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def report_page(report: dict[str, Any]) -> str:
    """The page of a report, as :mod:`mmdyn.analysis.model_report` makes them, with a ``title``."""
    colours = ['#{:02x}{:02x}{:02x}'.format(*colour) for colour in COLOURS]
    # No text of a user's may end the script.
    content = json.dumps(finite(dict(report, colours=colours)), allow_nan=False).replace('<', '\\u003c')
    page = TEMPLATE.read_text(encoding='utf-8').replace('{{title}}', html.escape(str(report['title'])))
    return page.replace('{{report}}', content)
