"""A training step as one CUDA graph: recorded once, then launched as a whole for each batch of the same shape.

A step of small layers takes the host longer to launch than the GPU to run; a graph has one launch.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from adderops.distill.sums import Sums

# Steps before the recording, so that torch and its libraries have allocated and chosen what they keep.
WARM_UP = 3


class Recorder(Protocol):
    """What records and runs steps."""

    def warm_up(self, step: Callable[[], Sums]) -> Sums:
        """Runs a step as it will be recorded."""

    def record(self, step: Callable[[], Sums]) -> Callable[[], Sums]:
        """Returns a function that runs the step again, with the tensors it has now, and does not run it yet."""


class CudaRecorder:
    """Records CUDA graphs, on streams of their own as torch asks for."""

    def warm_up(self, step: Callable[[], Sums]) -> Sums:
        own, current = torch.cuda.Stream(), torch.cuda.current_stream()
        own.wait_stream(current)
        with torch.cuda.stream(own):
            sums = step()
        current.wait_stream(own)
        return sums

    def record(self, step: Callable[[], Sums]) -> Callable[[], Sums]:
        graph = torch.cuda.CUDAGraph()
        # other threads, which pin the memory of the next batch, may go on
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            sums = step()

        def replay() -> Sums:
            graph.replay()
            return sums

        return replay


class StepGraph:
    """Runs training steps, from the fourth on by a graph.

    The graph is for batches of the shape and layout of the first one; others, such as a short last batch, run without
    it.  What a step reads from the host is fixed in the recording, except the learning rates: they are tensors while a
    step runs, so schedules work.

    Args:
        step: a whole optimizer step on (images, labels); returns its sums.
        optimizer: that the step uses; fused, so that a learning rate that is a tensor is read on the device.
        device: of its parameters.
        recorder: makes the graph.
    """

    def __init__(
        self,
        step: Callable[[Tensor, Tensor], Sums],
        optimizer: Optimizer,
        device: torch.device,
        recorder: Recorder | None = None,
    ) -> None:
        self.step, self.optimizer, self.recorder = step, optimizer, recorder or CudaRecorder()
        self._rates = [torch.zeros((), device=device) for _ in optimizer.param_groups]
        self._inputs: tuple[Tensor, ...] = ()  # of the recorded step
        self._warm = 0  # steps so far
        self._replay: Callable[[], Sums] | None = None

    @contextmanager
    def rates(self) -> Iterator[None]:
        """While it is entered, the learning rates are tensors on the device."""
        groups = self.optimizer.param_groups
        given = [group["lr"] for group in groups]
        for group, rate in zip(groups, self._rates, strict=True):
            group["lr"] = rate.fill_(group["lr"])
        try:
            yield
        finally:
            for group, lr in zip(groups, given, strict=True):
                group["lr"] = lr

    def __call__(self, images: Tensor, labels: Tensor) -> Sums:
        """Makes an optimizer step."""
        batch = images, labels
        self._inputs = self._inputs or tuple(map(torch.empty_like, batch))
        with self.rates():
            if list(map(_layout, batch)) != list(map(_layout, self._inputs)):
                return self.step(images, labels)
            if self._warm < WARM_UP:
                self._warm += 1
                return self.recorder.warm_up(lambda: self.step(images, labels))
            for recorded, given in zip(self._inputs, batch, strict=True):
                recorded.copy_(given)
            if self._replay is None:
                self._replay = self.recorder.record(lambda: self.step(*self._inputs))
            sums = self._replay()
            return Sums(sums.names, sums.values.clone())  # the next step overwrites them


def _layout(x: Tensor) -> tuple[object, ...]:
    return x.shape, x.stride(), x.dtype
