"""Where a run stops after SIGTERM: at one place for all of its ranks."""
from typing import NoReturn

import torch

from .runtime import Terminated, TerminationSignal


class AgreedStop(TerminationSignal):
    """SIGTERM at any rank, made a decision that all ranks take at the same `check`.

    A rank that stopped by itself would leave the others in a collective that nobody answers, and the signal reaches the
    ranks at different moments, or one of them alone. So each `check` starts a reduction of the flags between the hosts
    (gloo, whatever the devices use) and answers with that of the check before: it is done by then, and nothing waits
    for a device. A single process stops at once.

    Args:
        distributed: Agree with the other ranks; each must then make the object, and the same number of checks.
    """

    def __init__(self, distributed: bool):
        super().__init__()
        self.agreed = False
        self._group = torch.distributed.new_group(backend='gloo') if distributed else None
        self._reduction = self._flag = None

    def check(self) -> bool:
        """Tells whether to stop here: the same answer on all ranks."""
        if self._group is None:
            self.agreed = self.received
            return self.agreed
        if self._reduction is not None:
            self._reduction.wait()
            self.agreed = bool(self._flag)
        if not self.agreed:
            self._flag = torch.tensor(self.received, dtype=torch.uint8)
            self._reduction = torch.distributed.all_reduce(
                self._flag, torch.distributed.ReduceOp.MAX, group=self._group, async_op=True)
        return self.agreed

    def leave(self, place: str) -> NoReturn:
        """Ends the run when all ranks are here: once a rank has ended, torchrun gives the others 30 seconds.

        Raises:
            Terminated: Naming the place.
        """
        if self._group is not None:
            torch.distributed.barrier(group=self._group)
        raise Terminated(place)
