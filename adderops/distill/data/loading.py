"""From images to batches: their order and every random crop depend on seed, epoch and image alone."""

import atexit
import math
import multiprocessing
import signal
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing.process import BaseProcess
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset, get_worker_info

from adderops.distill.data.images import Items
from adderops.distill.interrupt import signals_blocked

CALIBRATION_BATCH = 100  # images


def epoch_batches(count: int, batch_size: int, seed: int, epoch: int, least: int = 1) -> tuple[Tensor, ...]:
    """Returns the indices of each batch of an epoch, a function of its arguments alone: a resumed run sees the same.

    The images are dealt out evenly, so that the last batch is not too small for BatchNorm: all batches have
    `batch_size` images or a few fewer, and every image occurs once.  If a batch would have fewer than `least` images,
    there is one batch less, and some have more than `batch_size`.

    >>> [len(batch) for batch in epoch_batches(count=10, batch_size=4, seed=0, epoch=0)]
    [4, 3, 3]
    >>> [len(batch) for batch in epoch_batches(count=5, batch_size=2, seed=0, epoch=0, least=2)]
    [3, 2]
    """
    entropy = np.random.SeedSequence([seed, epoch]).generate_state(1, np.uint64)[0]
    order = torch.randperm(count, generator=torch.Generator().manual_seed(int(entropy >> np.uint64(1))))
    return order.tensor_split(max(1, min(math.ceil(count / batch_size), count // least)))


_workers: weakref.WeakSet[BaseProcess] = weakref.WeakSet()


@atexit.register
def _end_workers() -> None:
    """At exit, Python would end the processes it started by SIGTERM, which workers block, and then wait for them."""
    for worker in _workers:
        worker.kill()


class _Loader(DataLoader[tuple[Tensor, Tensor]]):
    """A DataLoader whose workers end through its queue, not by a signal to their group, and return their errors."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:  # type: ignore[override]  # DataLoader names its own class
        others, of_child = set(multiprocessing.active_children()), signal.getsignal(signal.SIGCHLD)
        with signals_blocked():  # inherited by the workers, which never unblock them
            batches = super().__iter__()
        if signal.getsignal(signal.SIGCHLD) != of_child:
            # torch's handler would raise the loss of a worker anywhere in the main thread; the loader checks, too
            signal.signal(signal.SIGCHLD, of_child or signal.SIG_DFL)
        _workers.update(set(multiprocessing.active_children()) - others)
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                return
            except (EOFError, OSError) as error:
                if not self.num_workers:
                    raise
                raise RuntimeError(f"DataLoader worker ended unexpectedly ({type(error).__name__})") from error
            if isinstance(batch, Exception):
                raise batch
            yield batch


class ImageSet:
    r"""Images and labels that become normalized batches, :math:`(image - mean) / std` per channel.

    Args:
        source: items (image, label) by index.  Without `transform` a TensorDataset of (N, C, H, W) uint8 and (N) int64,
            from which a batch is taken at once.
        indices: (M) int64, the images of `source` that belong to the set.
        mean, std: (C), in grey levels from 0 to 255.
        transform: turns one image of `source` into a (C, H, W) uint8 tensor, with random numbers of torch.

    >>> from torch.utils.data import TensorDataset
    >>> source = TensorDataset(torch.tensor([0, 100, 200], dtype=torch.uint8).view(3, 1, 1, 1), torch.arange(3))
    >>> images = ImageSet(source, indices=torch.tensor([1, 2]), mean=torch.tensor([100.0]), std=torch.tensor([50.0]))
    >>> [(image.flatten(), labels) for image, labels in images.batches([torch.tensor([1, 0])])]
    [(tensor([2., 0.]), tensor([2, 1]))]
    """

    def __init__(
        self,
        source: Items,
        indices: Tensor,
        mean: Tensor,
        std: Tensor,
        transform: Callable[[Any], Tensor] | None = None,
    ) -> None:
        self.source = source
        self.indices = indices
        self.mean, self.std = mean.view(1, -1, 1, 1), std.view(1, -1, 1, 1)
        self.transform = transform

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def labels(self) -> Tensor:
        """The labels, (M) int64; no image is read."""
        source = self.source
        found = source.tensors[1] if isinstance(source, TensorDataset) else torch.tensor(source.targets)
        return found[self.indices]

    def batches(
        self,
        batches: Sequence[Tensor],
        epoch: int = 0,
        *,
        seed: int = 0,
        workers: int = 0,
        pin_memory: bool = False,
    ) -> Iterable[tuple[Tensor, Tensor]]:
        """Returns an iterable of images (B, C, H, W) float32 and labels (B) int64, one pair per tensor of indices.

        What random transforms do to an image is a function of seed, epoch and its index in `source`.  Workers, other
        images of the batch and the global random state have no influence, and that state stays as it was.

        Args:
            batches: the indices of each batch, from 0 to `len(self) - 1`.
            epoch, seed: for random transforms.
            workers: processes that prepare batches; 0: this process does, which is best without a transform.
            pin_memory: put batches into page-locked memory, for a GPU.
        """
        # spawn_key: numbers other than those that epoch_batches draws from the same seed and epoch
        seeds = np.random.SeedSequence([seed, epoch], spawn_key=(1,)).generate_state(len(self.source))
        positions = [self.indices[batch].numpy() for batch in batches]
        return _Loader(
            [(batch, seeds[batch]) for batch in positions],  # type: ignore[arg-type]  # a sequence is enough
            batch_size=None,  # each item is already a batch
            collate_fn=self._load_or_fail,  # type: ignore[arg-type]  # of one item, because of that
            num_workers=workers,
            pin_memory=pin_memory,
            generator=torch.Generator(),  # by default each pass draws from the global one
        )

    def _load_or_fail(self, batch: tuple[np.ndarray, np.ndarray]) -> tuple[Tensor, Tensor] | Exception:
        """In a worker, returns an error as the result: DataLoader would raise it with the traceback in its text."""
        try:
            return self._load(batch)
        except Exception as error:
            if get_worker_info() is None:
                raise
            return error

    def _load(self, batch: tuple[np.ndarray, np.ndarray]) -> tuple[Tensor, Tensor]:
        positions, seeds = batch
        if self.transform is None:
            images, labels = self.source[torch.from_numpy(positions)]
        else:
            items = []
            with torch.random.fork_rng(devices=[]):
                for position, seed in zip(positions.tolist(), seeds.tolist(), strict=True):
                    torch.default_generator.manual_seed(seed)  # torch.manual_seed would set every device's
                    image, label = self.source[position]
                    items.append((self.transform(image), int(label)))
            images, labels = torch.stack([image for image, _ in items]), torch.tensor([label for _, label in items])
        return (images - self.mean).div_(self.std), labels


def calibration_batches(images: ImageSet, count: int = 2000, workers: int = 0) -> Iterator[Tensor]:
    """Yields batches of `count` images of a set, or of all if it has fewer, without labels; the same at every call.

    Batches are of nearly equal size: a mean over them weighs all images alike, and no batch is a single image, which
    BatchNorm could not use.
    """
    chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:count]
    batches = chosen.tensor_split(math.ceil(len(chosen) / CALIBRATION_BATCH))
    for batch, _ in images.batches(batches, workers=workers):
        yield batch
