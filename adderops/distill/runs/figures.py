"""Figures of runs: curves, the match of layers, distributions of weights, accuracy over energy."""

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from adderops.distill.checkpoint import LOG_COLUMNS
from adderops.distill.runs.folder import LAYER_COLUMNS, RunFolder
from adderops.distill.runs.paired import group_rows
from adderops.distill.runs.weights import fit_gaussian, fit_laplace, layer_weights
from adderops.distill.speed import COLUMNS as SPEED_COLUMNS

try:
    from matplotlib import colormaps
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize
    from matplotlib.figure import Figure  # pyplot would look for a window system
    from matplotlib.ticker import AutoLocator
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError("figures need matplotlib: install the extra `adderops[distill]`") from missing

MARKERS = "osD^v*"
COLORS = {"student": "#1f77b4", "student_ema": "#17becf", "teacher": "#d95f02", "teacher_ema": "#e6ab02"}
LAYER_TITLES = {
    "l_mid": "L_mid",
    "gradient_ratio": "gradient of L_mid / of the other losses",
    "var_yc": "variance of y_c",
}
SPEED_TITLES = dict(zip(SPEED_COLUMNS, ("time / speed limit", "curvature", "unevenness of speed"), strict=True))
LEGEND_LINES = 10  # more lines than these get a colour bar
BINS = 80  # of the histograms, from -4 to 4 standard deviations


def png(figure: Figure) -> bytes:
    """Returns the figure as a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def draw_accuracy(run: RunFolder) -> Figure:
    """Test and training accuracy of the run's networks over the epochs."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    for name in run.networks:
        for part, style in (("test", "-"), ("train", ":")):
            column = f"{name}_{part}_accuracy"
            if column in run.rows[0]:
                values, color = [100 * value for value in run.curve(column)], _color(name, run.networks)
                _line(axes, run.curve("epoch"), values, style, color=color, label=f"{name}, {part}")
    _finish(axes, "accuracy (%)")
    return figure


def draw_losses(run: RunFolder) -> Figure:
    """Cross entropy of the run's networks over the epochs and, if there are several, the terms of the loss."""
    terms = _loss_terms(run)
    figure = Figure(figsize=(11 if len(terms) > 1 else 8, 4), layout="constrained")
    panels = figure.subplots(1, 2 if len(terms) > 1 else 1, squeeze=False)[0]
    for name in run.networks:
        for column, part, style in ((f"{name}_test_loss", "test", "-"), (f"{name}_ce", "train", ":")):
            if column in run.rows[0]:
                color = _color(name, run.networks)
                _line(panels[0], run.curve("epoch"), run.curve(column), style, color=color, label=f"{name}, {part}")
    _finish(panels[0], "cross entropy with the labels", log=True)
    if len(terms) > 1:
        for column, label in terms.items():
            _line(panels[1], run.curve("epoch"), run.curve(column), "-", label=label)
        _finish(panels[1], f"terms of the {run.task.main}'s loss", log=True)
    return figure


def _loss_terms(run: RunFolder) -> dict[str, str]:
    """Returns the columns of the log that are terms of the main network's loss, with what a legend calls them."""
    main = run.task.main
    labels = {f"{main}_loss": "weighted sum", f"{main}_ce": "labels", "imitation": "imitation (KL)"}
    labels["l_mid"] = "L_mid"
    others = {"lr", *LOG_COLUMNS, *(f"{role}_ce" for role in run.task.roles if role != main)}
    others |= {column for column in run.rows[0] if column.endswith(("_accuracy", "_test_loss", "_max", "_min"))}
    others |= {f"{role}_{column}" for role in run.task.roles for column in SPEED_COLUMNS}
    return {column: labels.get(column, column) for column in run.rows[0] if column not in others}


def has_speed(run: RunFolder) -> bool:
    """Whether the run has logged how far it is from its speed limit; older versions did not."""
    return any(f"{name}_{SPEED_COLUMNS[0]}" in run.rows[0] for name in run.networks)


def draw_speed(run: RunFolder) -> Figure:
    """How far the networks in training are from their speed limit, over the epochs, and the two factors of it."""
    figure = Figure(figsize=(13, 4), layout="constrained")
    for axes, (column, title) in zip(figure.subplots(1, len(SPEED_TITLES)), SPEED_TITLES.items(), strict=True):
        for name in run.networks:
            if f"{name}_{column}" in run.rows[0]:
                color = _color(name, run.networks)
                _line(axes, run.curve("epoch"), run.curve(f"{name}_{column}"), "-", color=color, label=name)
        _finish(axes, title, log=True)
    return figure


def draw_layers(run: RunFolder) -> Figure:
    """What was logged of each matched layer over the epochs; for PKKD L_mid, ratio of gradients and variance of y_c."""
    titles = {name: title for name, title in LAYER_TITLES.items() if name in run.layers[0]}
    titles = titles or {name: name for name in run.layers[0] if name not in LAYER_COLUMNS}
    of_layer = group_rows(run.layers, ["layer"])
    last = len(of_layer) - 1
    colors = [colormaps["viridis"](0.9 * i / max(last, 1)) for i in range(len(of_layer))]
    figure = Figure(figsize=(13, 4), layout="constrained")
    panels = figure.subplots(1, len(titles), squeeze=False)[0]
    for axes, (column, title) in zip(panels, titles.items(), strict=True):
        for color, ((layer,), rows) in zip(colors, of_layer.items(), strict=True):
            _line(axes, [row["epoch"] for row in rows], [row[column] for row in rows], "-", color=color, label=layer)
        _finish(axes, title, log=column != "l_mid", legend=last < LEGEND_LINES and axes is panels[-1])
    if last >= LEGEND_LINES:
        scale = ScalarMappable(Normalize(0, last), ListedColormap(colors))
        bar = figure.colorbar(scale, ax=panels[-1], ticks=[0, last])
        bar.ax.set_yticklabels([layer for i, (layer,) in enumerate(of_layer) if i in (0, last)])
    return figure


def draw_comparison(runs: Sequence[RunFolder], by: Sequence[str]) -> Figure:
    """Test accuracy of the networks of several runs over the epochs; runs with equal columns `by` share a colour."""
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    run_at = {str(run.path): run for run in runs}
    groups = group_rows([row for run in runs for row in run.results()], by)
    for i, (key, rows) in enumerate(groups.items()):
        named = zip(by, key, strict=True)
        words = [v if name in ("method", "network") else f"{name} {v}" for name, v in named if v is not None]
        style = ":" if run_at[rows[0]["run"]].kind(rows[0]["network"]) == "cnn" else "-"
        for j, row in enumerate(rows):
            run, label = run_at[row["run"]], None if j else ", ".join(words)
            values = [100 * value for value in run.curve(f"{row['network']}_test_accuracy")]
            _line(axes, run.curve("epoch"), values, style, color=colormaps["tab10"](i % 10), label=label)
    _finish(axes, f"{runs[0].tested_on} accuracy (%)")
    return figure


def draw_weights(networks: Mapping[str, nn.Module]) -> Figure:
    """Histograms of the weights by kind of layer, with the Gaussian and the Laplace density that fit them.

    Weights are in units of their layer's standard deviation: pooled without that, layers of different scale would look
    like a Laplace density even if each were Gaussian.
    """
    of_network = {name: layer_weights(network) for name, network in networks.items()}
    columns = max(map(len, of_network.values()))
    figure = Figure(figsize=(4 * columns, 3.4 * len(networks)), layout="constrained")
    panels = figure.subplots(len(networks), columns, squeeze=False)
    x = torch.linspace(-4, 4, 161)
    for row, (name, kinds) in zip(panels, of_network.items(), strict=True):
        color = _color(name, list(networks))
        for axes in row[len(kinds) :]:
            axes.set_axis_off()
        for axes, (kind, layers) in zip(row, kinds.items(), strict=False):
            weights = torch.cat([(w - w.mean()) / w.std(correction=0) for w in layers.values()])
            density = torch.histc(weights, BINS, -4, 4) * BINS / (8 * len(weights))
            axes.stairs(density, torch.linspace(-4, 4, BINS + 1), fill=True, color=color, alpha=0.4)
            gaussian, laplace = fit_gaussian(weights), fit_laplace(weights)
            z, scale = (x - gaussian.center) / gaussian.scale, gaussian.scale * math.sqrt(2 * math.pi)
            label = f"Gaussian: {gaussian.log_likelihood:.3f} nats"
            axes.plot(x, (-z.square() / 2).exp() / scale, "-", color="black", label=label)
            z, scale = (x - laplace.center) / laplace.scale, 2 * laplace.scale
            label = f"Laplace: {laplace.log_likelihood:.3f} nats"
            axes.plot(x, (-z.abs()).exp() / scale, "--", color="black", label=label)
            axes.set(title=f"{name}: {kind}", xlabel="weight / standard deviation of its layer", ylabel="density")
            axes.set_ylim(top=1.3 * axes.get_ylim()[1])  # room for the legend
            axes.legend(fontsize="small", loc="upper right")
    return figure


def draw_trade_off(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Accuracy over the energy of the arithmetic per image: one point per row of a comparison, with its uncertainty."""
    points = [row for row in rows if "picojoules" in row]
    figure = Figure(figsize=(10, max(4.5, 0.22 * len(points))), layout="constrained")
    axes = figure.subplots()
    for i, row in enumerate(points):  # ten colours, then the next marker
        style = {"fmt": MARKERS[i // 10 % len(MARKERS)], "color": f"C{i % 10}", "capsize": 4, "label": row["network"]}
        axes.errorbar(row["picojoules"] / 1e6, 100 * row["accuracy"], 100 * row["uncertainty"], **style)
    axes.set_xscale("log")
    axes.margins(x=0.15, y=0.15)
    axes.set(xlabel="energy of the arithmetic per image, uJ (45 nm circuits, without memory)", ylabel="accuracy, %")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))  # beside the points
    return figure


# --- axes ---


def _color(network: str, networks: Sequence[str]) -> str:
    return COLORS.get(network) or f"C{networks.index(network)}"


def _line(axes: Axes, epochs: Sequence[float], values: Sequence[float], style: str, **options: Any) -> None:
    points = [(epoch, value) for epoch, value in zip(epochs, values, strict=True) if not math.isnan(value)]
    if not points:  # a curve without a number
        return
    # markers as long as they can be told apart: one epoch makes no line
    axes.plot(*zip(*points, strict=True), style, marker="." if len(points) <= 20 else None, **options)


def _finish(axes: Axes, title: str, log: bool = False, legend: bool = True) -> None:
    axes.set(title=title, xlabel="epoch")
    axes.set_xlim(left=0)
    locator = AutoLocator()
    locator.set_params(integer=True)
    axes.xaxis.set_major_locator(locator)
    axes.grid(alpha=0.3)
    values = [value for line in axes.lines for value in np.asarray(line.get_ydata(), float)]
    if log and values and 0 < 10 * min(values) < max(values):
        axes.set_yscale("log")
    if legend:
        axes.legend(fontsize="small")
