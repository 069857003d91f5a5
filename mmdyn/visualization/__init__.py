from .gates import Selectivity, draw_gates, draw_outline, granularity_of_pixels
from .predictions import build_visualizer, describe_label, draw_prediction
from .regions import describe_stages, draw_regions, split_pixels, with_title

__all__ = [
    'Selectivity',
    'build_visualizer',
    'describe_label',
    'describe_stages',
    'draw_gates',
    'draw_outline',
    'draw_prediction',
    'draw_regions',
    'granularity_of_pixels',
    'split_pixels',
    'with_title',
]
