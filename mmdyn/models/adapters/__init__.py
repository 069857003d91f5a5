"""DGE on the vision transformers of other libraries: an adapter for each family, and one call that applies it."""

from .adapter import ADAPTERS, AdaptedStage, Adapter, Stem, register_adapter
from .apply import AppliedDGE, WithDGE, apply_dge, budget_loss, cost, remove_dge, set_budget

__all__ = [
    'ADAPTERS',
    'AdaptedStage',
    'Adapter',
    'AppliedDGE',
    'Stem',
    'WithDGE',
    'apply_dge',
    'budget_loss',
    'cost',
    'register_adapter',
    'remove_dge',
    'set_budget',
]
