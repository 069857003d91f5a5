from .hooks import BudgetHook, DenseTeacherHook, FineSelectionHook, FrozenStartHook, LossGuardHook, RandomStateHook

__all__ = ['BudgetHook', 'DenseTeacherHook', 'FineSelectionHook', 'FrozenStartHook', 'LossGuardHook', 'RandomStateHook']
