"""What the programs of a day with a GPU print, as numbers: one function per format."""

import csv
import io
import re
from pathlib import Path
from typing import Any

from harness import report

# nvidia-smi --query-gpu=... --format=csv,noheader,nounits, in this order
GPU_FIELDS = (
    *("name", "driver_version", "memory.total", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem"),
    *("power.limit", "temperature.gpu", "compute_cap"),
)


def nvidia_smi(text: str) -> dict[str, str]:
    """The fields of the first GPU, by name; units: MiB, MHz, W and degrees.

    Raises:
        ValueError: another number of fields, as in an error message.
    """
    lines = [line for line in text.splitlines() if line.strip()]
    values = [value.strip() for value in lines[0].split(",")] if lines else []
    if len(values) != len(GPU_FIELDS):
        raise ValueError(f"nvidia-smi: expected {len(GPU_FIELDS)} fields, got {text.strip()[:200]!r}")
    return dict(zip(GPU_FIELDS, values, strict=True))


_PYTEST_COUNT = re.compile(r"(\d+) (failed|passed|skipped|error)\b")
_PYTEST_END = re.compile(r"^=*\s*((?:\d+ \w+(?:, )?)+) in (\d+(?:\.\d+)?)s\b", re.M)


def pytest(text: str) -> dict[str, Any]:
    """The counts of pytest's last line, its seconds, and the names of the failures (-rfE).

    A run that was interrupted has the counts up to then.

    Raises:
        ValueError: there is no such line.
    """
    ends = _PYTEST_END.findall(text)
    if not ends:
        raise ValueError("no summary of pytest")
    counts = {kind: int(n) for n, kind in _PYTEST_COUNT.findall(ends[-1][0].replace("errors", "error"))}
    failures = re.findall(r"^(?:FAILED|ERROR) (\S+::.*?)(?: - (.*))?$", text, re.M)
    done = {kind: counts.get(kind, 0) for kind in ("passed", "failed", "error", "skipped")}
    return {
        **done,
        "pytest_seconds": float(ends[-1][1]),
        "failures": [{"test": test, "why": why} for test, why in failures],
        "headline": ", ".join(f"{n} {kind}" for kind, n in done.items() if n or kind == "passed"),
    }


_SANITIZER_END = re.compile(r"^=+ (?:ERROR|RACECHECK) SUMMARY: ((\d+) (?:errors?|hazards?).*)$", re.M)
_SANITIZER_REPORT = "Invalid|Error:|Warning:|Program hit|Barrier error|Misaligned|Out-of-range|Race reported|Potential"


def sanitizer(text: str) -> dict[str, Any]:
    """The errors or hazards of compute-sanitizer, and the first lines of its first reports.

    Raises:
        ValueError: there is no summary.
    """
    ends = _SANITIZER_END.findall(text)
    if not ends:
        raise ValueError("no summary of compute-sanitizer")
    reports = re.findall(rf"^=+ ((?:{_SANITIZER_REPORT}).*)$", text, re.M)
    line, count = ends[-1]
    return {"errors": int(count), "reports": reports[:10], "headline": line}


# Nsight Compute's own refusals, and what to say of them.
NCU_REFUSALS = {
    "ERR_NVGPUCTRPERM": "the driver keeps the counters for the administrator (ERR_NVGPUCTRPERM)",
    "LibraryNotLoaded": "ncu cannot load the driver's profiling library",
    "Failed to find metric": "ncu knows not all of these counters",
    "No kernels were profiled": "ncu saw no kernel of adderops",
}


def ncu_refusal(text: str) -> str | None:
    """Why ncu measured nothing, if it says so."""
    return next((meaning for sign, meaning in NCU_REFUSALS.items() if sign in text), None)


def ncu(text: str) -> list[dict[str, Any]]:
    """The launches in `ncu --csv --page raw --print-units base`, each with "Kernel Name" and its counters as numbers.

    Lines before the header are those of the program and of ncu's log; the line after it holds units.  Numbers may have
    separators of thousands; a counter that the GPU lacks is "n/a", and left out.

    Raises:
        ValueError: there is no header.
    """
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID",') and '"Kernel Name"' in line), None)
    if start is None:
        raise ValueError("no table of ncu")
    table = [line for line in lines[start:] if line.startswith('"')]
    launches = []
    for row in csv.DictReader(io.StringIO("\n".join(table))):
        if not row["ID"]:
            continue  # the units
        launch: dict[str, Any] = {"Kernel Name": row["Kernel Name"]}
        for name, cell in row.items():
            if name and "__" in name and re.fullmatch(r"[\d,]+(\.\d+)?(e[+-]?\d+)?", cell or ""):
                launch[name] = float(cell.replace(",", ""))
        launches.append(launch)
    return launches


def layer_means(path: Path) -> dict[str, Any]:
    """The geometric means in a file of bench_adder.py or bench_int8.py, complete or not, and how many layers it has."""
    about, rows = report.read_csv(path)
    means = {name.removeprefix("mean: "): float(mean) for name, mean in about.items() if name.startswith("mean: ")}
    layers = len({row["layer"] for row in rows if "layer" in row})
    return {"layers": layers, "means": means, "headline": _headline(means, f"{layers} layers")}


def _headline(means: dict[str, float], what: str) -> str:
    wanted = ("forward_over_conv2d", "step_over_conv2d", "step_over_eager", "over_conv2d", "over_conv2d_float16")
    found = [f"{name} {means[name]:.2f}" for name in wanted if name in means]
    return ", ".join([what, *found])


def bench_distill(path: Path) -> dict[str, Any]:
    """Milliseconds of a step by network, contestant and memory format, from a file of bench_distill.py."""
    _, rows = report.read_csv(path)
    steps = {f"{r['network']} {r['contestant']} {r['memory_format']}": 1e3 * float(r["seconds"]) for r in rows}
    ratios = {}
    for network, form in {(r["network"], r["memory_format"]) for r in rows}:
        times = [steps.get(f"{network} {who} {form}") for who in ("pkkd", "plain", "cnn")]
        if all(times):
            ratios[f"{network} {form}"] = times[0] / (times[1] + times[2])
    shown = ", ".join(f"{name}: {ratio:.2f}" for name, ratio in sorted(ratios.items()))
    return {"milliseconds": steps, "pkkd_over_plain_and_cnn": ratios, "headline": f"pkkd / (plain + cnn): {shown}"}
