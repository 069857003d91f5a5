from .hooks import BudgetHook, FineSelectionHook, LossGuardHook

__all__ = ['BudgetHook', 'FineSelectionHook', 'LossGuardHook']
