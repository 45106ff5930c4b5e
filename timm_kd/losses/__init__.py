"""The distillation losses: one file a paper, and their registry.

A loss knows logits and targets, nothing of models, arguments or epochs. A further one is a subclass of
`DistillationLoss` in a file of its own, a line in `KD_LOSSES`, and its reference figures in the tests: the flags,
`--help`, the model card and the benchmark follow from what its class says.
"""
from .base import DistillationLoss
from .dkd import DKDLoss
from .kd import KDLoss
from .nkd import NKDLoss
from .tfkd import TFKDLoss
from .tfnkd import TFNKDLoss

__all__ = [
    'KD_LOSSES',
    'DKDLoss',
    'DistillationLoss',
    'KDLoss',
    'NKDLoss',
    'TFKDLoss',
    'TFNKDLoss',
    'create_kd_loss',
]

KD_LOSSES: dict[str, type[DistillationLoss]] = {
    'kd': KDLoss,
    'dkd': DKDLoss,
    'nkd': NKDLoss,
    'tfnkd': TFNKDLoss,
    'tfkd': TFKDLoss,
}


def create_kd_loss(name: str, *, double_backward: bool = False, **params: float | bool) -> DistillationLoss:
    """Create a distillation loss by its name on the command line.

    Args:
        name: One of `KD_LOSSES`.
        double_backward: Whether backward must be differentiable itself, as second-order optimizers need it.
        **params: Its knobs (`KD_LOSSES[name].hyper_parameters()` lists them); the paper's value where left out.

    Raises:
        ValueError: An unknown name or parameter, or a value out of its range.
    """
    if name not in KD_LOSSES:
        raise ValueError(f'unknown distillation loss {name!r}: known are {", ".join(KD_LOSSES)}.')
    known = KD_LOSSES[name].hyper_parameters()
    for param in params:
        if param not in known:
            raise ValueError(f'{name} has no parameter {param!r}: it has {", ".join(known) or "none"}.')
    return KD_LOSSES[name](**params, double_backward=double_backward)
