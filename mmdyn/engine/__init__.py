from .hooks import BudgetHook, LossGuardHook

__all__ = ['BudgetHook', 'LossGuardHook']
