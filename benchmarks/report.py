"""What a benchmark shows beside its own numbers: the machine, means, a plot."""

import importlib.util
import os
import platform
import statistics
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

import torch


def machine(threads: int, isa: str) -> dict[str, str | int | None]:
    """What it takes to compare the figures of two runs."""
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
    # a virtual machine may hide the product's name: family and model still tell the generation
    return f"{model} (family {found['cpu family']}, model {found['model']})" if "cpu family" in found else model


def geometric_mean(ratios: Sequence[float]) -> float:
    return statistics.geometric_mean(ratios)


def require_matplotlib() -> None:
    """Ends the program before a long run rather than after it."""
    if importlib.util.find_spec("matplotlib") is None:
        raise SystemExit("--plot needs matplotlib: pip install matplotlib")


def plot_ratios(path: Path, title: str, layers: Sequence[str], bars: dict[str, Sequence[float]], unit: str) -> None:
    """Horizontal bars, a group per layer and a colour per entry of `bars`; a line marks 1."""
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
