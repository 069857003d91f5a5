from .budget_hook import BudgetHook
from .fine_selection_hook import FineSelectionHook
from .loss_guard_hook import LossGuardHook

__all__ = ['BudgetHook', 'FineSelectionHook', 'LossGuardHook']
