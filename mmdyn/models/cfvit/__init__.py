from .regions import fine_sequence, num_informative, select, split, update_score
from .reuse import FeatureReuse
from .token_targets import coarse_targets, fine_targets

__all__ = [
    'FeatureReuse',
    'coarse_targets',
    'fine_sequence',
    'fine_targets',
    'num_informative',
    'select',
    'split',
    'update_score',
]
