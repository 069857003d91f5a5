from .encoder import Decision, DynamicGrainedEncoder, check_granularities
from .routing import Routing, route
from .selectivity import share_of_finest, share_within_images

__all__ = [
    'Decision',
    'DynamicGrainedEncoder',
    'Routing',
    'check_granularities',
    'route',
    'share_of_finest',
    'share_within_images',
]
