"""Stored teacher logits: the teacher is paid once, and students of the same data train at plain speed.

With replayable data (`timm_kd.replay`) the pixels of a row follow from its number, so its logits can be stored. Where
rows mix or share draws, or several are crops of one image, the number is the row's position in the epoch, else the
index of the sample.
"""
from .cached_teacher import CachedTeacher
from .folder import CacheFolder
from .layout import RowLayout

__all__ = ['CacheFolder', 'CachedTeacher', 'RowLayout']
