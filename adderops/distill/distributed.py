"""Several processes that train as one: means over all of them, with gradients, and BatchNorm over the whole batch.

The processes split each batch.  A loss made of `global_mean`s has the value of the whole batch on every process.
DistributedDataParallel averages the gradients of the processes, which gives the gradient of that loss.
Without torchrun all of this is the identity.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

T = TypeVar("T")
_alone = False


def in_use() -> bool:
    """Returns whether there are several processes: under torchrun, inside `process_group`."""
    return not _alone and dist.is_available() and dist.is_initialized()


@contextmanager
def alone() -> Iterator[None]:
    """While it is entered, this process counts as the only one; for what all processes compute alike."""
    global _alone
    _alone = True
    try:
        yield
    finally:
        _alone = False


def rank() -> int:
    return dist.get_rank() if in_use() else 0


def world_size() -> int:
    return dist.get_world_size() if in_use() else 1


@contextmanager
def process_group(device_type: str) -> Iterator[torch.device]:
    """Joins the processes that torchrun started, if it did, and yields the device of this process.

    Args:
        device_type: 'cpu', with gloo, or 'cuda', with nccl and one GPU per process.
    """
    if "WORLD_SIZE" not in os.environ:
        yield torch.device(device_type)
        return
    device = torch.device(device_type, int(os.environ["LOCAL_RANK"])) if device_type == "cuda" else torch.device("cpu")
    if device_type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device_type == "cuda" else "gloo")
    try:
        yield device
    finally:
        dist.destroy_process_group()


class FailedOnFirst(Exception):
    """Process 0 failed and reports why; the other processes end with this."""


def on_first(function: Callable[[], T]) -> T:
    """Calls a function on process 0 only; returns its result on every process.

    Raises:
        FailedOnFirst: on the other processes, if it failed; process 0 raises the error itself.
    """
    shared: list[tuple[T] | None] = [None]
    error = None
    if rank() == 0:
        try:
            shared = [(function(),)]
        except Exception as failure:
            error = failure
    if in_use():
        dist.broadcast_object_list(shared)
    if error is not None:
        raise error
    if shared[0] is None:
        raise FailedOnFirst
    return shared[0][0]


def share(batch: Tensor) -> Tensor:
    """Returns this process's share of the indices of a batch; the shares differ by at most one in length.

    >>> share(torch.arange(3))
    tensor([0, 1, 2])
    """
    return batch.tensor_split(world_size())[rank()]


class _GlobalMean(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, count: int) -> Tensor:
        total = torch.cat([value.detach().flatten() * count, value.new_tensor([count])])
        dist.all_reduce(total)
        ctx.weight = count * world_size() / total[-1]
        return (total[:-1] / total[-1]).view(value.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        mean = grad.contiguous().clone()
        dist.all_reduce(mean)
        return mean * (ctx.weight / world_size()), None


def global_mean(value: Tensor, count: int) -> Tensor:
    """Returns the mean over all processes of a local mean over `count` items: the same bits on each, differentiable.

    >>> global_mean(torch.tensor(3.0), count=5)
    tensor(3.)
    """
    return _GlobalMean.apply(value, count) if world_size() > 1 else value


def summed(values: Tensor) -> Tensor:
    """Returns the sums over all processes, on the same device."""
    if world_size() > 1:
        values = values.clone()
        dist.all_reduce(values)
    return values


def global_sum(values: list[float]) -> list[float]:
    """Returns the sums over all processes; every process gives the same numbers in the same order."""
    if world_size() == 1:
        return values
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    return summed(torch.tensor(values, dtype=torch.float64, device=device)).tolist()


@torch.no_grad()
def average_buffers(network: nn.Module) -> None:
    """Replaces every floating-point buffer of a network by its mean over all processes."""
    if world_size() > 1:
        for buffer in network.buffers():
            if buffer.is_floating_point():
                dist.all_reduce(buffer)
                buffer /= world_size()


class GlobalBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm over the batch of all processes, on any device; `torch.nn.SyncBatchNorm` refuses the CPU."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or world_size() == 1:
            return super().forward(x)
        pixels = x.numel() // x.size(1)
        mean = global_mean(x.mean((0, 2, 3)), pixels)
        centred = x - mean[:, None, None]
        var = global_mean(centred.square().mean((0, 2, 3)), pixels)
        running_mean, running_var, batches = self.running_mean, self.running_var, self.num_batches_tracked
        if running_mean is not None and running_var is not None and batches is not None:
            with torch.no_grad():
                batches += 1
                [total] = global_sum([pixels])
                # as in torch, no momentum means the mean over all batches
                momentum = 1 / batches.item() if self.momentum is None else self.momentum
                running_mean.lerp_(mean, momentum)
                running_var.lerp_(var * (total / (total - 1)), momentum)
        normalized = centred * (var + self.eps).rsqrt()[:, None, None]
        return normalized * self.weight[:, None, None] + self.bias[:, None, None] if self.affine else normalized


def synchronize_batchnorm(network: nn.Module, device: torch.device) -> nn.Module:
    """Replaces each BatchNorm2d of a network, in-place, by one over the batch of all processes; keeps all state."""
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(network)
    for module in network.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = GlobalBatchNorm2d  # the same parameters, buffers and settings
    return network
