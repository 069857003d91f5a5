from .attention import draw_attention
from .gates import Selectivity, draw_gates, draw_outline, granularity_of_pixels
from .page import data_uri, finite, report_page
from .predictions import build_visualizer, describe_label, draw_prediction, prediction_panel
from .regions import describe_stages, draw_regions, labelled, split_pixels, with_title, write_rows

__all__ = [
    'Selectivity',
    'build_visualizer',
    'data_uri',
    'describe_label',
    'describe_stages',
    'draw_attention',
    'draw_gates',
    'draw_outline',
    'draw_prediction',
    'draw_regions',
    'finite',
    'granularity_of_pixels',
    'labelled',
    'prediction_panel',
    'report_page',
    'split_pixels',
    'with_title',
    'write_rows',
]
