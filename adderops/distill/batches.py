"""Training batches, from an image set of this package or from any loader of (images, labels).

Both yield the same steps of an epoch at every call, starting from any step; so a resumed run equals an uninterrupted
one.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from adderops.distill import distributed
from adderops.distill.data import ImageSet, calibration_batches, epoch_batches


@dataclass(frozen=True)
class Part:
    """The part of a batch that goes through the networks at once.

    Attributes:
        images, labels: this process's share of it.
        count: number of images, over all processes.
        share: fraction of the batch's images.
    """

    images: Tensor
    labels: Tensor
    count: int
    share: float


class Batches(Protocol):
    """The steps of each epoch.

    Attributes:
        images: number of images per epoch, over all processes; None where it is unknown before the epoch ends.
    """

    @property
    def images(self) -> int | None: ...

    def steps(self, epoch: int, start: int = 0) -> Iterator[tuple[list[Part], bool]]:
        """Yields the parts of each step, from step `start` of the epoch, and whether it is the last."""

    def calibration(self, count: int) -> Iterator[Tensor]:
        """Yields about `count` training images in batches, the same at every call."""


def seed_of(*numbers: int) -> int:
    """Returns a seed that depends on the numbers given, for example seed, epoch and step."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


class ImageSetBatches:
    """The batches of `epoch_batches`, each cut into parts, each part into one share per process.

    Args:
        images: the set.
        batch_size: images per step, over all processes.
        accumulate: parts per batch.
        seed: with the epoch, it decides the order of the images.
        workers, pin_memory: see `ImageSet.batches`.

    Raises:
        ValueError: fewer images than a batch, or fewer than 2 images in a process's share of a part.
    """

    def __init__(
        self, images: ImageSet, batch_size: int, accumulate: int, seed: int, workers: int = 0, pin_memory: bool = False
    ) -> None:
        if len(images) < batch_size:
            raise ValueError(f"batch_size: expected at most the {len(images)} images, got {batch_size}")
        self.least = 2 * accumulate * distributed.world_size()  # BatchNorm needs two
        if batch_size < self.least:
            raise ValueError(
                f"accumulate: expected at least 2 images in each part of a batch of {batch_size} for "
                f"{distributed.world_size()} processes, got {accumulate} parts"
            )
        self.set, self.batch_size, self.accumulate, self.seed = images, batch_size, accumulate, seed
        self.workers, self.pin_memory = workers, pin_memory
        self.images = len(images)
        self.steps_per_epoch = len(self._epoch(0))

    def _epoch(self, epoch: int) -> tuple[Tensor, ...]:
        return epoch_batches(self.images, self.batch_size, self.seed, epoch, self.least)

    def steps(self, epoch: int, start: int = 0) -> Iterator[tuple[list[Part], bool]]:
        batches = self._epoch(epoch)
        left = [batch.tensor_split(self.accumulate) for batch in batches[start:]]
        shares = [distributed.share(part) for parts in left for part in parts]
        loader = iter(self.set.batches(shares, epoch, seed=self.seed, workers=self.workers, pin_memory=self.pin_memory))
        for i, parts in enumerate(left):
            total, made = sum(map(len, parts)), []
            for part in parts:
                images, labels = next(loader)
                made.append(Part(images, labels, len(part), len(part) / total))
            yield made, i == len(left) - 1

    def calibration(self, count: int) -> Iterator[Tensor]:
        return calibration_batches(self.set, count, self.workers)


class LoaderBatches:
    """The batches of a loader, one per step.  With several processes, each has its own loader with as many batches.

    The random numbers that loader, sampler and data set draw from torch depend on seed and epoch only, with or without
    workers; a `DistributedSampler` is told the epoch.  A last batch of fewer than two images per part is appended to
    the batch before it.

    Args:
        loader: an iterable of (images, labels) that starts again at each `iter()`; a `torch.utils.data.DataLoader`.
        accumulate: parts per batch.
        seed: for the random numbers.

    Raises:
        ValueError: during iteration: anything but pairs of two tensors of the same length, or no batch at all.
    """

    images: int | None = None

    def __init__(self, loader: Iterable[Any], accumulate: int = 1, seed: int = 0) -> None:
        if isinstance(loader, Iterator):
            raise ValueError("loader: expected one that can be iterated again, such as a DataLoader, got an iterator")
        self.loader, self.accumulate, self.seed = loader, accumulate, seed

    def steps(self, epoch: int, start: int = 0) -> Iterator[tuple[list[Part], bool]]:
        batches = _join_small_last(self._batches(epoch), least=2 * self.accumulate)
        step = -1
        for step, ((images, labels), last) in enumerate(batches):
            if step >= start:
                yield self._parts(images, labels), last
        if step < start:
            raise ValueError(f"loader: expected more than {start} batches per epoch, got {step + 1}")

    def calibration(self, count: int) -> Iterator[Tensor]:
        for images, _ in self._batches(epoch=0):
            yield images[:count]
            count -= len(images)
            if count < 2:  # one image alone has no statistics
                return

    def _parts(self, images: Tensor, labels: Tensor) -> list[Part]:
        pairs = zip(images.tensor_split(self.accumulate), labels.tensor_split(self.accumulate), strict=True)
        parts = [(x, y) for x, y in pairs if len(x)]
        counts = [int(count) for count in distributed.global_sum([float(len(x)) for x, _ in parts])]
        return [Part(x, y, n, len(x) / len(images)) for (x, y), n in zip(parts, counts, strict=True)]

    def _batches(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        for part in (self.loader, *(getattr(self.loader, name, None) for name in ("sampler", "batch_sampler"))):
            if (set_epoch := getattr(part, "set_epoch", None)) is not None:
                set_epoch(epoch)
            if (generator := getattr(part, "generator", None)) is not None:
                generator.manual_seed(seed_of(self.seed, epoch))
        batches = None
        i = 0
        while True:
            with _random_numbers_of(seed_of(self.seed, epoch, i, distributed.rank())):
                batches = iter(self.loader) if batches is None else batches
                batch = next(batches, None)
            if batch is None:
                return
            images, labels = batch if isinstance(batch, (tuple, list)) and len(batch) == 2 else (None, None)
            if not isinstance(images, Tensor) or not isinstance(labels, Tensor) or len(images) != len(labels):
                raise ValueError("loader: expected batches (images, labels) of two tensors of the same length")
            yield images, labels
            i += 1


def _join_small_last(
    batches: Iterable[tuple[Tensor, Tensor]], least: int
) -> Iterator[tuple[tuple[Tensor, Tensor], bool]]:
    """Yields the batches and whether each is the last; a last one of fewer than `least` images joins the one before."""
    held: list[tuple[Tensor, Tensor]] = []
    for batch in batches:
        if len(held) == 2:
            yield held.pop(0), False
        held.append(batch)
    if len(held) == 2 and len(held[1][0]) < least:
        (images, labels), (more_images, more_labels) = held
        held = [(torch.cat([images, more_images]), torch.cat([labels, more_labels]))]
    for i, batch in enumerate(held):
        yield batch, i == len(held) - 1


@contextmanager
def _random_numbers_of(seed: int) -> Iterator[None]:
    """Seeds torch's CPU generator while it is entered, and restores it."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield
