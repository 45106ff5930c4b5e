"""The student's images as the teacher takes them: size, channels, normalisation, precision, memory layout."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.data.loader import adapt_to_chs
from torch import nn

from ..errors import UsageError

# PIL's weights of an RGB image turned grey (mode 'L'), ITU-R BT.601: what a grey teacher was shown in training.
_LUMA = (0.299, 0.587, 0.114)


def can_adapt_channels(image_chans: int, teacher_chans: int) -> bool:
    """Return whether images of one channel count can be shown to a teacher of another."""
    return image_chans == teacher_chans or {image_chans, teacher_chans} == {1, 3}


class InputAdapter(nn.Module):
    """Show the student's images to the teacher as its own data pipeline would have.

    The two normalisations and a change between grey and RGB are one affine map of the channels, made once in float64
    and kept in float32. A grey image is repeated to three channels, each with the teacher's own mean and deviation;
    an RGB image is turned grey as PIL does it. Where nothing differs, nothing is computed.

    Args:
        in_chans: Channels of the images.
        mean: Mean the images were normalised with; None: they are normalised for the teacher.
        std: Standard deviation the images were normalised with; None: they are normalised for the teacher.
        teacher_chans: Channels the teacher expects.
        teacher_mean: Mean the teacher was trained with.
        teacher_std: Standard deviation the teacher was trained with.
        size: `(height, width)` the teacher must be given; None: it takes images as they come.
        interpolation: `bilinear` or `bicubic`, of the antialiased resize to `size`.
        dtype: Precision the images leave in.
        channels_last: Whether they leave in channels-last layout; else in the layout they come in.
        device: Where the map is kept.
    """

    def __init__(
            self,
            in_chans: int,
            mean: Sequence[float] | None,
            std: Sequence[float] | None,
            teacher_chans: int,
            teacher_mean: Sequence[float],
            teacher_std: Sequence[float],
            size: tuple[int, int] | None = None,
            interpolation: str = 'bicubic',
            dtype: torch.dtype = torch.float32,
            channels_last: bool = False,
            device: torch.device | None = None,
    ):
        super().__init__()
        self.size = size
        self.interpolation = interpolation
        self.dtype = dtype
        self.memory_format = torch.channels_last if channels_last else torch.preserve_format
        self.in_chans = in_chans
        self.teacher_chans = teacher_chans
        self.teacher_mean = tuple(adapt_to_chs(tuple(teacher_mean), teacher_chans))
        self.teacher_std = tuple(adapt_to_chs(tuple(teacher_std), teacher_chans))
        # As timm's loader does, where the data config has three values and the images another channel count.
        self.mean = tuple(adapt_to_chs(tuple(mean), in_chans)) if mean is not None else None
        self.std = tuple(adapt_to_chs(tuple(std), in_chans)) if std is not None else None
        scale, shift = self._fold()
        self.register_buffer('scale', None if scale is None else scale.to(device), persistent=False)
        self.register_buffer('shift', None if shift is None else shift.to(device), persistent=False)

    def _fold(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Return scale and shift of the affine map, both `[1, C, 1, 1]`; (None, None) where nothing differs."""
        teacher_norm = self.teacher_mean, self.teacher_std
        normalised_alike = self.mean is None or self.std is None or (self.mean, self.std) == teacher_norm
        if normalised_alike and self.in_chans == self.teacher_chans:
            return None, None
        teacher_mean, teacher_std = _per_channel(self.teacher_mean), _per_channel(self.teacher_std)
        # Where channels change and the images' normalisation is unknown, the average of the teacher's is assumed.
        mean = _per_channel(self.mean) if self.mean is not None else teacher_mean.mean(1, keepdim=True)
        std = _per_channel(self.std) if self.std is not None else teacher_std.mean(1, keepdim=True)
        if self.teacher_chans == 1 and self.in_chans == 3:
            luma = _per_channel(_LUMA)
            scale, offset = luma * std, (luma * mean).sum(1, keepdim=True)
        else:
            scale, offset = std, mean
        return (scale / teacher_std).float(), ((offset - teacher_mean) / teacher_std).float()

    def forward(
            self,
            images: torch.Tensor | dict[str, torch.Tensor],
    ) -> torch.Tensor | dict[str, torch.Tensor]:
        """Return images `[B, C, H, W]` of the student as the teacher takes them; what is given stays untouched.

        Raises:
            UsageError: For a NaFlex batch, a dict of patches, that would have to be changed: only its dtype can be.
        """
        if isinstance(images, dict):
            if self.size is not None or self.scale is not None:
                raise UsageError(f'NaFlex patches cannot be adapted to a teacher ({self.describe()}): train with its '
                                 '`mean`, `std` and channels.')
            return {**images, 'patches': images['patches'].to(self.dtype)}
        # The layout goes first: changing it together with the precision takes more than twice as long on a CPU.
        adapted = images.to(memory_format=self.memory_format)
        if self.size is not None and adapted.shape[-2:] != self.size:
            # In float32: the antialiased resize has no kernel in half precision on every device.
            adapted = F.interpolate(adapted.float(), self.size, mode=self.interpolation, antialias=True)
        if self.scale is not None:
            if self.scale.shape[1] > self.teacher_chans:
                adapted = (adapted * self.scale).sum(1, keepdim=True) + self.shift
            else:
                adapted = torch.addcmul(self.shift, adapted, self.scale)
        return adapted.to(self.dtype)

    def fingerprint(self) -> dict[str, Any]:
        """Return all that decides what the teacher sees of an image, as JSON types."""
        return {
            'size': self.size,
            'interpolation': None if self.size is None else self.interpolation,
            'channels': [self.in_chans, self.teacher_chans],
            'scale': None if self.scale is None else self.scale.flatten().tolist(),
            'shift': None if self.shift is None else self.shift.flatten().tolist(),
        }

    def describe(self) -> str:
        """Say in words what is done to the images."""
        steps = []
        if self.size is not None:
            steps.append(f'{self.size[0]}x{self.size[1]} (antialiased {self.interpolation} where the images differ)')
        if self.in_chans != self.teacher_chans:
            steps.append(f'{self.in_chans} -> {self.teacher_chans} channels')
        if self.scale is None:
            steps.append('normalised as the student\'s')
        else:
            steps.append(f'normalised to mean {_short(self.teacher_mean)} std {_short(self.teacher_std)}')
        return ', '.join(steps)


def _per_channel(values: tuple[float, ...]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64).view(1, -1, 1, 1)


def _short(values: tuple[float, ...]) -> str:
    return '(' + ', '.join(f'{v:.4g}' for v in values) + ')'
