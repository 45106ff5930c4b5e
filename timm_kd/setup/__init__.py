"""The one place that turns flags into objects."""
from .base import Setup, set_up
from .student import create_student
from .teacher import evaluate_run_teacher, open_teacher
from .training import count_epochs, create_loss_scaler, create_optimizer, create_scheduler, create_task

__all__ = [
    'Setup',
    'count_epochs',
    'create_loss_scaler',
    'create_optimizer',
    'create_scheduler',
    'create_student',
    'create_task',
    'evaluate_run_teacher',
    'open_teacher',
    'set_up',
]
