from .hooks import BudgetHook, FineSelectionHook, LossGuardHook, RandomStateHook

__all__ = ['BudgetHook', 'FineSelectionHook', 'LossGuardHook', 'RandomStateHook']
