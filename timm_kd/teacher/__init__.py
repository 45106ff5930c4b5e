"""The teacher: from anywhere, frozen, adapted to the student's images and classes, made fast."""

from .ensemble import TeacherEnsemble, create_teacher
from .module import Teacher

__all__ = ['Teacher', 'TeacherEnsemble', 'create_teacher']
