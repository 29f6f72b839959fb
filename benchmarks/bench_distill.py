"""Times whole training steps: CNN, plain adder network, logit distillation and PKKD, and PKKD in eager PyTorch.

    python benchmarks/bench_distill.py                       LeNet-5-BN and ResNet-20, a minute or two on two cores
    python benchmarks/bench_distill.py --csv r.csv
    python benchmarks/bench_distill.py --device cuda [--cuda-graph]

A step is forward, losses, backward and optimizer, without reading images.  The contestants of a network take turns and
are compared by their medians (harness/timing.py).  The eager step is the same computation as it is usually written:
adder layers through one broadcast temporary (harness/peers.py); side branches as exp, 1x1 convolution, BatchNorm and
mean squared error of whole tensors.  It gets fewer images; images per second are compared.

`pkkd / (plain + cnn)` is the time of a PKKD step over the sum of the other two, which is the cost of training teacher
and student side by side without distillation.

The CSV file starts with the machine as comments.  A row has network, contestant, memory_format, batch, seconds, spread
and images_per_s.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from harness import cuda_device, peers, report
from harness.timing import Contestant, take_turns, wall_clock
from torch import Tensor, nn

import adderops.info
from adderops import AdderConv2d
from adderops.distill import Distillation, FeatureMatch, PKKDTask, SingleTask
from adderops.distill.graph import WARM_UP, StepGraph
from adderops.distill.methods.matching import STUDENT_FACTOR, TEACHER_FACTOR
from adderops.distill.sums import Sums
from adderops.models import create_model, matched_layers

# network: batch size of all contestants, and of the eager one (keeps its temporaries below 1 GiB)
NETWORKS = {"lenet5": (256, 32), "resnet20": (128, 4)}
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


class _Geometry(NamedTuple):
    """The attributes of a layer that peers.py reads."""

    kernel: int
    stride: int
    padding: int
    out_size: int


class _EagerAdder(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, w: Tensor, geometry: _Geometry) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.geometry = geometry
        return peers.eager_forward(geometry, x, w)

    @staticmethod
    def backward(ctx, grad_y: Tensor):
        return *peers.eager_gradients(ctx.geometry, *ctx.saved_tensors, grad_y), None


class EagerAdderConv2d(AdderConv2d):
    """The adder layer as the broadcast formula."""

    def forward(self, x: Tensor) -> Tensor:
        kernel, stride, padding = self.kernel_size[0], self.stride[0], self.padding[0]
        out_size = (x.size(2) + 2 * padding - kernel) // stride + 1
        return _EagerAdder.apply(x, self.rated_weight(), _Geometry(kernel, stride, padding, out_size))


class _EagerBranch(nn.Module):
    """Kernel, 1x1 convolution, BatchNorm."""

    def __init__(self, channels: int, sign: float, factor: float) -> None:
        super().__init__()
        self.sign, self.factor = sign, factor
        self.linear = nn.Conv2d(channels, channels, 1, bias=False)
        nn.init.dirac_(self.linear.weight)
        self.norm = nn.BatchNorm2d(channels, affine=False, track_running_stats=False)

    def forward(self, output: Tensor) -> Tensor:
        width = self.factor * output.detach().abs().mean()
        return self.norm(self.linear((self.sign * output / width).clamp(-10, 10).exp()))


class EagerMatch(FeatureMatch):
    """L_mid through tensors as large as the outputs."""

    def __init__(self, channels: list[int]) -> None:
        super().__init__(channels)
        self.branches = nn.ModuleList(
            nn.ModuleList([_EagerBranch(c, 1.0, STUDENT_FACTOR), _EagerBranch(c, -1.0, TEACHER_FACTOR)])
            for c in channels
        )

    def forward(self, student: list[Tensor], teacher: list[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        terms = [
            F.mse_loss(of_student(y), of_teacher(c))
            for (of_student, of_teacher), y, c in zip(self.branches, student, teacher, strict=True)
        ]
        return torch.stack(terms).mean(), {}


def task_of(arch: str, contestant: str, memory_format: torch.memory_format) -> nn.Module:
    """Builds the networks and losses of a contestant."""
    teacher, student = (
        create_model(arch, kind, in_channels=1).to(memory_format=memory_format) for kind in ("cnn", "adder")
    )
    if contestant == "cnn":
        return SingleTask(teacher, "teacher")
    if contestant == "plain":
        return SingleTask(student, "student")
    if contestant == "logits":
        return PKKDTask(teacher, student, Distillation(features="none"))
    task = PKKDTask(teacher, student)
    if contestant == "pkkd":
        return task
    for layer in matched_layers(student).values():
        if isinstance(layer, AdderConv2d):
            layer.__class__ = EagerAdderConv2d
    task.match = EagerMatch([layer.out_channels for layer in matched_layers(student).values()])
    return task


def step_of(
    arch: str, contestant: str, memory_format: torch.memory_format, batch: int, device: str, cuda_graph: bool = False
) -> Callable[[], object]:
    """Returns a function that runs one training step on images in memory, on request as one CUDA graph."""
    torch.manual_seed(0)
    task = task_of(arch, contestant, memory_format).to(device)
    images = torch.randn(batch, 1, 32, 32).to(device, memory_format=memory_format)
    labels = torch.randint(0, 10, (batch,)).to(device)
    parameters = [p for p in task.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, 0.01, momentum=0.9, fused=device == "cuda")

    def step(images: Tensor, labels: Tensor) -> Sums:
        optimizer.zero_grad()
        loss = task(images, labels).total
        loss.backward()
        optimizer.step()
        return Sums(["loss"], loss.detach()[None])

    call = StepGraph(step, optimizer, torch.device(device)) if cuda_graph else step
    return lambda: call(images, labels)


def check_eager_match() -> None:
    """Raises AssertionError if the eager L_mid is not the product's: the comparison would mean nothing."""
    torch.manual_seed(0)
    y, c = [-100 * torch.rand(8, 16, 16, 16)], [torch.randn(8, 16, 16, 16)]
    ours, theirs = FeatureMatch([16])(y, c)[0].item(), EagerMatch([16])(y, c)[0].item()
    if abs(ours / theirs - 1) > 1e-4:
        raise AssertionError(f"L_mid: expected {ours}, got {theirs} from the eager branches")


def clock(step: Callable[[], object], device: str) -> Callable[[int], float]:
    """Times steps that follow each other without waiting for the device, as in training, until all are done."""
    if device == "cpu":
        return wall_clock(step)

    def measure(repeats: int) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(repeats):
            step()
        torch.cuda.synchronize()
        return time.perf_counter() - start

    return measure


def bench(arch: str, budget: float, device: str, batch: int | None, cuda_graph: bool) -> list[dict[str, object]]:
    """Times all contestants of a network in turns and returns their rows."""
    usual, most = NETWORKS[arch]
    batch = batch or usual
    eager_batch = min(batch, most)
    contestants, of_name = [], {}
    for memory_format in FORMATS:
        for contestant in ("cnn", "plain", "logits", "pkkd"):
            name = f"{contestant}, {memory_format}"
            of_name[name] = (contestant, memory_format, batch)
    of_name["pkkd in eager PyTorch, contiguous"] = ("eager", "contiguous", eager_batch)
    for name, (contestant, memory_format, images) in of_name.items():
        step = step_of(arch, contestant, FORMATS[memory_format], images, device, cuda_graph)
        if cuda_graph:
            for _ in range(WARM_UP + 1):  # and the recording
                step()
        contestants.append(Contestant(name, images, clock(step, device)))
    # a sample on a GPU is many steps, because the host queues work ahead of the device
    timings = take_turns(contestants, budget, sample=0.1 if device == "cuda" else 0.004, least=5)
    return [
        {
            "network": arch,
            "contestant": contestant,
            "memory_format": memory_format,
            "batch": images,
            "seconds": timings[name].seconds,
            "spread": timings[name].spread,
            "images_per_s": images / timings[name].seconds,
        }
        for name, (contestant, memory_format, images) in of_name.items()
    ]


def table(rows: list[dict[str, object]]) -> str:
    lines = [f"{'network':<10}{'step':<8}{'memory format':<15}{'batch':>6}{'ms':>9}{'images/s':>10}{'of a CNN':>10}"]
    rate = {(r["network"], r["contestant"], r["memory_format"]): r["images_per_s"] for r in rows}
    for row in rows:
        share = row["images_per_s"] / rate[row["network"], "cnn", row["memory_format"]]
        lines.append(
            f"{row['network']:<10}{row['contestant']:<8}{row['memory_format']:<15}{row['batch']:>6}"
            f"{1e3 * row['seconds']:>9.1f}{row['images_per_s']:>10.0f}{share:>10.3f}"
        )
    for network in dict.fromkeys(row["network"] for row in rows):
        for memory_format in FORMATS:
            seconds = {c: 1 / rate[network, c, memory_format] for c in ("cnn", "plain", "logits", "pkkd")}
            both = seconds["cnn"] + seconds["plain"]
            lines.append(
                f"{network}, {memory_format}: pkkd / (plain + cnn) = {seconds['pkkd'] / both:.3f}, "
                f"logits / (plain + cnn) = {seconds['logits'] / both:.3f}"
            )
        eager = rate[network, "pkkd", "contiguous"] / rate[network, "eager", "contiguous"]
        lines.append(f"{network}: pkkd / the same step in eager PyTorch = {eager:.1f}x the images/s")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="(default: cpu)")
    parser.add_argument("--cuda-graph", action="store_true", help="each step as one CUDA graph (needs --device cuda)")
    parser.add_argument("--batch", type=int, metavar="N", help="batch size, for the eager step at most its usual one")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=45.0, help="time budget per network (default: 45)")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write machine and rows to FILE")
    options = parser.parse_args()
    if options.cuda_graph and options.device != "cuda":
        parser.error("--cuda-graph: expected --device cuda, got cpu")
    if options.batch is not None and options.batch < 1:
        parser.error(f"--batch: expected at least 1, got {options.batch}")
    if options.device == "cuda":
        cuda_device.require()
    torch.set_num_threads(options.threads)
    check_eager_match()
    machine = report.machine(options.threads, adderops.info.describe()["instruction set in use"])
    if options.device == "cuda":
        machine |= cuda_device.description()
    for name, value in machine.items():
        print(f"{name:<24}{value}")
    rows = []
    for arch in options.networks:
        rows += bench(arch, options.seconds, options.device, options.batch, options.cuda_graph)
    print(table(rows))
    if options.csv:
        report.write_csv(options.csv, machine, rows)


if __name__ == "__main__":
    main()
