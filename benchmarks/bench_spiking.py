"""Times integrate-and-fire neurons against PyTorch's copies, a loop over the steps, SpikingJelly and snnTorch.

    python benchmarks/bench_spiking.py                  two minutes
    python benchmarks/bench_spiking.py --csv r.csv --threads 2

The operator returns the spikes of all T steps of IF neurons (subtraction) or of LIF neurons (decay and gain 1/2), from
float32 currents (T, N, C, H, W). The others, in inference mode:

clone, copy_      `x.clone()` and `out.copy_(x)`: the bytes that the operator reads and writes.  The first allocates its
                  result, as the operator does; the second writes memory that is there
loop              the formula step by step in PyTorch, the spikes stacked
spikingjelly      IFNode or LIFNode, step_mode='m'
snntorch          Leaky, step by step, the spikes stacked

Peers that are not installed do not take part.  The results of the loop and of SpikingJelly are checked.  Contestants
take turns and are compared by their medians (harness/timing.py).

glibc returns the memory of a large result to the system when it is freed, and the new pages of the next cost
several times what writing them does.  Here it keeps the memory, as other allocators do; --new-pages leaves it at its
defaults.

The CSV file starts with the machine, the missing contestants and the extremes as comments.  A row has shape, neurons,
contestant, seconds, spread, samples and ratio: its time over the operator's.
"""

import argparse
import ctypes
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from harness import report
from harness.timing import Contestant, take_turns, wall_clock
from torch import Tensor

import adderops.info
from adderops.spiking.functional import integrate_and_fire

OPERATOR, COPIES, PEERS = "operator", ("clone", "copy_"), ("spikingjelly", "snntorch")
# (T, N, C, H, W): layers of ResNet-20 and VGG on 32 images of 32x32, and one of 64 images, 128 MiB
SHAPES = [(t, 32, c, s, s) for t in (8, 32) for c, s in ((64, 8), (16, 32))] + [
    (8, 32, 64, 16, 16),
    (8, 64, 64, 32, 32),
]
NEURONS = {"IF": {}, "LIF": {"decay": 0.5, "gain": 0.5}}


def _keep_memory() -> None:
    """Makes glibc reuse freed memory of any size; M_MMAP_MAX and M_TRIM_THRESHOLD of malloc.h."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(-4, 0)
        libc.mallopt(-1, -1)


def _loop(x: Tensor, decay: float = 1.0, gain: float = 1.0) -> Tensor:
    u, spikes = torch.zeros_like(x[0]), []
    for current in x:
        u = u + current if decay == gain == 1 else decay * u + gain * current
        spikes.append((u >= 1.0).to(x.dtype))
        u = u - spikes[-1]
    return torch.stack(spikes)


def _spikingjelly(x: Tensor, kind: str) -> Callable[[], Tensor]:
    from spikingjelly.activation_based import functional, neuron

    how = {"v_threshold": 1.0, "v_reset": None, "step_mode": "m"}
    node = neuron.IFNode(**how) if kind == "IF" else neuron.LIFNode(tau=2.0, decay_input=True, **how)
    node.eval()

    def call() -> Tensor:
        functional.reset_net(node)
        return node(x)

    return call


def _snntorch(x: Tensor, kind: str) -> Callable[[], Tensor]:
    import snntorch

    node = snntorch.Leaky(beta=1.0 if kind == "IF" else 0.5, reset_mechanism="subtract").eval()

    def call() -> Tensor:
        membrane, spikes = torch.zeros_like(x[0]), []
        for current in x:
            spike, membrane = node(current, membrane)
            spikes.append(spike)
        return torch.stack(spikes)

    return call


def _calls(shape: Sequence[int], kind: str, missing: dict[str, str]) -> dict[str, Callable[[], Tensor]]:
    x = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    out, how = torch.empty_like(x), NEURONS[kind]
    calls: dict[str, Callable[[], Tensor]] = {
        OPERATOR: lambda: integrate_and_fire(x, 1.0, **how),
        "clone": x.clone,
        "copy_": lambda: out.copy_(x),
        "loop": lambda: _loop(x, **how),
    }
    for name, make in zip(PEERS, (_spikingjelly, _snntorch), strict=True):
        try:
            calls[name] = make(x, kind)
        except ImportError as reason:
            missing[name] = str(reason)
    want = calls[OPERATOR]()
    for name in ("loop", "spikingjelly"):
        if name in calls and not torch.equal(calls[name](), want):
            raise SystemExit(f"{shape} {kind} {name}: another result than the operator's")
    return calls


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=120.0, help="of all measurements together")
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--new-pages", action="store_true", help="let glibc return memory to the system")
    return parser.parse_args(argv)


@torch.inference_mode()
def main(argv: Sequence[str] | None = None, shapes: Sequence[tuple[int, ...]] = SHAPES) -> dict:
    """Runs the benchmark and returns machine, rows, missing and extremes."""
    args = _arguments(argv)
    torch.set_num_threads(args.threads)
    if not args.new_pages:
        _keep_memory()
    isa = adderops.info.describe()["instruction set in use"]
    machine, missing, rows = report.machine(args.threads, isa), {}, []
    print("\n".join(f"{key:<16}{value}" for key, value in machine.items()))
    names = (*COPIES, "loop", *PEERS)
    print(f"\n{'operator over copies; others over the operator':40}{'ms':>9}" + "".join(f"{n:>14}" for n in names))
    for shape in shapes:
        for kind in NEURONS:
            calls = _calls(shape, kind, missing)
            contestants = [Contestant(name, math.prod(shape), wall_clock(call)) for name, call in calls.items()]
            times = take_turns(contestants, args.seconds / len(shapes) / len(NEURONS))
            one = times[OPERATOR].seconds
            rows += [
                {"shape": "x".join(map(str, shape)), "neurons": kind, "contestant": name, "seconds": t.seconds}
                | {"spread": t.spread, "samples": t.samples, "ratio": t.seconds / one}
                for name, t in times.items()
            ]
            ratios = [one / times[n].seconds if n in COPIES else times[n].seconds / one for n in names if n in times]
            mebibytes = math.prod(shape) * 4 / 2**20
            title = f"{kind:4}{'x'.join(map(str, shape))}, {mebibytes:.0f} MiB"
            print(f"{title:40}{one * 1e3:9.3f}" + "".join(f"{ratio:14.2f}" for ratio in ratios), flush=True)
    for name, reason in missing.items():
        print(f"{name} did not take part: {reason}")
    extremes = _extremes(rows)
    print("\n" + "\n".join(f"{name:34}{value:.2f}" for name, value in extremes.items()))
    if args.csv:
        comments = {f"missing: {name}": reason for name, reason in missing.items()} | extremes
        report.write_csv(args.csv, machine | comments, rows)
    return {"machine": machine, "rows": rows, "missing": missing, "extremes": extremes}


def _extremes(rows: Sequence[dict]) -> dict[str, float]:
    """The operator's worst cases: the most copies that it takes, the fewest times that another takes."""
    found = {}
    for name in dict.fromkeys(row["contestant"] for row in rows if row["contestant"] != OPERATOR):
        ratios = [row["ratio"] for row in rows if row["contestant"] == name]
        found |= {f"most {name}": 1 / min(ratios)} if name in COPIES else {f"least over {name}": min(ratios)}
    return found


if __name__ == "__main__":
    main()
