"""Fits the constants of adderops/edge/cost.py to emulated layers and prints them.

    python benchmarks/harness/edge_cost.py              a minute
    python benchmarks/harness/edge_cost.py cortex-m4    for this target

Least squares of relative errors, without negative constants.  Needs scipy and `pip install "adderops[edge]"`.
"""

import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from adderops.edge.calls import Call  # noqa: E402
from adderops.edge.cost import TARGETS, counts  # noqa: E402
from adderops.edge.export import source_of  # noqa: E402
from adderops.edge.program import Add, Bytes, Dequantize, Program, Quantize, Relu, Value  # noqa: E402
from harness import cortex_m, edge_programs  # noqa: E402
from harness.edge_layers import DENSE, DEPTHWISE, EdgeLayer  # noqa: E402

Sample = tuple[Call, Program, bool, int]  # whether it has a ring; its cycles

SMALL = (
    *(EdgeLayer(c, o, 8, 8, 3, s) for c, o in ((4, 8), (8, 12), (24, 8), (32, 16)) for s in (1, 2)),
    *(EdgeLayer(c, o, 6, 6, 1) for c, o in ((4, 8), (16, 64), (64, 16), (96, 24))),
    *(EdgeLayer(c, o, 7, 7, 3) for c, o in ((8, 8), (16, 32), (5, 8), (6, 7))),
    *(EdgeLayer(c, c, h, h, 3, s, depthwise=True) for c, h in ((8, 16), (32, 8)) for s in (1, 2)),
    EdgeLayer(16, 16, 9, 9, 5),
    EdgeLayer(8, 16, 12, 12, 5, 2),
)


def elementwise(height: int) -> tuple[Program, torch.Tensor]:
    """Returns a program of all operations on single elements, and its input."""
    values = {name: Value(name, height, 8, 16, "float32") for name in "abc"}
    values |= {name: Value(name, height, 8, 16, "uint8") for name in "xy"}
    layers = (
        Dequantize("floats", "a", "x", 0.1, 128),
        Add("sum", "b", "a", "a"),
        Relu("relu", "c", "b"),
        Quantize("bytes", "y", "c", Bytes(0, 255, 7.0, 3)),
    )
    x = torch.randint(0, 256, (1, 16, height, 8), generator=torch.Generator().manual_seed(0)).byte()
    return Program(values, layers, "x", Bytes(0, 255, 1.0), "y", (16, height, 8)), x


def samples(target: str, small: bool = True) -> Iterator[Sample]:
    """Layers and networks with their emulated cycles."""
    tools = cortex_m.toolchain("gcc", target)
    programs = [elementwise(height) for height in (2, 8)]
    programs += [edge_programs.layer_program(layer) for layer in (*DENSE, *DEPTHWISE, *(SMALL if small else ()))]
    shapes = (("resnet8", None), ("ds_cnn", None), ("lenet5", (1, 32, 32)), ("resnet8", (3, 16, 16)))
    for name, shape in shapes if small else shapes[:2]:
        programs.append(edge_programs.network(name, shape=shape)[:2])
    for program, x in programs:
        rings = source_of(program).plan.rings
        for i, (call, run) in enumerate(edge_programs.calls_run(program, x, tools, target)):
            yield call, program, i in rings, run.cycles


def fit(found: list[Sample]) -> dict[str, dict[str, float]]:
    """The constants by kernel and count."""
    from scipy.optimize import nnls

    kinds = defaultdict(list)
    for call, program, ring, cycles in found:
        kinds[call.kind].append((counts(call, program, ring), cycles, call.terms))
    result = {}
    for kind, rows in sorted(kinds.items()):
        names = list(dict.fromkeys(name for row, _, _ in rows for name in row if any(r.get(name) for r, _, _ in rows)))
        matrix = np.array([[row.get(name, 0) / cycles for name in names] for row, cycles, _ in rows])
        weight = np.array([1.0 if cycles > 100_000 else 0.2 for _, cycles, _ in rows])
        scale = np.linalg.norm(matrix, axis=0)
        values, _ = nnls(matrix / scale * weight[:, None], weight)
        result[kind] = {name: float(f"{v:.4g}") for name, v in zip(names, values / scale, strict=True) if v > 0}
        for (_, cycles, terms), got in zip(rows, matrix @ (values / scale), strict=True):
            print(f"# {kind:16} {terms:9} terms {cycles:9} cycles, modelled {100 * (got - 1):+.1f} %")
    return result


def main() -> None:
    torch.set_num_threads(1)
    for target in sys.argv[1:] or TARGETS:
        print(f'    "{target}": {{')
        for kind, values in fit(list(samples(target))).items():
            print(f'        "{kind}": {values},')
        print("    },")


if __name__ == "__main__":
    main()
