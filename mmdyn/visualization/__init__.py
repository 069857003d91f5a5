from .gates import draw_gates, draw_outline, granularity_of_pixels
from .predictions import build_visualizer, describe_label, draw_prediction

__all__ = [
    'build_visualizer', 'describe_label', 'draw_gates', 'draw_outline', 'draw_prediction', 'granularity_of_pixels'
]
