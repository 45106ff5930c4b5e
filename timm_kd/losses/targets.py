"""timm's targets, read back: which classes an image shows, and how much of each."""
from typing import NamedTuple

import torch
from torch import Tensor

# The rounding of timm's products and sums leaves a class that is no label within this many eps of `off`.
_ROUNDINGS = 8


class Labels(NamedTuple):
    """The classes of each row, heaviest first: K = 1 for hard targets, 2 for the dense ones of Mixup and CutMix.

    A row of a single class in a dense batch repeats it with weight 0, so that `index` is always valid.

    Attributes:
        index: Class indices, `[B, K]` int64.
        weight: Their shares, `[B, K]`, each row summing to 1.
    """
    index: Tensor
    weight: Tensor

    def where_present(self, values: Tensor, otherwise: float) -> Tensor:
        """Return `values` `[B, K]` with `otherwise` at labels of weight 0; a hard target has none."""
        return values if self.index.shape[1] == 1 else torch.where(self.weight > 0, values, otherwise)

    def heaviest(self) -> 'Labels':
        """Return the first label alone, as if the target were hard."""
        return self if self.index.shape[1] == 1 else Labels(self.index[:, :1], torch.ones_like(self.weight[:, :1]))


def read_target(target: Tensor, logits: Tensor, smoothing: float, check: bool) -> Labels:
    """Read a target of timm's loaders, hard or mixed.

    timm folds label smoothing s into the dense targets of Mixup: `off = s / C`, `on = 1 - s + off`, and a row is
    `lam * onehot_a + (1 - lam) * onehot_b` on those values (`timm.data.mixup.mixup_target`).

    Args:
        target: `[B]` integer class indices, or `[B, C]` floating point as timm's Mixup and FastCollateMixup make it.
        logits: The student's, `[B, C]`: gives the shape and the dtype of the weights.
        smoothing: The s folded into a dense target, in [0, 1). Hard targets are read as they are.
        check: Look at the values too. It reads them back, so it is for the CPU only; a CUDA device has its own
            assertion on a class index out of range.

    Returns:
        The labels and their weights, smoothing undone, without a host sync unless `check`.

    Raises:
        ValueError: A shape, dtype, smoothing or (with `check`) value that no target of timm has.
    """
    if not 0.0 <= smoothing < 1.0:
        raise ValueError(f'smoothing must be in [0, 1), got {smoothing}.')
    batch_size, num_classes = logits.shape
    if target.shape == (batch_size,) and not target.is_floating_point():
        return _read_hard(target, logits, check)
    if target.shape == (batch_size, num_classes) and target.is_floating_point():
        return _read_mixed(target, logits, smoothing, check)
    raise ValueError(
        f'target must be [{batch_size}] class indices or a floating point [{batch_size}, {num_classes}] '
        f'for logits of that shape, got {list(target.shape)} {target.dtype}.'
    )


def _read_hard(target: Tensor, logits: Tensor, check: bool) -> Labels:
    num_classes = logits.shape[1]
    if check and target.numel():
        lowest, highest = (int(value) for value in target.aminmax())
        if lowest < 0 or highest >= num_classes:
            outside = lowest if lowest < 0 else highest
            raise ValueError(f'target holds class {outside}, outside [0, {num_classes}) of the logits.')
    index = target.long().unsqueeze(1)
    return Labels(index, torch.ones_like(index, dtype=logits.dtype))


def _read_mixed(target: Tensor, logits: Tensor, smoothing: float, check: bool) -> Labels:
    num_classes = logits.shape[1]
    eps = torch.finfo(target.dtype).eps
    value, index = target.topk(2, dim=1)
    value = value.to(logits.dtype)
    # The sum of the two shares: the two largest values of a row make up all of it but C - 2 times `off`. It is 1,
    # unless the images are in half precision, where Mixup rounds lam and 1 - lam separately.
    total = value.sum(1, keepdim=True) / (1 - (num_classes - 2) * smoothing / num_classes)
    if check and not bool(((total - 1).abs() < 0.01).all()):
        raise ValueError(
            f'target rows are not a mix of at most two classes with smoothing {smoothing}: pass the smoothing that '
            f'timm\'s Mixup was given.'
        )
    off = total * (smoothing / num_classes)
    excess = value[:, 1:] - off
    lighter = torch.where(excess > _ROUNDINGS * eps * off, excess / ((1 - smoothing) * total), 0)
    index = torch.where(lighter > 0, index, index[:, :1])
    return Labels(index, torch.cat([1 - lighter, lighter], dim=1))
