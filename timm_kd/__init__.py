"""timm-kd: knowledge distillation with timm's models, data, optimizers and checkpoints.

The names below are imported when they are first asked for, so that what needs no torch (the report) starts at once.
"""
from importlib import import_module
from typing import TYPE_CHECKING, Any

from .version import __version__

if TYPE_CHECKING:
    from .losses import KD_LOSSES, DKDLoss, KDLoss, NKDLoss, TFKDLoss, TFNKDLoss, create_kd_loss
    from .task import KDTask
    from .teacher import Teacher, create_teacher

__all__ = [
    'KD_LOSSES',
    'DKDLoss',
    'KDLoss',
    'KDTask',
    'NKDLoss',
    'TFKDLoss',
    'TFNKDLoss',
    'Teacher',
    '__version__',
    'create_kd_loss',
    'create_teacher',
]

_ROOMS = {'KDTask': '.task', 'Teacher': '.teacher', 'create_teacher': '.teacher'}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    return getattr(import_module(_ROOMS.get(name, '.losses'), __name__), name)
