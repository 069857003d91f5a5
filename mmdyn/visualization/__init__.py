from .gates import draw_gates, draw_outline, granularity_of_pixels

__all__ = ['draw_gates', 'draw_outline', 'granularity_of_pixels']
