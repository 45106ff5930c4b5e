"""The teacher: from anywhere, frozen, adapted to the student's images and classes, made fast."""

from .teacher import Teacher, TeacherEnsemble, create_teacher

__all__ = ['Teacher', 'TeacherEnsemble', 'create_teacher']
