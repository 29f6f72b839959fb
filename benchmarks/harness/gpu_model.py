"""Models what share of a training step L_mid takes on a GPU, by instructions and memory traffic; nothing is timed.

    python benchmarks/harness/gpu_model.py [--parts]

Runs the steps of launches.py on the meta device.  The time of an operation is the longer of two: its instructions at
the rate at which the multiprocessors issue them, and its bytes at the bandwidth of the memory.  Launches cost nothing
and nothing stalls, so a step takes longer than this; the model compares, it does not predict.

    instructions   INSTRUCTIONS, for each multiply-accumulate or |x - w|; one FFMA in torch's convolutions and products,
                   or with TF32 their share of the tensor cores' rate
    bytes          every argument read and every result written once, without a cache.  BatchNorm reads twice, first
                   for its sums; moments read the outputs once for each row of tiles, their gradient for each tile of
                   channels

L_mid is a PKKD step minus the steps of CNN and adder network: also the imitation of the logits and all else that PKKD
adds.
"""

import argparse
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness.launches import CONTESTANTS, NETWORKS, launches, step_of


@dataclass(frozen=True)
class Gpu:
    """Published peaks of a card, dense."""

    fp32: float  # FLOP/s: 2 for each lane and clock, as many as instructions are issued
    tf32: float
    bandwidth: float  # bytes/s


# NVIDIA H200 Tensor Core GPU datasheet (SXM, 2024; tensor cores without sparsity); NVIDIA Ada GPU Architecture, V2.01
# (2023), GeForce RTX 4090 at its boost clock
GPUS = {"H200": Gpu(67e12, 494.5e12, 4.8e12), "RTX 4090": Gpu(82.6e12, 82.6e12, 1.008e12)}

# Issued for each multiply-accumulate or |x - w| by the tile for so many channels, the last one's for more:
# `python tests/machine_code/cuda_budgets.py --arch 90`, contiguous float32, NVRTC 13.0, 2026-11-30
INSTRUCTIONS = {
    "adder_conv2d": {16: 2.65, 32: 2.33, 64: 2.19, 128: 2.16},  # of the output
    "adder_conv2d_grad_x": {16: 2.81, 32: 2.40, 64: 2.23},  # of the input
    "adder_conv2d_grad_w": {16: 1.82, 32: 1.42, 64: 1.24, 128: 1.23},  # of the output
    "_kernel_moments": {32: 2.22, 64: 1.49, 128: 1.31, 256: 1.52},  # of student and teacher; 256: several tiles of 128
    "_kernel_moments_grad": {16: 2.34, 32: 1.68, 64: 1.36},  # of the student
}


class Operation(NamedTuple):
    """What is launched: multiply-accumulates of torch, instructions of csrc/cuda, bytes."""

    name: str
    products: float
    instructions: float
    bytes: float


def _tile(name: str, channels: int) -> tuple[int, float]:
    """The smallest tile that holds all channels, or the largest, and its instructions."""
    tiles = INSTRUCTIONS[name]
    return next((item for item in tiles.items() if channels <= item[0]), list(tiles.items())[-1])


def _moments(student: list[Tensor], teacher: list[Tensor], *_: Any) -> tuple[float, float]:
    """Instructions and bytes: the tiles on and below the diagonal."""
    instructions, traffic = 0.0, 0.0
    for y, c in zip(student, teacher, strict=True):
        channels = y.size(1) + c.size(1)
        side, factor = _tile("_kernel_moments", channels)
        side = min(side, 128)
        across = -(-channels // side)
        instructions += factor * across * (across + 1) / 2 * side**2 * (y.numel() / y.size(1))
        traffic += across * (y.nbytes + c.nbytes) + 4 * channels * (channels + 1)
    return instructions, traffic


def _moments_grad(grad: Tensor, student: list[Tensor], teacher: list[Tensor], *_: Any) -> tuple[float, float]:
    instructions, traffic = 0.0, float(grad.nbytes)
    for y, c in zip(student, teacher, strict=True):
        tile, factor = _tile("_kernel_moments_grad", y.size(1))
        tiles = -(-y.size(1) // tile)
        instructions += factor * tiles * tile * (y.size(1) + c.size(1)) * (y.numel() / y.size(1))
        traffic += tiles * (y.nbytes + c.nbytes) + y.nbytes
    return instructions, traffic


def _adder(name: str, args: tuple[Any, ...], terms: float) -> float:
    first, second, *_ = args
    channels = first.size(1) if name == "adder_conv2d_grad_w" else second.size(0 if name == "adder_conv2d" else 1)
    return _tile(name, channels)[1] * terms


class Work(TorchDispatchMode):
    """Lists what is launched while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Operation] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not launches(func, args):
            return result
        name = func._schema.name.partition("::")[2]
        formula = flop_registry.get(func._overloadpacket)
        terms = formula(*args, **(kwargs or {}), out_val=result) / 2 if formula else 0.0
        tensors = {id(t): t for t in tree_leaves((args, kwargs, result)) if isinstance(t, Tensor)}
        traffic = float(sum(t.nbytes for t in tensors.values()))
        if name.startswith("native_batch_norm"):
            traffic += sum(t.nbytes for t in args if isinstance(t, Tensor))
        if name == "_kernel_moments":
            operation = Operation(name, 0, *_moments(*args))
        elif name == "_kernel_moments_grad":
            operation = Operation(name, 0, *_moments_grad(*args))
        elif name in INSTRUCTIONS:
            operation = Operation(name, 0, _adder(name, args, terms), traffic)
        else:
            operation = Operation(name, terms, 0, traffic)
        self.operations.append(operation)
        return result


def seconds(gpu: Gpu, operation: Operation, tf32: bool) -> float:
    """The modelled time of an operation."""
    issue = gpu.fp32 / 2
    arithmetic = operation.instructions / issue + operation.products / (gpu.tf32 / 2 if tf32 else issue)
    return max(arithmetic, operation.bytes / gpu.bandwidth)


def work_of(arch: str, contestant: str) -> list[Operation]:
    """Returns the operations of a step; the second one, which finds momentum."""
    step = step_of(arch, contestant)
    step()
    with Work() as mode:
        step()
    return mode.operations


def parts(gpu: Gpu, operations: list[Operation], tf32: bool) -> Counter[str]:
    """Returns the seconds of a step by operation."""
    found: Counter[str] = Counter()
    for operation in operations:
        found[operation.name] += seconds(gpu, operation, tf32)  # type: ignore[assignment]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", action="store_true", help="also the seconds of PKKD by operation")
    options = parser.parse_args()
    print("| network | GPU | convolutions | CNN, ms | adder, ms | PKKD, ms | L_mid, % of PKKD | PKKD / (CNN + adder) |")
    print("|---|---|---|---|---|---|---|---|")
    for arch in NETWORKS:
        work = {contestant: work_of(arch, contestant) for contestant in CONTESTANTS}
        for name, gpu in GPUS.items():
            for tf32 in (False, True):
                of = {contestant: parts(gpu, operations, tf32) for contestant, operations in work.items()}
                cnn, plain, pkkd = (1e3 * of[contestant].total() for contestant in CONTESTANTS)
                share = 100 * (pkkd - cnn - plain) / pkkd
                kind = "TF32" if tf32 else "float32"
                print(
                    f"| {arch} | {name} | {kind} | {cnn:.2f} | {plain:.2f} | {pkkd:.2f} | {share:.1f} | "
                    f"{pkkd / (cnn + plain):.3f} |"
                )
                for operation, time in of["pkkd"].most_common(12) if options.parts else ():
                    print(f"    {operation:<32}{1e3 * time:9.3f}")


if __name__ == "__main__":
    main()
