"""Replayable data: every random draw of timm's training loader as a function of where it is used, not of when.

timm draws order, augmentation, Mixup and random erasing from the process-wide streams of Python, NumPy and torch, so a
batch depends on every batch before it and on how long its worker has lived. Here each draw gets a seed of its own:

| draw | function of |
|---|---|
| order of the samples | seed, epoch; with M crops of an image: seed, epoch // M |
| augmentation of a sample | seed, epoch, index, repeat (`--aug-repeats`) or number of the crop |
| Mixup, CutMix of a batch | seed, epoch, position of the batch's first row |
| random erasing on the device | seed, epoch, position of the row, augmentation split |

The *position* of a row is its place in the epoch over all ranks: row `i` of rank `r` in global batch `k` is at
`(k * batch_size + i) * world_size + r`, as torch's `DistributedSampler` deals them out. So global batch `k` holds the
same samples with the same pixels for any world size, the global batch size being the same. Mixup is the exception: timm
mixes a row with its mirror image in the batch of its own rank.

Several crops of an image (FKD: Shen and Xing 2022, arXiv 2112.01528) are neighbours in a batch and in their positions.
An image is decoded once for them.

The key of a batch travels with its indices from the sampler to the worker, so that persistent workers follow too, and
nothing is drawn from the process-wide streams: the model's dropout is undisturbed by the number of workers.
"""
from .batches import BatchKey, ReplayBatchSampler
from .loader import ReplayLoader, make_replayable
from .transforms import ReplayMixup

__all__ = ['BatchKey', 'ReplayBatchSampler', 'ReplayLoader', 'ReplayMixup', 'make_replayable']
