"""The table at the end of a training: accuracy of each network, costs if known, and a verdict on the differences."""

from collections.abc import Mapping, Sequence
from typing import Any

from adderops.distill.methods import METHODS
from adderops.distill.runs.paired import mean_and_deviation, paired_difference
from adderops.distill.runs.tables import KINDS, percent, text_table

CNN, PLAIN, PKKD, INT8 = KINDS["cnn"], METHODS["plain"].label, METHODS["pkkd"].label, "adder, PKKD, int8"
# Differences under a table that has both rows: title, row, and the row that it is compared with.
DIFFERENCES = (("PKKD - the labels alone", PKKD, PLAIN), ("PKKD - CNN", PKKD, CNN), ("int8 - float32", INT8, PKKD))
COSTS = """\
mult., add.: millions per image, |x - w| is two additions
uJ: their energy in 45 nm circuits (Horowitz, ISSCC 2014); CNN in int8: {:.3g}
images/s: batches of 64 on the CPU; kB: of the state_dict"""


def rows_of(summaries: Sequence[dict[str, Any]], costs: Mapping[str, dict[str, float]]) -> list[dict[str, Any]]:
    """Returns the rows of the table: network, number of seeds, mean accuracy and its uncertainty, and costs if known.

    The uncertainty is the standard deviation over the seeds or, for a single seed, the standard error of the test.
    """
    rows = []
    for label, results in _results(summaries).items():
        mean, deviation = mean_and_deviation([result["accuracy"] for result in results])
        uncertainty = standard_error(results[0]) if deviation is None else deviation
        row = {"network": label, "seeds": len(results), "accuracy": mean, "uncertainty": uncertainty}
        rows.append(row | costs.get(label, {}))
    return rows


def labels_of(methods: Sequence[str]) -> dict[tuple[str, str], str]:
    """Returns what the table calls each network, by method and name, in the order of the rows.

    CNNs come first, then the networks of methods without a distillation, then those with one, then int8.
    """
    labels = {}
    for method in dict.fromkeys(methods):
        task = METHODS[method]
        for role, kind in task.roles.items():
            other = CNN if kind == "cnn" else f"{task.label}: {role}"
            labels[method, role] = task.label if role == task.main else other
    networks = sorted(labels, key=lambda network: (labels[network] != CNN, METHODS[network[0]].distills))
    rows: dict[tuple[str, str], str] = {}
    for method, role in networks:
        label = labels[method, role]
        rows |= {(method, role): label, (method, f"{role}_ema"): f"{label}, averaged"}
    return rows | {(method, "int8"): INT8 for method in methods}


def _results(summaries: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Returns seed, accuracy and number of test images of all runs that have a network, by its label."""
    found: dict[str, list[dict[str, Any]]] = {}
    for (method, network), label in labels_of([summary["method"] for summary in summaries]).items():
        for summary in summaries:
            accuracy = summary.get(f"{network}_test_accuracy")
            if summary["method"] == method and accuracy is not None:
                result = {"seed": summary["seed"], "accuracy": accuracy, "images": summary["test_images"]}
                found.setdefault(label, []).append(result)
    return found


def standard_error(result: dict[str, Any]) -> float:
    """Returns the standard error of an accuracy; two hits and two misses are added, so that it is not 0 at 100 %."""
    images = result["images"] + 4
    share = (result["accuracy"] * result["images"] + 2) / images
    return (share * (1 - share) / images) ** 0.5


def _differences(summaries: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns title, difference and 95 % interval of each of DIFFERENCES that the summaries allow.

    Several seeds are paired.  For a single seed the two tests count as independent samples, which makes the interval
    too wide: the networks are tested on the same images.
    """
    results, found = _results(summaries), []
    for title, label, other in DIFFERENCES:
        if label not in results or other not in results:
            continue
        difference = paired_difference(results[label], results[other], "accuracy")
        if difference["low"] is None:
            half = 1.96 * sum(standard_error(results[name][0]) ** 2 for name in (label, other)) ** 0.5
            middle = difference["difference"]
            difference |= {"low": middle - half, "high": middle + half}
        found.append({"title": title, **difference})
    return found


def table(summaries: Sequence[dict[str, Any]], costs: Mapping[str, dict[str, float]] | None = None) -> str:
    """Returns what was trained and tested, one line per network, and the differences with a verdict on each.

    Args:
        summaries: what `train` returned for one run, or for the runs of a comparison on the same data.
        costs: by label, as in comparison.csv.

    >>> run = {"dataset": "digits", "network": "lenet5", "epochs": 20, "seed": 0, "train_images": 1297}
    >>> run |= {"test_images": 500, "test_is_validation": False}
    >>> print(table([run | {"method": "pkkd", "teacher_test_accuracy": 0.992, "student_test_accuracy": 0.986},
    ...              run | {"method": "plain", "student_test_accuracy": 0.99}]))
    digits, lenet5, 20 epochs, seed 0
    1297 training images, accuracy on 500 test images
    <BLANKLINE>
    network                 accuracy, %
    CNN                   99.20 +- 0.48
    adder, by the labels  99.00 +- 0.52
    adder, by PKKD        98.60 +- 0.59
    <BLANKLINE>
    PKKD - the labels alone: -0.40 points (-1.94 to +1.14): within the noise
    PKKD - CNN:              -0.60 points (-2.09 to +0.89): within the noise
    +-: standard error, from the number of images; ( ): 95 % interval, from the standard errors of one seed
    """
    rows = []
    for row in rows_of(summaries, costs or {}):
        cells = {"network": row["network"], "accuracy, %": percent(row["accuracy"], row["uncertainty"])}
        rows.append(cells | (_shown_costs(row) if costs else {}))
    differences, seeds = _differences(summaries), {summary["seed"] for summary in summaries}
    width = max((len(found["title"]) for found in differences), default=0) + 1
    notes = [f"{found['title'] + ':':<{width}} {_verdict(found)}" for found in differences]
    if len(seeds) > 1:
        spread, interval = f"standard deviation over {len(seeds)} seeds", "paired by seed"
    else:
        spread, interval = "standard error, from the number of images", "from the standard errors of one seed"
    notes.append(f"+-: {spread}" + (f"; ( ): 95 % interval, {interval}" if differences else ""))
    if costs:
        notes.append(COSTS.format(costs[CNN]["picojoules_in_int8"] / 1e6))
    return "\n\n".join([_title(summaries[0], sorted(seeds)), text_table(rows), "\n".join(notes)])


def _title(summary: dict[str, Any], seeds: list[int]) -> str:
    kind = "validation" if summary["test_is_validation"] else "test"
    runs = f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {seeds[0]} to {seeds[-1]}"
    trained = f"{summary['train_images']} training images, " if "train_images" in summary else ""
    return (
        f"{summary['dataset']}, {summary['network']}, {summary['epochs']} epochs, {runs}\n"
        f"{trained}accuracy on {summary['test_images']} {kind} images"
    )


def _verdict(found: dict[str, Any]) -> str:
    word = "better" if found["low"] > 0 else "worse" if found["high"] < 0 else "within the noise"
    difference, low, high = (percent(found[name], signed=True) for name in ("difference", "low", "high"))
    return f"{difference} points ({low} to {high}): {word}"


def _shown_costs(row: dict[str, Any]) -> dict[str, str]:
    if "bytes" not in row:  # averaged weights cost what their network does
        return dict.fromkeys(("mult.", "add.", "uJ", "images/s", "kB"), "-")
    return {
        "mult.": f"{row['multiplications'] / 1e6:.3g}",
        "add.": f"{row['additions'] / 1e6:.3g}",
        "uJ": f"{row['picojoules'] / 1e6:.3g}",
        "images/s": f"{row['images_per_second']:.0f}",
        "kB": f"{row['bytes'] / 1e3:.0f}",
    }
