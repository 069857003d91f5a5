from .encoder import Decision, DynamicGrainedEncoder, check_granularities
from .routing import Routing, route

__all__ = ['Decision', 'DynamicGrainedEncoder', 'Routing', 'check_granularities', 'route']
