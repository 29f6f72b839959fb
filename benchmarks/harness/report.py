"""The report of a benchmark: the machine, CSV files, means, plots."""

import csv
import importlib.util
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path


def machine(threads: int, isa: str) -> dict[str, str | int | None]:
    """The facts needed to compare two runs."""
    import torch  # here, because readers of files do without

    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": threads,
        "instruction_set": isa,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _cpu_model() -> str:
    try:
        fields = dict(line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().splitlines() if ":" in line)
    except OSError:
        return platform.processor() or platform.machine()
    found = {key.strip(): value.strip() for key, value in fields.items()}
    model = found.get("model name", platform.machine())
    # a virtual machine may hide the product name; family and model still identify the generation
    return f"{model} (family {found['cpu family']}, model {found['model']})" if "cpu family" in found else model


def write_csv(path: Path, about: Mapping[str, object], rows: Sequence[Mapping[str, object]]) -> None:
    """One comment line `# name = value` per entry of `about`, then the rows; a cell is empty if its row lacks the key.

    Numbers are written with all their digits.
    """
    columns = list(dict.fromkeys(column for row in rows for column in row))
    with open(path, "w", newline="") as file:
        file.writelines(f"# {name} = {value}\n" for name, value in about.items())
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read_csv(path: Path) -> tuple[dict[str, str], list[dict[str, str | float]]]:
    """The `about` and the rows of write_csv, without the empty cells."""
    lines = path.read_text().splitlines()
    about = dict(line.removeprefix("# ").split(" = ", 1) for line in lines if line.startswith("# "))
    rows = csv.DictReader(line for line in lines if not line.startswith("# "))
    return about, [{name: _number(cell) for name, cell in row.items() if cell} for row in rows]


def _number(cell: str) -> str | float:
    try:
        return float(cell)
    except ValueError:
        return cell


def geometric_mean(ratios: Sequence[float]) -> float:
    return statistics.geometric_mean(ratios)


def require_matplotlib() -> None:
    """Ends the program before the run rather than after it."""
    if importlib.util.find_spec("matplotlib") is None:
        raise SystemExit("--plot needs matplotlib: pip install matplotlib")


def plot_ratios(path: Path, title: str, layers: Sequence[str], bars: dict[str, Sequence[float]], unit: str) -> None:
    """Horizontal bars: one group per layer, one colour per entry of `bars`, and a line at 1."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 1.2 + 0.17 * len(layers) * (len(bars) + 1)), layout="constrained")
    height = 0.8 / len(bars)
    for i, (label, values) in enumerate(bars.items()):
        places = [row + i * height for row in range(len(layers))]
        drawn = axes.barh(places, values, height, label=f"{label} (mean {geometric_mean(values):.2f})")
        axes.bar_label(drawn, fmt="%.2f", padding=2, fontsize=7)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks([row + 0.4 - height / 2 for row in range(len(layers))], layers, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel(unit)
    axes.set_title(title, fontsize=9)
    axes.margins(y=0.01)
    figure.legend(fontsize=8, loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
