from .hooks import BudgetHook, DenseTeacherHook, FineSelectionHook, LossGuardHook, RandomStateHook

__all__ = ['BudgetHook', 'DenseTeacherHook', 'FineSelectionHook', 'LossGuardHook', 'RandomStateHook']
