"""timm-kd: knowledge distillation with timm's models, data, optimizers and checkpoints."""
from .losses import KD_LOSSES, DKDLoss, KDLoss, NKDLoss, TFKDLoss, TFNKDLoss, create_kd_loss
from .task import KDTask
from .teacher import Teacher, create_teacher
from .version import __version__

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
