"""Loss and accuracy of a network on a set of images."""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adderops.distill.data import ImageSet
from adderops.distill.distributed import global_sum, rank, world_size

TEST_BATCH = 500  # images


def autocast(device: torch.device, amp: str | None) -> AbstractContextManager[Any]:
    """Returns the context in which networks run: 'bfloat16', 'float16', or None for float32."""
    if not torch.amp.is_autocast_available(device.type):  # the meta device
        return nullcontext()
    return torch.autocast(device.type, getattr(torch, amp or "bfloat16"), enabled=amp is not None)


def correct(logits: Tensor, labels: Tensor) -> Tensor:
    """Returns the number of images whose largest logit is that of their label; for mixed labels, the sum of the shares.

    >>> correct(torch.tensor([[0.0, 9.0], [9.0, 0.0]]), torch.tensor([[0.3, 0.7], [1.0, 0.0]]))
    tensor(1.7000)
    """
    chosen = logits.argmax(1)
    return (chosen == labels).sum() if labels.ndim == 1 else labels.gather(1, chosen[:, None]).sum()


@torch.no_grad()
def evaluate(
    networks: dict[str, nn.Module],
    images: ImageSet | Iterable[tuple[Tensor, Tensor]],
    device: torch.device,
    *,
    amp: str | None = None,
    channels_last: bool = False,
    workers: int = 0,
) -> dict[str, float]:
    """Returns `<name>_test_loss` and `<name>_test_accuracy` of each network; processes share the work.

    Args:
        networks: by name; they are put into evaluation mode.
        images: an image set, or a loader of (images, labels) that gives each process a part or all of them.
        device: of the networks.
        amp, channels_last, workers: see the options of the same names.

    Raises:
        ValueError: there are no images.
    """
    if isinstance(images, ImageSet):
        batches = torch.arange(len(images)).split(TEST_BATCH)[rank() :: world_size()]
        images = images.batches(batches, epoch=0, seed=0, workers=workers, pin_memory=device.type == "cuda")
    totals = torch.zeros(2 * len(networks) + 1, dtype=torch.float64, device=device)
    for network in networks.values():
        network.eval()
    for x, labels in images:
        x, labels = to_device(x, device, channels_last), labels.to(device, non_blocking=True)
        for i, network in enumerate(networks.values()):
            with autocast(device, amp):
                logits = network(x)
            totals[2 * i] += F.cross_entropy(logits.float(), labels, reduction="sum")
            totals[2 * i + 1] += correct(logits, labels)
        totals[-1] += len(labels)
    *sums, count = global_sum(totals.tolist())
    if not count:
        raise ValueError("test: expected at least one image, got none")
    row: dict[str, Any] = {}
    for i, name in enumerate(networks):
        row |= {f"{name}_test_loss": sums[2 * i] / count, f"{name}_test_accuracy": sums[2 * i + 1] / count}
    return row


def to_device(images: Tensor, device: torch.device, channels_last: bool) -> Tensor:
    """Returns the images on a device, in the memory format of the networks there."""
    memory_format = torch.channels_last if channels_last else torch.preserve_format
    return images.to(device, non_blocking=True, memory_format=memory_format)
