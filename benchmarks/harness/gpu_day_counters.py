"""Counters of Nsight Compute beside the predictions of the machine code: predicted, measured, ratio.

    python -m harness.gpu_day_counters FOLDER --capability 9.0 --multiprocessors 132

The predictions are those of tests/machine_code/cuda_budgets.py for the work of gpu_day_kernels.py, in whole tiles:

    instructions    those of the loop over terms, per warp; what comes before and after it is not counted
    cycles          of a multiprocessor whose busiest unit, or the issue of its warps, never waits
    busiest unit    its utilisation, per cent: 100
    DRAM bytes      read once: the operands
    L2 bytes        read by the multiprocessors: each block reads the rows and columns of its tile

ncu runs while the kernels are compiled and disassembled.  Writes predictions.json and counters.csv, and prints the
table as JSON.
"""

import argparse
import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from harness import gpu_day_parsers as parsers
from harness.gpu_day_kernels import work_of
from harness.gpu_day_runner import write_whole

INSTRUCTIONS, CYCLES = "smsp__inst_executed.sum", "sm__cycles_elapsed.max"
DRAM, L2 = "dram__bytes_read.sum", "lts__t_sectors_srcunit_tex_op_read.sum"
SECTOR = 32  # bytes
BASE = (INSTRUCTIONS, CYCLES, DRAM, "dram__bytes_write.sum", L2, "gpu__time_duration.sum")
# Utilisation of the units of cuda_budgets.UNITS.  Hopper executes packed 16-bit floats on its float32 pipe.
_PIPE = "sm__inst_executed_pipe_{}.avg.pct_of_peak_sustained_active"
UNITS = {
    "issue": "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "tensor": "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active",
    **{unit: _PIPE.format(unit) for unit in ("alu", "xu")},
    **{unit: _PIPE.format(pipe) for unit, pipe in (("fp32", "fma"), ("imad", "fma"), ("memory", "lsu"))},
    **{unit: _PIPE.format("fp16") for unit in ("fp16x2", "bf16x2")},
}


def predictions(arch: int, multiprocessors: int, kernel: str = "") -> dict[str, dict[str, Any]]:
    """{symbol: {"kernel", "unit", quantity: ...}} of the kernels with `kernel` in their label that have work."""
    import cuda_budgets as budgets
    import sass

    instances = [i for unit in budgets.units(arch, kernel=kernel) for i in unit if work_of(i.label)]
    compiled = budgets.compile_all(arch, [(instance,) for instance in instances])  # one by one: all cores take part
    with ThreadPoolExecutor() as pool:
        machine_code = list(pool.map(lambda unit: sass.read(unit.cubin), compiled))
    found = {}
    for instance, unit, kernels in zip(instances, compiled, machine_code, strict=True):
        symbol, work = unit.names[instance.expression], work_of(instance.label)
        row = budgets.row_of(arch, instance, kernels[symbol])
        if row.issued_per_term is None or row.terms_per_clock is None or row.bound is None or work is None:
            continue
        lanes, columns = map(int, row.tile.split("x"))
        blocks = -(-work.rows // lanes) * -(-work.columns // columns)
        terms = blocks * lanes * columns * work.depth
        found[symbol] = {
            "kernel": f"{row.kernel}, {row.tile}",
            "unit": row.bound,
            INSTRUCTIONS: row.issued_per_term * terms / 32,
            CYCLES: terms / row.terms_per_clock / multiprocessors,
            UNITS[row.bound]: 100.0,
            DRAM: work.read,
            L2: blocks * work.depth * (lanes + columns) * work.operands / 2 * work.element / SECTOR,
        }
    return found


def _try_predictions(arch: int, multiprocessors: int, kernel: str) -> tuple[dict[str, dict[str, Any]], str | None]:
    """The predictions, or why there are none: the counters are worth having without them."""
    import nvrtc
    import sass

    try:
        return predictions(arch, multiprocessors, kernel), None
    except (nvrtc.Unavailable, nvrtc.CompileError, sass.Unavailable) as reason:
        return {}, str(reason)


def measure(log: Path, device: str) -> str:
    """What ncu wrote; again with fewer counters if it does not know all of them."""
    for metrics in ((*BASE, *dict.fromkeys(UNITS.values())), BASE):
        command = [shutil.which("ncu") or "ncu", "--csv", "--page", "raw", "--log-file", str(log)]
        command += ["--print-units", "base", "--print-kernel-base", "mangled", "--clock-control", "none"]
        command += ["--kernel-name-base", "mangled", "--kernel-name", "regex:adderops", "--metrics", ",".join(metrics)]
        command += [sys.executable, "-m", "harness.gpu_day_kernels", "--device", device]
        print("$", *command, file=sys.stderr, flush=True)
        log.unlink(missing_ok=True)
        subprocess.run(command, stdout=sys.stderr)
        text = log.read_text(errors="replace") if log.exists() else ""
        if "Failed to find metric" not in text:
            break
    return text


def compared(predicted: dict[str, dict[str, Any]], launches: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per kernel and quantity; of several launches of a kernel, the one with the most instructions."""
    largest: dict[str, dict[str, Any]] = {}
    for launch in launches:
        name = launch["Kernel Name"]
        if launch.get(INSTRUCTIONS, 0) >= largest.get(name, {}).get(INSTRUCTIONS, 0):
            largest[name] = launch
    titles = {INSTRUCTIONS: "instructions", CYCLES: "cycles", DRAM: "DRAM bytes read", L2: "L2 bytes read"}
    rows = []
    for symbol, expected in predicted.items():
        for metric, value in expected.items() if symbol in largest else ():
            if "__" not in metric:
                continue
            size = SECTOR if metric == L2 else 1
            got = largest[symbol].get(metric)
            row = {"kernel": expected["kernel"], "quantity": titles.get(metric, f"{expected['unit']} unit, %")}
            row |= {"predicted": value * size, "measured": None if got is None else got * size}
            rows.append(row | {"ratio": None if got is None else got / value})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path, metavar="FOLDER")
    parser.add_argument("--capability", required=True, help="compute capability, such as 9.0")
    parser.add_argument("--multiprocessors", type=int, required=True)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda", help="where the kernels run")
    parser.add_argument("--kernel", default="", help="only kernels with this text in their label")
    arguments = parser.parse_args()
    arch = int(arguments.capability.replace(".", ""))
    with ThreadPoolExecutor(1) as pool:
        text = pool.submit(measure, arguments.output / "counters.csv", arguments.device)
        predicted, missing = _try_predictions(arch, arguments.multiprocessors, arguments.kernel)
        write_whole(arguments.output / "predictions.json", json.dumps(predicted, indent=1))
        measured = text.result()
    refusal = parsers.ncu_refusal(measured)
    launches = [] if refusal else parsers.ncu(measured)
    known = {launch["Kernel Name"] for launch in launches}
    rows = compared(predicted, launches)
    unpredicted = sorted(known - set(predicted))
    found = {"refusal": refusal, "no_predictions": missing, "rows": rows, "unpredicted": unpredicted}
    print(json.dumps(found | {"launches": launches}))


if __name__ == "__main__":
    main()
