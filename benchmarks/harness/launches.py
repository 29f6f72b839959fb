"""Counts what a training step launches on a GPU, without one: the operations on the meta device that are not views.

    python benchmarks/harness/launches.py [--operations]

One line per network: a step of the CNN, of the adder network by the labels, and of both by PKKD, and what PKKD adds to
the other two; forward, losses, backward and optimizer (SGD with momentum, torch's default on a GPU).

An operation counts once, though some launch two kernels (a product split over its inner dimension, a convolution that
packs its weights).  Those on lists of tensors count what becomes of them: by torch's multi_tensor_apply with 4 KiB of
arguments, or by the lists of csrc/cuda (KERNELS).
"""

import argparse
import re
import sys
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from adderops.distill import PKKDTask, SingleTask
from adderops.models import create_model

# network: batch size and side of its images
NETWORKS = {"resnet20": (256, 32), "resnet50": (64, 224)}
CONTESTANTS = ("cnn", "plain", "pkkd")


# torch's ATen/native/cuda/MultiTensorApply.cuh, where a launch has 4 KiB of arguments: tensors by number of lists
_CHUNK, _MOST_BLOCKS, _MOST_TENSORS = 65536, 320, (110, 64, 48, 36, 30)


def multi_tensor_launches(lists: Sequence[Sequence[Tensor]]) -> int:
    """Kernels of an operation that torch applies to lists of tensors."""
    most = _MOST_TENSORS[min(len(lists), len(_MOST_TENSORS)) - 1]
    launches, tensors, blocks = 0, 0, 0
    for tensor in lists[0]:
        tensors += 1
        for _ in range(-(-tensor.numel() // _CHUNK)):
            if blocks == _MOST_BLOCKS:
                launches, tensors, blocks = launches + 1, 1, 0
            blocks += 1
        if tensors == most:
            launches, tensors, blocks = launches + 1, 0, 0
    return launches + (blocks > 0)


class Launches(TorchDispatchMode):
    """Counts launches by operation while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.counts[func._schema.name.partition("::")[2]] += launches(func, args)
        return result


def launches(func: Any, args: tuple[Any, ...]) -> int:
    """Returns how many kernels a call launches."""
    namespace, _, name = func._schema.name.partition("::")
    if namespace == "adderops":
        return KERNELS.get(name, lambda *_: 1)(*args)
    if name.startswith(("_foreach_", "_fused_")):
        lists = [a for a in args if isinstance(a, (list, tuple)) and a and isinstance(a[0], Tensor)]
        return multi_tensor_launches(lists)
    if namespace == "profiler":  # marks the optimizer's step
        return 0
    view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
    allocation = name.removeprefix("new_").startswith("empty")
    return not (view or allocation or name == "_unsafe_view")


def _layers_per_launch(file: str, name: str) -> int:
    source = (Path(__file__).resolve().parents[2] / "csrc" / "cuda" / file).read_text()
    return int(re.search(rf"constexpr int {name} = (\d+);", source)[1])


def _two_per_list(kinds: Iterable[Hashable], most: int) -> int:
    """Each kind of layers has lists of its own, and two kernels for each list."""
    return sum(2 * -(-number // most) for number in Counter(kinds).values())


def _channels_last(student: Tensor, teacher: Tensor) -> bool:
    return student.stride(1) == teacher.stride(1) == 1


def _of_mean_abs(x: Sequence[Tensor]) -> int:
    return _two_per_list([None] * len(x), _layers_per_launch("mean_abs.cuh", "kMeanAbsTensors"))


def _of_moments(student: Sequence[Tensor], teacher: Sequence[Tensor], *_: Any) -> int:
    """Kinds as in moments.cu: the side of a tile, whether they are several, and the layout."""

    def kind(y: Tensor, c: Tensor) -> Hashable:
        for side in (32, 64, 128):
            channels = sum(-(-x.size(1) // (side // 8)) * (side // 8) for x in (y, c))
            if channels <= side:
                break
        return side, channels > side, _channels_last(y, c)

    return _two_per_list(map(kind, student, teacher), _layers_per_launch("moments.cuh", "kMomentsLayers"))


def _of_moments_grad(_: Tensor, student: Sequence[Tensor], teacher: Sequence[Tensor], *__: Any) -> int:
    """Kinds as in moments_grad.cu: the channels of a tile and the layout."""
    kinds = [(y.size(1) > 16, y.size(1) > 32, _channels_last(y, c)) for y, c in zip(student, teacher, strict=True)]
    return _two_per_list(kinds, _layers_per_launch("moments_grad.cuh", "kMomentsGradLayers"))


def _of_match_rows(mixed_a: Sequence[Tensor], *_: Any) -> int:
    return _two_per_list([None] * len(mixed_a), _layers_per_launch("match.cuh", "kMatchGroups"))


KERNELS: dict[str, Callable[..., int]] = {
    "_mean_abs": _of_mean_abs,
    "_kernel_moments": _of_moments,
    "_kernel_moments_grad": _of_moments_grad,
    "_match_rows": _of_match_rows,
}


def step_of(arch: str, contestant: str) -> Callable[[], None]:
    """Returns a function that runs one training step on the meta device."""
    batch, side = NETWORKS[arch]
    with torch.device("meta"):
        teacher, student = (create_model(arch, kind) for kind in ("cnn", "adder"))
        task: nn.Module = {
            "cnn": lambda: SingleTask(teacher, "teacher"),
            "plain": lambda: SingleTask(student, "student"),
            "pkkd": lambda: PKKDTask(teacher, student),
        }[contestant]()
        images, labels = torch.empty(batch, 3, side, side), torch.empty(batch, dtype=torch.int64)
    parameters = [p for p in task.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, 0.1, momentum=0.9, weight_decay=5e-4, foreach=True)

    def step() -> None:
        optimizer.zero_grad()
        task(images, labels).total.backward()
        optimizer.step()

    return step


def count(arch: str, contestant: str) -> Counter[str]:
    """Returns the launches of a step by operation; the second one, which finds momentum."""
    step = step_of(arch, contestant)
    step()
    with Launches() as mode:
        step()
    return +mode.counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--operations", action="store_true", help="also what PKKD adds, by operation")
    options = parser.parse_args()
    print(f"{'network':<10}{''.join(f'{name:>8}' for name in CONTESTANTS)}{'added':>8}")
    for arch in NETWORKS:
        counts = {contestant: count(arch, contestant) for contestant in CONTESTANTS}
        added = counts["pkkd"].copy()
        added.subtract(counts["cnn"] + counts["plain"])
        totals = [counts[name].total() for name in CONTESTANTS]
        print(f"{arch:<10}{''.join(f'{total:>8}' for total in totals)}{added.total():>8}")
        for name, number in added.most_common() if options.operations else ():
            if number:
                print(f"    {name:<40}{number:>6}")


if __name__ == "__main__":
    main()
