"""Counts generated C on an emulated Cortex-M4 or M33: instructions and modelled cycles a term, by layer and network.

    python benchmarks/bench_edge.py                     two minutes
    python benchmarks/bench_edge.py --csv r.csv
    python benchmarks/bench_edge.py --read r.csv        the tables of an earlier run

Needs `pip install "adderops[edge]"`; takes arm-none-eabi-gcc if it is on the PATH, else the clang of ziglang.

A layer is what `adderops.edge.export_c` makes of one adder convolution, from bytes to bytes.  Contestants:

    adder assembly        GNU assembly, float32 epilogue (the bits of adder_conv2d_int8)
    adder fixed-point     the same with epilogue="integer"
    adder ACLE            intrinsics only, for other compilers
    adder C               C99 without USADA8: what a core without DSP extension runs; small layers
    conv int16 weights    an int8 convolution of the same care (harness/int8_conv.c), float32 epilogue
    conv int8 weights     the same with half the flash for weights, widened in the loop
    CMSIS-NN              its counts, a table of facts (harness/edge_peers.py); it does not run here

Every byte is compared with the definition before it counts.  Instruction counts are exact and the same on every run.
Cycles are a model, with sources in harness/cortex_m_cycles.py; no board has confirmed them.  On AArch64 instructions of
the hot loop are counted.  Networks have random weights: ResNet-8 of MLPerf Tiny's shape and DS-CNN.

The CSV file starts with compilers and date as comments.  A row has layer or network, contestant, core, terms,
instructions, cycles, both per term, and bytes of scratch (arena, for a network), stack, weights and code.
"""

import argparse
import subprocess
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path

import torch
from harness import cortex_m, edge_layers, edge_peers, edge_programs, report
from harness.edge_layers import DENSE, DEPTHWISE, EdgeLayer

ADDER, FIXED, ACLE, C = "adder assembly", "adder fixed-point", "adder ACLE", "adder C"
WIDE, NARROW, CMSIS = "conv int16 weights", "conv int8 weights", "CMSIS-NN"
NEON = "adder NEON"
ADDERS = {
    ADDER: ("assembly", "float32"),
    FIXED: ("assembly", "integer"),
    ACLE: ("ACLE", "float32"),
    C: ("C", "float32"),
}
PEERS = {WIDE: "conv_float", NARROW: "conv_narrow_float"}
_MOST_IN_C = 600_000  # terms of a layer that runs without USADA8 as well, for ten times as long
CORES = ("cortex-m4", "cortex-m33")
A64_LAYER = EdgeLayer(64, 64, 8, 8, 3)


def layer_rows(layers: Sequence[EdgeLayer], tools: cortex_m.Toolchain, core: str) -> Iterator[dict]:
    """One row for each layer and contestant."""
    for layer in layers:
        label = {"layer": layer.name, "core": core, "terms": layer.terms}
        for name, (path, epilogue) in ADDERS.items():
            if name == C and layer.terms > _MOST_IN_C:
                continue
            yield _row(label | {"contestant": name}, edge_programs.layer_run(layer, tools, core, path, epilogue).row())
        if not layer.depthwise:
            for name, kind in PEERS.items():
                yield _row(label | {"contestant": name}, edge_peers.convolution(layer, kind, tools, core))
        if core == "cortex-m4" and layer.name in edge_peers.CMSIS_NN:
            instructions, cycles = edge_peers.CMSIS_NN[layer.name]
            per_term = {"instructions_per_term": instructions, "cycles_per_term": cycles}
            yield label | {"contestant": CMSIS} | per_term


def network_rows(names: Sequence[str], tools: cortex_m.Toolchain, core: str) -> Iterator[dict]:
    """One row for each network, with assembly and with intrinsics."""
    for network in names:
        program, images, _ = edge_programs.network(network)
        for name in (ADDER, ACLE):
            counted = edge_programs.network_run(program, images, tools, core, ADDERS[name][0])
            yield _row({"network": network, "core": core, "contestant": name}, counted.row())


def neon_row(layer: EdgeLayer, tools: cortex_m.Toolchain) -> dict:
    """The hot loop on AArch64 without dot product."""
    counted = edge_programs.layer_run(layer, tools, "aarch64", "NEON")
    label = {"layer": layer.name, "core": "aarch64", "contestant": NEON}
    return _row(label, counted.row()) | {"loop_instructions_per_term": counted.run.loop_instructions / counted.terms}


def _row(label: dict, counts: dict) -> dict:
    row = {**label, **counts}
    per_term = {
        f"{key}_per_term": row[key] / row["terms"] for key in ("instructions", "cycles") if row[key] is not None
    }
    return {key: value for key, value in (row | per_term).items() if value is not None}


class Results:
    """Cycles a term by layer and contestant, and the figures that they add up to."""

    def __init__(self, rows: Sequence[dict], core: str) -> None:
        self.rows = [row for row in rows if row["core"] == core]
        self.layers = list(dict.fromkeys(row["layer"] for row in self.rows if "layer" in row))
        self._neon = [row for row in rows if row["core"] == "aarch64"]
        self._of = {(row.get("layer", row.get("network")), row["contestant"]): row for row in self.rows}

    def value(self, what: str, contestant: str, column: str = "cycles_per_term") -> float | None:
        return self._of.get((what, contestant), {}).get(column)

    def mean(self, layers: Sequence[EdgeLayer], contestant: str, over: str | None = None) -> float | None:
        """Geometric mean of cycles a term, or of their ratio to those of `over`; None if a layer is missing."""
        values = []
        for layer in layers:
            mine = self.value(layer.name, contestant)
            base = 1.0 if over is None else self.value(layer.name, over)
            if not mine or not base:
                return None
            values.append(mine / base)
        return report.geometric_mean(values)

    def figures(self) -> dict[str, float | None]:
        """What is measured, by the names of `TARGETS`."""
        windows = [layer for layer in DENSE if layer.kernel == 3]
        code = [row["code_bytes"] for row in self.rows if "network" in row and row["contestant"] == ADDER]
        loops = [row["loop_instructions_per_term"] for row in self._neon]
        return {
            "3x3, cycles a term": self.mean(windows, ADDER),
            "CMSIS-NN / adder, dense layers": self.mean(DENSE, CMSIS, ADDER),
            "conv int16 weights / adder, dense layers": self.mean(DENSE, WIDE, ADDER),
            "conv int8 weights / adder, dense layers": self.mean(DENSE, NARROW, ADDER),
            "depthwise 3x3, cycles a term": self.mean(DEPTHWISE, ADDER),
            "ResNet-8, cycles a multiply-accumulate": self.value("resnet8", ADDER),
            "CMSIS-NN / adder ACLE, dense layers": self.mean(DENSE, CMSIS, ACLE),
            "AArch64 hot loop, instructions a term": min(loops, default=None),
            "code of a whole network, bytes": max(code, default=None),
        }


# figure: prototype, what it has to reach, what it should reach; Cortex-M4, geometric means
TARGETS: dict[str, tuple[float | None, float | None, float | None]] = {
    "3x3, cycles a term": (0.66, 0.66, 0.60),
    "CMSIS-NN / adder, dense layers": (3.4, 3.3, 3.8),
    "conv int16 weights / adder, dense layers": (1.79, 1.75, 1.9),
    "conv int8 weights / adder, dense layers": (None, None, None),
    "depthwise 3x3, cycles a term": (5.3, 4.5, 3.0),
    "ResNet-8, cycles a multiply-accumulate": (0.90, 0.85, 0.75),
    "CMSIS-NN / adder ACLE, dense layers": (2.7, 2.6, 3.0),
    "AArch64 hot loop, instructions a term": (0.156, 0.156, None),
    "code of a whole network, bytes": (None, 6144, 4096),
}


def tables(rows: Sequence[dict], core: str) -> str:
    """Layers, networks and figures, as text."""
    results = Results(rows, core)
    names = [*ADDERS, *PEERS, CMSIS]
    lines = [f"{core}, modelled cycles (instructions) a term"]
    lines.append(f"{'':16}" + "".join(f"{name.replace(' weights', ''):>18}" for name in names))
    for layer in results.layers:
        cells = []
        for name in names:
            cycles, count = (results.value(layer, name, f"{key}_per_term") for key in ("cycles", "instructions"))
            cells.append("-" if cycles is None else f"{cycles:.2f} ({count:.2f})")
        lines.append(f"{layer:16}" + "".join(f"{cell:>18}" for cell in cells))
    lines += ["", f"bytes           {'scratch':>9}{'stack':>9}{'weights':>9}{'code':>9}   adder assembly"]
    for row in results.rows:
        if row["contestant"] == ADDER:
            what = row.get("layer", row.get("network"))
            columns = ("scratch_bytes", "stack_bytes", "weight_bytes", "code_bytes")
            lines.append(f"{what:16}" + "".join(f"{row[column]:9.0f}" for column in columns))
    networks = [row for row in results.rows if "network" in row]
    lines += ["", "network         cycles a term    cycles"] if networks else []
    for row in networks:
        lines.append(
            f"{row['network']:16}{row['cycles_per_term']:13.2f}{row['cycles'] / 1e6:8.2f} M   {row['contestant']}"
        )
    lines += ["", f"{'':44}{'prototype':>10}{'must':>8}{'aim':>8}{'measured':>10}"]
    for figure, value in results.figures().items():
        cells = [*TARGETS[figure], value] if core == "cortex-m4" else [None] * 3 + [value]
        digits = 0 if value and value > 100 else 3 if value and value < 0.5 else 2
        text = "".join(
            f"{'-' if x is None else f'{x:.{digits}f}':>{w}}" for x, w in zip(cells, (10, 8, 8, 10), strict=True)
        )
        lines.append(f"{figure:44}{text}")
    return "\n".join(lines)


def _about(tools: cortex_m.Toolchain, core: str) -> dict[str, object]:
    import capstone
    import unicorn

    version = subprocess.run([*tools.command(core)[:4], "--version"], capture_output=True, text=True).stdout
    return {
        "compiler": version.splitlines()[0] if version else tools.name,
        "options": " ".join(edge_programs.OPTIONS),
        "unicorn": unicorn.__version__,
        "capstone": capstone.__version__,
        "torch": torch.__version__,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    title, _, text = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(description=title, epilog=text, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("--core", choices=CORES, default=CORES[0], help="the processor (%(default)s)")
    add("--compiler", choices=("gcc", "zig"), help="the cross compiler; without it the first one found")
    add("--csv", type=Path, metavar="FILE", help="write compilers and rows to FILE")
    add("--read", type=Path, metavar="FILE", help="count nothing: the tables of such a FILE")
    return parser.parse_args(argv)


@torch.inference_mode()
def main(
    argv: Sequence[str] | None = None,
    layers: Sequence[EdgeLayer] | None = None,
    networks: Sequence[str] = tuple(edge_programs.NETWORKS),
) -> dict:
    """Runs the benchmark and returns about, rows and figures; `layers` and `networks` override the whole list."""
    args = _arguments(argv)
    if args.read:
        about, rows = report.read_csv(args.read)
        core = next(row["core"] for row in rows if row["core"] != "aarch64")
    else:
        core = args.core
        try:
            tools = cortex_m.toolchain(args.compiler, core)
            about, rows = _about(tools, core), []
            for found in (
                layer_rows(layers or edge_layers.DENSE + DEPTHWISE, tools, core),
                network_rows(networks, tools, core),
            ):
                rows += found
        except cortex_m.Unavailable as reason:
            raise SystemExit(str(reason)) from None
        try:
            rows.append(neon_row(A64_LAYER, cortex_m.toolchain(args.compiler, "aarch64")))
        except cortex_m.Unavailable as reason:
            print(f"no AArch64: {reason}")
        if args.csv:
            report.write_csv(args.csv, about, rows)
    print("\n".join(f"{key:<16}{value}" for key, value in about.items()))
    print("\n" + tables(rows, core))
    return {"about": about, "rows": rows, "figures": Results(rows, core).figures()}


if __name__ == "__main__":
    main()
