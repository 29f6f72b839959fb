"""A training step on a GPU, without one: it reads nothing back, it is few launches, and it can be one graph.

The meta device stands in for a GPU where only the operations matter: it has no values, so that the host cannot read
any, and a dispatch mode refuses what would wait for one.  The graph is recorded and run again on the CPU, operation by
operation on the same memory, as a CUDA graph is.
"""

from collections.abc import Callable, Iterator
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from adderops.distill import Distillation, Options, PKKDTask
from adderops.distill.batches import Part
from adderops.distill.build import MovingAverage
from adderops.distill.graph import WARM_UP, Recorder, StepGraph
from adderops.distill.loop import Loop
from adderops.distill.methods import Losses
from adderops.distill.schedule import make_schedule
from adderops.distill.sums import Sums
from adderops.distill.trainer import Run
from adderops.models import create_model, lenet5
from distill.runs import assert_same_state

META = torch.device("meta")


@pytest.fixture(autouse=True)
def _one_thread(set_threads):
    set_threads(1)
    torch.manual_seed(0)


class Waiting(Exception):
    """An operation for which the host waits for the device."""


class RefuseWaiting(TorchDispatchMode):
    """Refuses operations that read values of a device on the host, or copy between the two."""

    READS = ("_local_scalar_dense", "item", "nonzero", "equal", "is_nonzero", "masked_select", "unique")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.partition("::")[2]
        result = func(*args, **(kwargs or {}))
        devices = {t.device.type for t in tree_leaves((args, kwargs, result)) if isinstance(t, Tensor)}
        if "meta" in devices and (name in self.READS or (name in ("_to_copy", "copy_") and len(devices) > 1)):
            raise Waiting(f"{name} of the meta device")
        return result


class RefuseSending(TorchFunctionMode):
    """Refuses tensors made on a device out of numbers of the host."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func in (torch.tensor, torch.as_tensor, Tensor.new_tensor) and result.is_meta and result.numel():
            raise Waiting(f"{func.__name__} to the meta device")
        return result


class Repeated:
    """The same images in each step, rolled, already on the device; some steps of an epoch have fewer."""

    def __init__(self, images: Tensor, labels: Tensor, steps: int, short: dict[int, int] | None = None) -> None:
        self.batch, self.counts = (images, labels), [(short or {}).get(step, len(images)) for step in range(steps)]
        self.images = sum(self.counts)

    def steps(self, epoch: int, start: int = 0) -> Iterator[tuple[list[Part], bool]]:
        for step, count in enumerate(self.counts[start:], start):
            images, labels = (t.roll(step + 3 * epoch, 0)[:count] for t in self.batch)
            yield [Part(images, labels, count, 1.0)], step == len(self.counts) - 1

    def calibration(self, count: int) -> Iterator[Tensor]:
        yield self.batch[0]


def meta_loop(arch: str, task: Callable[[], nn.Module] | None = None, **options) -> Loop:
    """A loop on the meta device that never comes to the last step of its first epoch."""
    with META:
        channels = {"in_channels": 1} if arch == "lenet5" else {}
        built = task() if task else PKKDTask(*(create_model(arch, kind, **channels) for kind in ("cnn", "adder")))
        images = torch.empty(4, 1 if arch == "lenet5" else 3, 32, 32)
        labels = torch.empty(4, dtype=torch.int64)
    optimizer = torch.optim.SGD([p for p in built.parameters() if p.requires_grad], 0.1, momentum=0.9, foreach=True)
    schedule = make_schedule(optimizer, 2, steps_per_epoch=10)
    batches = Repeated(images, labels, 10)
    if options.pop("ema", False):
        options["average"] = MovingAverage(built.networks["student"], 0.9)
    return Loop(built, optimizer, schedule, batches, 2, device=META, per_step=True, **options)


def run_steps(loop: Loop, count: int = 2) -> None:
    with RefuseWaiting(), RefuseSending():
        for progress in loop:
            if progress.step == count:
                return


@pytest.mark.parametrize("arch, options", [("lenet5", {}), ("resnet20", {"clip": 1.0, "ema": True})])
def test_a_step_reads_nothing_back(arch, options):
    """The second step too, which finds momentum and an average."""
    run_steps(meta_loop(arch, **options))


@pytest.mark.parametrize("options", [{"features": "1x1"}, {"features": "kernel", "logits": False}], ids=str)
def test_other_losses_read_nothing_back(options):
    run_steps(meta_loop("lenet5", lambda: PKKDTask(lenet5("cnn"), lenet5("adder"), Distillation(**options))), 1)


def test_the_moving_average_is_that_of_torch():
    """Which sends a count to the device in each step, and then does the same."""
    network = lenet5("adder")
    average = get_ema_multi_avg_fn(0.9)
    ours, theirs = MovingAverage(network, 0.9), AveragedModel(network, multi_avg_fn=average, use_buffers=True)
    for _ in range(3):
        with torch.no_grad():
            network(torch.randn(4, 1, 32, 32))  # moves the statistics of BatchNorm
            for parameter in network.parameters():
                parameter += torch.randn_like(parameter)
        ours.update_parameters(network)
        theirs.update_parameters(network)
        assert_same_state(dict(ours.state_dict()), dict(theirs.state_dict()), "average")


class Reads(PKKDTask):
    """Does what a step must not do."""

    how: Callable[[Tensor], object]

    def forward(self, images: Tensor, labels: Tensor) -> Losses:
        losses = super().forward(images, labels)
        type(self).how(losses.total.detach())
        return losses


@pytest.mark.parametrize(
    "how",
    [
        lambda x: x.item(),
        lambda x: bool(x > 0),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: x.new_tensor([1.0]),
        lambda x: x[None].nonzero(),
        lambda x: torch.equal(x, x),
    ],
    ids=["item", "bool", "tolist", "cpu", "a number sent", "nonzero", "equal"],
)
def test_what_would_wait_is_noticed(how):
    Reads.how = staticmethod(how)
    with pytest.raises((Waiting, RuntimeError, NotImplementedError), match="item|meta|Meta"):
        run_steps(meta_loop("lenet5", lambda: Reads(lenet5("cnn"), lenet5("adder"))), 1)


def test_losses_that_are_not_finite_stop_before_they_are_saved():
    """The rule of a GPU: no step looks, whoever saves does."""
    sums = Sums.of({"student_loss": float("nan"), "student_train_accuracy": 3.0}, torch.device("cpu"))
    loop = meta_loop("lenet5")
    loop.sums, loop.images = sums, 8
    with pytest.raises(FloatingPointError, match="^loss is not finite: student_loss nan$"):
        loop.require_finite()


def test_a_checkpoint_is_not_overwritten_by_losses_that_are_not_finite(tmp_path):
    loop = loop_of(None)
    run = Run(loop, tmp_path, quiet=True)
    next(iter(loop))
    run._save({"config": {}})
    before = (tmp_path / "checkpoint.pt").read_bytes()
    loop.sums.values[0] = float("inf")
    with pytest.raises(FloatingPointError, match="loss is not finite: student_loss inf, student_ce"):
        run._save({"config": {}})
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


# --- a graph ---


class Rerun(TorchDispatchMode):
    """Records operations and runs them again into the same memory; the operations are all that is recorded.

    Unlike a CUDA graph it runs them while it records them, so the first run is done then.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple] = []
        self.warmed, self.recorded, self.replayed = 0, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result

    def warm_up(self, step: Callable[[], Sums]) -> Sums:
        self.warmed += 1
        return step()

    def record(self, step: Callable[[], Sums]) -> Callable[[], Sums]:
        with self:
            sums = step()
        self.recorded += 1

        def replay() -> Sums:
            self.replayed += 1
            for func, args, kwargs, result in self.calls if self.replayed > 1 else ():
                with torch.no_grad():
                    again = func(*args, **kwargs)
                for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                    if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)
            return sums

        return replay


def loop_of(recorder: Recorder | None, device: str = "cpu", **options) -> Loop:
    """Two epochs of seven steps, the last of eight images fewer, with a learning rate for each step."""
    torch.manual_seed(0)
    task = PKKDTask(lenet5("cnn", num_classes=4), lenet5("adder", num_classes=4)).to(device)
    # as on a GPU: the other forms would read the tensor with the learning rate on the host
    settings = {"momentum": 0.9, "weight_decay": 5e-4, "nesterov": True, "fused": True}
    optimizer = torch.optim.SGD(task.parameters(), 0.1, **settings)
    images, labels = torch.randn(8, 1, 32, 32).to(device), (torch.arange(8) % 4).to(device)
    batches = Repeated(images, labels, 7, short={5: 6, 6: 5})
    schedule = make_schedule(optimizer, 2, warmup=1, steps_per_epoch=7)
    loop = Loop(task, optimizer, schedule, batches, 2, device=torch.device(device), per_step=True, **options)
    if recorder is not None:
        loop.graph = StepGraph(loop._train_on, optimizer, loop.device, recorder)
    return loop


def trained(loop: Loop) -> tuple[dict[str, Tensor], list[dict[str, float]], list[dict]]:
    """The weights at the end, the losses of each step, read after the last, and the rows of the log."""
    steps = list(loop)
    return dict(loop.task.state_dict()), [progress.losses for progress in steps], loop.rows


@pytest.mark.parametrize("options", [{}, {"clip": 1.0}], ids=str)
def test_a_graph_gives_the_bits_of_the_steps_it_replaces(options):
    """Of 14 steps, 3 warm up, 4 are too short and the diagnosis of the last is one of them; 7 are by the graph."""
    recorder = Rerun()
    assert_same_state(trained(loop_of(recorder, **options)), trained(loop_of(None, **options)), "loop")
    assert (recorder.warmed, recorder.recorded, recorder.replayed) == (WARM_UP, 1, 14 - WARM_UP - 4)


def test_a_number_of_the_host_is_fixed_in_a_graph(monkeypatch):
    """The test above can tell: with learning rates that are numbers the recorded step keeps the first one."""
    monkeypatch.setattr(StepGraph, "rates", lambda self: nullcontext())
    ours, theirs = (trained(loop_of(recorder)) for recorder in (Rerun(), None))
    assert ours[1][: WARM_UP + 2] == theirs[1][: WARM_UP + 2] != ours[1][2:]
    with pytest.raises(AssertionError):
        assert_same_state(ours, theirs, "loop")


def test_learning_rates_are_numbers_between_the_steps():
    loop = loop_of(Rerun())
    seen = [progress.optimizer.param_groups[0]["lr"] for progress in loop]
    assert all(isinstance(lr, float) for lr in seen) and len(set(seen)) == 14


def test_a_graph_needs_one_process_on_a_gpu():
    with pytest.raises(ValueError, match="cuda_graph: expected one process that trains on a GPU, got cpu"):
        loop_of(None, cuda_graph=True)


@pytest.mark.parametrize(
    "other, expected, got",
    [("device", "auto or cuda", "cpu"), ("accumulate", "1", 2), ("amp", "none or bfloat16", "float16")],
)
def test_options_that_exclude_a_graph(other, expected, got):
    with pytest.raises(ValueError, match=f"cuda_graph: expected --{other} {expected} with it, got --{other} {got}"):
        Options(cuda_graph=True, **{other: got})
