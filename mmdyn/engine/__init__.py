from .hooks import (
    BudgetHook,
    DenseTeacherHook,
    FineSelectionHook,
    FrozenStartHook,
    GateNoiseHook,
    LossGuardHook,
    RandomStateHook,
)

__all__ = [
    'BudgetHook',
    'DenseTeacherHook',
    'FineSelectionHook',
    'FrozenStartHook',
    'GateNoiseHook',
    'LossGuardHook',
    'RandomStateHook',
]
