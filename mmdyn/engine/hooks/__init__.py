from .budget_hook import BudgetHook
from .loss_guard_hook import LossGuardHook

__all__ = ['BudgetHook', 'LossGuardHook']
