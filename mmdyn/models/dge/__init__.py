from .encoder import Bound, Decision, DynamicGrainedEncoder, check_granularities, encode_queries
from .routing import Routing, route
from .selectivity import share_of_finest, share_within_images

__all__ = [
    'Bound',
    'Decision',
    'DynamicGrainedEncoder',
    'Routing',
    'check_granularities',
    'encode_queries',
    'route',
    'share_of_finest',
    'share_within_images',
]
