from .budget_hook import BudgetHook
from .dense_teacher_hook import DenseTeacherHook
from .fine_selection_hook import FineSelectionHook
from .frozen_start_hook import FrozenStartHook
from .gate_noise_hook import GateNoiseHook
from .loss_guard_hook import LossGuardHook
from .random_state_hook import RandomStateHook

__all__ = [
    'BudgetHook',
    'DenseTeacherHook',
    'FineSelectionHook',
    'FrozenStartHook',
    'GateNoiseHook',
    'LossGuardHook',
    'RandomStateHook',
]
