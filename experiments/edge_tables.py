"""Tables and plot of experiments/edge_accuracy.py, from its rows: accuracy, cost, and the two together."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from adderops.distill.runs.paired import paired_difference

KINDS = ("cnn", "adder, distilled", "adder, labels")
CONTRASTS = (("adder, distilled", "cnn"), ("adder, labels", "cnn"), ("adder, distilled", "adder, labels"))
MHZ = 120
Rows = list[dict[str, str]]


def width_of(network: str) -> float:
    """The width in the name of a network.

    >>> width_of("ds_cnn"), width_of("resnet8_x1_5")
    (1.0, 1.5)
    """
    _, _, width = network.partition("_x")
    return float(width.replace("_", ".")) if width else 1.0


def family_of(network: str) -> str:
    """The name of a network without its width."""
    return network.partition("_x")[0]


def networks_of(rows: Rows) -> list[str]:
    """The networks that have rows, narrow ones first."""
    present = {row["network"] for row in rows}
    return sorted(present, key=lambda network: (family_of(network), width_of(network)))


def select(rows: Rows, **values: str) -> Rows:
    """The rows with these values."""
    return [row for row in rows if all(row[column] == value for column, value in values.items())]


# --- accuracy ---


def with_interval(values: Sequence[float]) -> str:
    """Mean in %, and half the 95 % interval of Student's t; the mean alone for one value."""
    zeros = [{"seed": i, "accuracy": 0.0} for i in range(len(values))]
    found = paired_difference([{"seed": i, "accuracy": v} for i, v in enumerate(values)], zeros, "accuracy")
    shown = f"{100 * found['difference']:.2f}"
    return shown if found["high"] is None else f"{shown} ± {100 * (found['high'] - found['difference']):.2f}"


def shown_difference(found: Mapping[str, float | None]) -> str:
    """A difference in points with its interval; empty without a pair."""
    difference, low, high = (found[name] for name in ("difference", "low", "high"))
    if difference is None:
        return ""
    return f"{100 * difference:+.2f}" + ("" if low is None else f" ({100 * low:+.2f} to {100 * high:+.2f})")


def accuracy_table(rows: Rows) -> str:
    """Accuracy by network and kind, in float32 and int8."""
    lines = ["| | seeds | float32, % | int8, % | int8 - float32, points |", "|---|---|---|---|---|"]
    for network in networks_of(rows):
        for kind in KINDS:
            if mine := select(rows, network=network, kind=kind):
                columns = ("float_accuracy", "int8_accuracy")
                cells = [with_interval([float(row[column]) for row in mine]) for column in columns]
                floats, integers = ([{"seed": r["seed"], "accuracy": r[c]} for r in mine] for c in columns)
                lost = shown_difference(paired_difference(integers, floats, "accuracy"))
                lines.append(f"| {network}, {kind} | {len(mine)} | {' | '.join(cells)} | {lost} |")
    return "\n".join(lines)


def contrast_table(rows: Rows) -> str:
    """Differences of the int8 networks, paired by seed."""
    names = [f"{ours} - {theirs}" for ours, theirs in CONTRASTS]
    lines = ["| int8, points | " + " | ".join(names) + " |", "|---|" + "---|" * len(names)]
    for network in networks_of(rows):
        groups = {kind: select(rows, network=network, kind=kind) for kind in KINDS}
        found = [paired_difference(groups[ours], groups[theirs], "int8_accuracy") for ours, theirs in CONTRASTS]
        lines.append(f"| {network} | {' | '.join(map(shown_difference, found))} |")
    return "\n".join(lines)


# --- cost ---


def cost_table(rows: Rows, costs: Rows) -> str:
    """Size and modelled time of the int8 networks, beside their accuracy."""
    lines = [
        f"| int8 | engine | parameters | flash, KiB | arena, KiB | cycles, M | ms at {MHZ} MHz | accuracy, % |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for network in networks_of(costs):
        for cost in select(costs, network=network):
            kinds = ("cnn",) if cost["kind"] == "cnn" else ("adder, distilled", "adder, labels")
            values = [[float(r["int8_accuracy"]) for r in select(rows, network=network, kind=kind)] for kind in kinds]
            shown = "; ".join(with_interval(v) + (", labels" if i else "") for i, v in enumerate(values) if v)
            cycles = float(cost["cycles"])
            sizes = " | ".join(f"{int(cost[column]) / 1024:.1f}" for column in ("flash", "arena"))
            lines.append(
                f"| {network}, {cost['kind']} | {cost['engine']} | {int(cost['parameters']):,} | {sizes} "
                f"| {cycles / 1e6:.2f} | {cycles / MHZ / 1e3:.1f} | {shown} |"
            )
    return "\n".join(lines)


# --- both ---


@dataclass(frozen=True)
class Point:
    """A network on the plane of cycles and accuracy."""

    network: str
    kind: str
    engine: str
    cycles: float
    accuracy: float

    @property
    def width(self) -> float:
        return width_of(self.network)


def points(rows: Rows, costs: Rows) -> list[Point]:
    """One point per network, kind and engine that has rows; accuracies of the int8 networks, means over seeds."""
    found = []
    for network in networks_of(rows):
        for kind in KINDS:
            mine = [float(row["int8_accuracy"]) for row in select(rows, network=network, kind=kind)]
            for cost in select(costs, network=network, kind=kind.partition(",")[0]) if mine else []:
                found.append(Point(network, kind, cost["engine"], float(cost["cycles"]), statistics.fmean(mine)))
    return found


def front(candidates: Sequence[Point]) -> list[Point]:
    """The points that no other one beats in accuracy without more cycles, cheap ones first.

    >>> slow, good, cheap = (Point("cnn", "", "", *of) for of in ((3, 0.85), (2, 0.9), (1, 0.8)))
    >>> front([slow, good, cheap]) == [cheap, good]
    True
    """
    best, kept = -math.inf, []
    for point in sorted(candidates, key=lambda p: (p.cycles, -p.accuracy)):
        if point.accuracy > best:
            best = point.accuracy
            kept.append(point)
    return kept


def equal_accuracy(cnn: Point, adders: Sequence[Point]) -> tuple[str, float, float] | None:
    """The width at which an adder network has the accuracy of a CNN, and its cycles there.

    Between two widths of the adder network accuracy is a line over the logarithm of the width, and the logarithm of
    the cycles, too.

    Args:
        cnn: the point to reach.
        adders: of the same family, one per width.

    Returns:
        "", the width and the cycles; or "<=" and those of the narrowest adder network, which reaches it already; or
        None if no measured width reaches it.
    """
    ordered = sorted(adders, key=lambda point: point.width)
    if not ordered:
        return None
    if ordered[0].accuracy >= cnn.accuracy:
        return "<=", ordered[0].width, ordered[0].cycles
    for narrow, wide in zip(ordered, ordered[1:], strict=False):
        if narrow.accuracy < cnn.accuracy <= wide.accuracy:
            part = (cnn.accuracy - narrow.accuracy) / (wide.accuracy - narrow.accuracy)
            width = narrow.width * (wide.width / narrow.width) ** part
            return "", width, narrow.cycles * (wide.cycles / narrow.cycles) ** part
    return None


def equal_accuracy_table(found: Sequence[Point], kind: str) -> str:
    """For each CNN: what is left of the factor in cycles where the adder network is as accurate."""
    adders = [point for point in found if point.kind == kind]
    lines = [
        f"| CNN, int8 | engine | {kind}: of the same width, points | cycles, CNN / adder, same width "
        "| width with the same accuracy / the CNN's | cycles, CNN / adder, same accuracy |",
        "|---|---|---|---|---|---|",
    ]
    for cnn in (point for point in found if point.kind == "cnn"):
        family = [point for point in adders if family_of(point.network) == family_of(cnn.network)]
        same = next((point for point in family if point.network == cnn.network), None)
        cells = ["", ""]
        if same is not None:
            cells = [f"{100 * (same.accuracy - cnn.accuracy):+.2f}", f"{cnn.cycles / same.cycles:.2f}"]
        reached = equal_accuracy(cnn, family)
        if reached is None:
            widest = max((point.width for point in family), default=None)
            cells += ["" if widest is None else f"> {widest / cnn.width:.2f}", ""]
        else:
            sign, width, cycles = reached
            left = {"": "", "<=": ">= "}[sign] + f"{cnn.cycles / cycles:.2f}"
            cells += [f"{sign} {width / cnn.width:.2f}".strip(), left]
        lines.append(f"| {cnn.network} | {cnn.engine} | {' | '.join(cells)} |")
    return "\n".join(lines)


def answer(rows: Rows, costs: Rows, kind: str) -> list[str]:
    """One sentence per CNN: how much width the adder network needs for its accuracy, and what that leaves.

    By the means over seeds; in brackets by each seed alone, as far as it has all networks of the family.
    """
    found = points(rows, costs)
    seeds = [points(select(rows, seed=seed), costs) for seed in dict.fromkeys(row["seed"] for row in rows)]
    sentences = []
    cnns = [point for point in found if point.kind == "cnn"]
    for network in dict.fromkeys(point.network for point in cnns):
        engines = [point for point in cnns if point.network == network]
        family = [point for point in found if point.kind == kind and family_of(point.network) == family_of(network)]
        same = next((point for point in family if point.network == network), None)
        if not family:
            continue
        reached = equal_accuracy(engines[0], family)
        if reached is None:
            best = max(family, key=lambda point: point.accuracy)
            factors = _factors(engines, best.cycles)
            gap = 100 * (engines[0].accuracy - best.accuracy)
            text = f"no measured width reaches it; {best.network}, the best, is {gap:.2f} points behind at {factors}"
            same = None if best is same else same
        elif reached[0]:
            factors = _factors(engines, reached[2])
            text = f"the narrowest measured, {reached[1] / engines[0].width:.2f} times as wide, has it, at {factors}"
        else:
            factors = _factors(engines, reached[2])
            alone = _widths_by_seed(engines[0], family, seeds)
            text = f"it needs {reached[1] / engines[0].width:.2f} times the width{alone}, which leaves {factors}"
        before = "" if same is None else f" (same width: {_factors(engines, same.cycles)})"
        sentences.append(f"- Accuracy of {network} as a CNN, by the adder network ({kind}): {text}{before}.")
    return sentences


def _widths_by_seed(cnn: Point, family: Sequence[Point], seeds: Sequence[Sequence[Point]]) -> str:
    """The widths that the seeds alone ask for, smallest to largest, in brackets; empty for a single seed."""
    networks, widths = {point.network for point in family}, []
    for found in seeds:
        mine = [p for p in found if p.kind == family[0].kind and p.network in networks]
        own = [p for p in found if (p.network, p.engine) == (cnn.network, cnn.engine)]
        if own and len(mine) == len(family):
            reached = equal_accuracy(own[0], mine)
            widest = max(p.width for p in mine)
            widths.append((widest, "> ") if reached is None else (reached[1], reached[0].replace("<=", "<= ")))
    shown = [f"{sign}{width / cnn.width:.2f}" for width, sign in sorted(widths)]
    return f" (by seed: {', '.join(shown)})" if len(shown) > 1 else ""


def _factors(engines: Sequence[Point], cycles: float) -> str:
    """How much faster than the CNN with each engine."""
    shown = " and ".join(f"{point.cycles / cycles:.2f} ({point.engine})" for point in engines)
    return f"{shown} times the CNN's speed"


def front_line(found: Sequence[Point]) -> str:
    """Who is on the front, with each engine of the CNNs."""
    lines = []
    for engine in dict.fromkeys(point.engine for point in found if point.kind == "cnn"):
        candidates = [point for point in found if point.kind != "cnn" or point.engine == engine]
        names = ", ".join(f"{point.network} ({point.kind})" for point in front(candidates))
        lines.append(f"On the front, with {engine} for the CNNs, from the cheapest: {names}.")
    return "\n\n".join(lines)


def plotted(rows: Rows) -> Rows:
    """The rows of the longest training.

    >>> plotted([{"epochs": "2"}, {"epochs": "10"}, {"epochs": "1"}])
    [{'epochs': '10'}]
    """
    most = max((int(row["epochs"]) for row in rows), default=0)
    return select(rows, epochs=str(most))


def plot(rows: Rows, costs: Rows, path: Path) -> None:
    """Accuracy over cycles, one axis per family, with the smallest and largest seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found = points(rows, costs)
    families = list(dict.fromkeys(family_of(point.network) for point in found))
    if not families:
        return
    lines = list(dict.fromkeys((point.kind, point.engine) for point in found))
    figure, axes = pyplot.subplots(
        1, len(families), figsize=(5.5 * len(families), 4), squeeze=False, layout="constrained", sharey=True
    )
    for axis, family in zip(axes[0], families, strict=True):
        for i, (kind, engine) in enumerate(lines):
            mine = [p for p in found if (p.kind, p.engine, family_of(p.network)) == (kind, engine, family)]
            if not mine:
                continue
            seeds = [[float(r["int8_accuracy"]) for r in select(rows, network=p.network, kind=kind)] for p in mine]
            below = [100 * (p.accuracy - min(values)) for p, values in zip(mine, seeds, strict=True)]
            above = [100 * (max(values) - p.accuracy) for p, values in zip(mine, seeds, strict=True)]
            cycles, shares = [p.cycles / 1e6 for p in mine], [100 * p.accuracy for p in mine]
            label = f"{kind} ({engine})" if kind == "cnn" else kind
            style = "-" if kind != "cnn" else "--"
            axis.errorbar(cycles, shares, yerr=[below, above], marker="o", linestyle=style, color=f"C{i}", label=label)
            for p in mine:
                axis.annotate(
                    f"x{p.width:g}",
                    (p.cycles / 1e6, 100 * p.accuracy),
                    fontsize=7,
                    xytext=(3, -9),
                    textcoords="offset points",
                )
        axis.set_xscale("log")
        for ticks in (axis.xaxis.set_major_formatter, axis.xaxis.set_minor_formatter):
            ticks("{x:g}")
        axis.set_xlabel("modelled cycles of a Cortex-M4, millions")
        axis.set_title(f"{family}, int8: accuracy in %, means and range of the seeds", fontsize=9)
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=150, metadata={"Software": None})
    pyplot.close(figure)


# --- the page ---

NOTES = """Made by `python experiments/edge_accuracy.py tables`. The docstring of that file says what was trained and
how, that of `experiments/edge_costs.py` what was counted; no board has confirmed a cycle. An interval covers the choice
of the seed, not that of the 10,000 images. The plot shows the longest training.
"""


def page(rows: Rows, costs: Rows) -> str:
    """All tables in Markdown, one part per number of epochs."""
    parts = [NOTES]
    for epochs in dict.fromkeys(row["epochs"] for row in rows):
        mine = select(rows, epochs=epochs)
        found = points(mine, costs)
        parts += [
            f"**{mine[0]['dataset']}, {epochs} epoch{'s' * (epochs != '1')}**: accuracy on the test images, mean and "
            "95 % interval over seeds\n",
            accuracy_table(mine) + "\n",
            "Differences of the int8 networks, paired by seed\n",
            contrast_table(mine) + "\n",
        ]
        if found:
            parts += [cost_table(mine, costs) + "\n"]
            for kind in KINDS[1:]:
                if any(point.kind == kind for point in found):
                    parts.append(equal_accuracy_table(found, kind) + "\n")
                    parts.append("\n".join(answer(mine, costs, kind)) + "\n")
            parts.append(front_line(found) + "\n")
    return "\n".join(parts)
