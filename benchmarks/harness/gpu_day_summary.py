"""The page that a day with a GPU ends with, from the files of its parts."""

from collections.abc import Sequence
from typing import Any

from harness.gpu_day_runner import FAILED, PASSED, Day, Part, write_whole

SHOWN_FAILURES = 12


def write(day: Day, parts: Sequence[Part]) -> None:
    write_whole(day.file("summary.md"), page(day, parts))


def page(day: Day, parts: Sequence[Part]) -> str:
    sections = [
        _heading(day),
        _states(day, parts),
        _failures(day, parts),
        _means(day, parts),
        _steps(day),
        _counters(day),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def table(titles: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Markdown."""
    lines = [[*titles], ["---"] * len(titles), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def number(value: float | None) -> str:
    """Three digits, or all of an integer below a million."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if 100 <= abs(value) < 1e6 else f"{value:.3g}"


def _heading(day: Day) -> str:
    facts = day.figures("environment")
    lines = ["# A day with a GPU" + (", rehearsed without one: no figure here is a measurement" if day.dry_run else "")]
    if facts:
        gpu, driver = facts["gpu"], facts["nvidia_smi"]
        lines.append(
            f"{gpu['name']}, compute capability {gpu['capability']}, {gpu['multiprocessors']} multiprocessors; driver "
            f"{driver.get('driver_version', '?')}, clock {driver.get('clocks.sm', '?')} of "
            f"{driver.get('clocks.max.sm', '?')} MHz, {driver.get('power.limit', '?')} W; torch {facts['torch']} "
            f"(CUDA {facts['torch_cuda']}, cuDNN {facts['cudnn']}), Python {facts['python']}, {facts['cores']} cores."
        )
    return "\n\n".join(lines)


def _states(day: Day, parts: Sequence[Part]) -> str:
    rows = []
    for part in parts:
        result = day.result(part.name) or {"status": "not reached", "seconds": "", "headline": ""}
        status = result["status"] if result["status"] in (PASSED, "not reached") else f"**{result['status']}**"
        rows.append((part.name, status, result["seconds"], result["headline"]))
    return table(("part", "state", "seconds", "result"), rows)


def _failures(day: Day, parts: Sequence[Part]) -> str:
    found: list[str] = []
    for part in parts:
        result = day.result(part.name) or {}
        figures = result.get("figures", {})
        found += [f"{part.name}: `{f['test']}` {f['why']}" for f in figures.get("failures", [])]
        found += [f"{part.name}: {line}" for line in figures.get("reports", [])]
        if result.get("status") == FAILED and not figures.get("failures") and not figures.get("reports"):
            found.append(f"{part.name}: {result['headline']} (all of it: {part.name}.log)")
    if not found:
        return ""
    more = [f"- and {len(found) - SHOWN_FAILURES} more"] if len(found) > SHOWN_FAILURES else []
    return "\n".join(["## Failures", "", *(f"- {line[:300]}" for line in found[:SHOWN_FAILURES]), *more])


def _means(day: Day, parts: Sequence[Part]) -> str:
    """The geometric means of the layer benchmarks, one column each."""
    columns = {part.name: day.figures(part.name).get("means") for part in parts}
    columns = {name: means for name, means in columns.items() if means}
    if not columns:
        return ""
    names = dict.fromkeys(name for means in columns.values() for name in means)
    rows = [(name, *(number(means.get(name)) for means in columns.values())) for name in names]
    title = "## Adder layers: terms per second over those of others"
    return f"{title}\n\n{table(('mean over the layers', *columns), rows)}"


def _steps(day: Day) -> str:
    """Milliseconds of training steps, launched one by one and as a graph."""
    columns: dict[str, dict[str, float]] = {
        title: day.figures(part).get("milliseconds", {})
        for part, title in (("distill", "ms"), ("distill-graph", "ms, one CUDA graph"))
    }
    names = dict.fromkeys(name for steps in columns.values() for name in steps)
    if not names:
        return ""
    rows = [(name, *(number(steps.get(name)) for steps in columns.values())) for name in names]
    return "## Training steps\n\n" + table(("network, step, memory format", *columns), rows)


def _counters(day: Day) -> str:
    figures: dict[str, Any] = day.figures("counters")
    if not figures.get("rows"):
        return ""
    rows = [
        (row["kernel"], row["quantity"], *(number(row[column]) for column in ("predicted", "measured", "ratio")))
        for row in figures["rows"]
    ]
    note = "Measured over predicted; harness/gpu_day_counters.py says what is predicted."
    titles = ("kernel, tile", "quantity", "predicted", "measured", "ratio")
    return f"## Counters of Nsight Compute\n\n{note}\n\n{table(titles, rows)}"
