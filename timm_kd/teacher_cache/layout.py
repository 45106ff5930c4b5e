"""How the teacher's logits for one image lie on disk: whole, or the k largest and the rest as one number."""
import math

import torch

_DTYPES = {'float16': torch.float16, 'float32': torch.float32}


class RowLayout:
    """Logits as rows of bytes, packed and unpacked on the device they are on.

    With `topk` a row holds the k largest logits, their classes, and the log-sum-exp of all others, which `unpack`
    spreads evenly over them: the probabilities of the k classes stay exact, the others share theirs.

    Args:
        num_classes: Classes C.
        dtype: 'float16' or 'float32', of the stored logits.
        topk: Number of logits to keep, below C; None keeps all.
    """

    def __init__(self, num_classes: int, dtype: str = 'float16', topk: int | None = None) -> None:
        self.num_classes = num_classes
        self.topk = topk
        self.dtype = _DTYPES[dtype]
        self.index_dtype = torch.int16 if num_classes <= 2 ** 15 else torch.int32
        self._value_bytes = (topk or num_classes) * self.dtype.itemsize
        self._index_bytes = (topk or 0) * self.index_dtype.itemsize
        self.row_bytes = self._value_bytes + self._index_bytes + (torch.float32.itemsize if topk else 0)

    @torch.no_grad()
    def pack(self, logits: torch.Tensor) -> torch.Tensor:
        """Pack logits `[B, C]` float32 into rows `[B, row_bytes]` uint8; a masked class is -inf but under `topk`."""
        if not self.topk:
            return self._narrow(logits).view(torch.uint8)
        values, classes = logits.topk(self.topk, dim=1)
        rest = logits.scatter(1, classes, float('-inf')).logsumexp(dim=1, keepdim=True)
        parts = self._narrow(values), classes.to(self.index_dtype), rest.float()
        return torch.cat([part.contiguous().view(torch.uint8) for part in parts], dim=1)

    @torch.no_grad()
    def unpack(self, rows: torch.Tensor) -> torch.Tensor:
        """Unpack rows `[B, row_bytes]` uint8 to logits `[B, C]` float32."""
        if not self.topk:
            return rows.view(self.dtype).float()
        sizes = self._value_bytes, self._index_bytes, torch.float32.itemsize
        dtypes = self.dtype, self.index_dtype, torch.float32
        # A slice of bytes starts anywhere; a copy of its own starts where any dtype may.
        parts = zip(rows.split(sizes, dim=1), dtypes, strict=True)
        values, classes, rest = (part.clone(memory_format=torch.contiguous_format).view(dtype) for part, dtype in parts)
        each = rest - math.log(self.num_classes - self.topk)
        return each.repeat(1, self.num_classes).scatter_(1, classes.long(), values.float())

    def _narrow(self, logits: torch.Tensor) -> torch.Tensor:
        """Cast to the stored dtype; what is too large for float16 becomes its largest number, infinities stay."""
        if self.dtype == torch.float32:
            return logits.float().contiguous()
        largest = torch.finfo(self.dtype).max
        return torch.where(logits.isinf(), logits, logits.clamp(-largest, largest)).to(self.dtype).contiguous()
