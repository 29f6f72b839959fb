"""Loss and accuracy of a network on a set of images."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adderops.distill.data import ImageSet
from adderops.distill.distributed import global_sum, rank, world_size

TEST_BATCH = 500


def correct(logits: Tensor, labels: Tensor) -> Tensor:
    return (logits.argmax(1) == labels).sum()


@torch.no_grad()
def evaluate(
    networks: dict[str, nn.Module],
    images: ImageSet,
    device: torch.device,
    *,
    amp: bool = False,
    channels_last: bool = False,
    workers: int = 0,
) -> dict[str, float]:
    """Returns `<name>_test_loss` and `<name>_test_accuracy` of each network; the processes share the work."""
    batches = torch.arange(len(images)).split(TEST_BATCH)[rank() :: world_size()]
    totals = torch.zeros(2 * len(networks), dtype=torch.float64, device=device)
    for network in networks.values():
        network.eval()
    for x, labels in images.batches(batches, epoch=0, seed=0, workers=workers, pin_memory=device.type == "cuda"):
        x, labels = to_device(x, device, channels_last), labels.to(device, non_blocking=True)
        for i, network in enumerate(networks.values()):
            with torch.autocast(device.type, torch.bfloat16, enabled=amp):
                logits = network(x)
            totals[2 * i] += F.cross_entropy(logits.float(), labels, reduction="sum")
            totals[2 * i + 1] += correct(logits, labels)
    sums = global_sum(totals.tolist())
    row: dict[str, Any] = {}
    for i, name in enumerate(networks):
        row |= {f"{name}_test_loss": sums[2 * i] / len(images), f"{name}_test_accuracy": sums[2 * i + 1] / len(images)}
    return row


def to_device(images: Tensor, device: torch.device, channels_last: bool) -> Tensor:
    memory_format = torch.channels_last if channels_last else torch.preserve_format
    return images.to(device, non_blocking=True, memory_format=memory_format)
