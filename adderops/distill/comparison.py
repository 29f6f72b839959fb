"""`--method compare`: what distillation and int8 are worth, in one table.

For each seed the CNN and the adder network that it teaches (pkkd), and the adder network trained by the labels alone
(plain); of the distilled network its form in int8.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from adderops.atomic import write_atomically
from adderops.distill import distributed
from adderops.distill.checkpoint import write_csv, write_json
from adderops.distill.config import Config
from adderops.distill.data import Data, calibration_batches
from adderops.distill.evaluate import evaluate
from adderops.distill.methods import METHODS
from adderops.distill.paired import mean_and_deviation, paired_difference
from adderops.distill.quantize import images_per_second
from adderops.distill.run_folder import COMPARED, RunFolder, compared_runs
from adderops.distill.text_table import text_table
from adderops.distill.trainer import train
from adderops.operations import count_operations, energy
from adderops.quant import Scheme, calibrate, convert, reestimate_batchnorm

CNN, PLAIN, PKKD = (METHODS[name].label for name in ("cnn", "plain", "pkkd"))
INT8 = "adder, PKKD, int8"
# Differences under the table: title, row, and the row that it is compared with.
DIFFERENCES = (("PKKD - the labels alone", PKKD, PLAIN), ("PKKD - CNN", PKKD, CNN), ("int8 - float32", INT8, PKKD))
COSTS = """\
mult., add.: millions per image, |x - w| is two additions
uJ: their energy in 45 nm circuits (Horowitz, ISSCC 2014); CNN in int8: {:.3g}
images/s: batches of 64 on the CPU; kB: of the state_dict"""
TIMED_BATCH = 64


def compare(config: Config, data: Data, folder: Path, device: torch.device) -> str:
    """Trains the runs of a comparison in folders of their own; those that are finished already return at once.

    The folder gets config.json, summary.json (the summaries of all runs), comparison.csv (the table) and
    comparison.png (accuracy over energy).

    Args:
        config: resolved, with the method 'compare'.
        data: that of the configuration.
        folder: made if missing.
        device: where to train; int8 and the timing run on the CPU.

    Returns:
        The table, and what the differences in it mean; under torchrun on process 0 only, '' on the others.

    Raises:
        ValueError: there is no teacher, so that there is nothing to compare; or as `train`.
        Also what `train` raises.
    """
    from adderops.distill.figures import draw_trade_off, png  # needs matplotlib: before the training, not behind it

    if config.distillation is not None and config.distillation.teacher == "none":
        raise ValueError("teacher: expected progressive or frozen for the method compare, got none")
    runs = compared_runs(config, folder)
    if distributed.rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "config.json", config.flat())
    summaries = [train(one, data, path, device) for path, one in runs.items()]
    if distributed.rank() != 0:
        return ""
    folders = [RunFolder.load(path) for path in runs]
    networks = {CNN: folders[0].network("teacher"), PKKD: folders[0].network("student")}
    notes = []
    try:
        networks[INT8] = _test_in_int8(summaries, folders, data)
    except (ValueError, RuntimeError) as error:  # of a network that is not of ours, or hardly trained
        notes = [f"no int8: {error}"]
    costs = _costs(networks, data)
    write_json(folder / "summary.json", summaries)
    rows = rows_of(summaries, costs)
    write_csv(folder / "comparison.csv", rows)
    write_atomically(folder / "comparison.png", png(draw_trade_off(rows)))
    return "\n".join([table(summaries, costs), *notes, f"figure: {folder / 'comparison.png'}"])


def _test_in_int8(summaries: list[dict[str, Any]], runs: list[RunFolder], data: Data) -> nn.Module:
    """Adds the accuracy in int8 to the summaries of pkkd; returns the network of the first seed in int8."""
    distilled = [(summary, run) for summary, run in zip(summaries, runs, strict=True) if summary["method"] == "pkkd"]
    networks = [_in_int8(run, data) for _, run in distilled]
    for network, (summary, run) in zip(networks, distilled, strict=True):
        summary |= evaluate({"int8": network}, data.test, torch.device("cpu"), workers=run.config.workers)
    return networks[0]


def _in_int8(run: RunFolder, data: Data) -> nn.Module:
    """Returns the student of a run with all its layers in 8 bits."""
    if run.config.bits is not None:
        raise ValueError(f"the student has {run.config.bits} bits already: see the command quantize")
    batches = list(calibration_batches(data.train))
    student = calibrate(run.network("student"), batches, Scheme(ends="int8"))
    return convert(reestimate_batchnorm(student, batches).eval(), batches[0])


def _costs(networks: dict[str, nn.Module], data: Data) -> dict[str, dict[str, float]]:
    """Returns what each network costs, and under the label of the plain student what the distilled one does."""
    [(images, _)] = data.test.batches([torch.arange(TIMED_BATCH) % len(data.test)])
    speeds, costs = images_per_second(networks, images), {}
    for label, network in networks.items():
        in_int8 = label == INT8
        counted = count_operations(networks[PKKD] if in_int8 else network, images)
        costs[label] = {
            "multiplications": counted.multiplications,
            "additions": counted.additions,
            "picojoules": energy(counted, "int8" if in_int8 else "float32"),
            "picojoules_in_int8": energy(counted, "int8"),
            "images_per_second": speeds[label],
            "bytes": sum(tensor.numel() * tensor.element_size() for tensor in network.state_dict().values()),
        }
    return costs | {PLAIN: costs[PKKD]}  # the same architecture


def rows_of(summaries: Sequence[dict[str, Any]], costs: Mapping[str, dict[str, float]]) -> list[dict[str, Any]]:
    """Returns the rows of the table: network, seeds, mean accuracy and its uncertainty, and the costs where known.

    The uncertainty is the standard deviation over the seeds; of one seed the standard error of the test images.
    """
    rows = []
    for label, results in _results(summaries).items():
        mean, deviation = mean_and_deviation([result["accuracy"] for result in results])
        uncertainty = _standard_error(results[0]) if deviation is None else deviation
        row = {"network": label, "seeds": len(results), "accuracy": mean, "uncertainty": uncertainty}
        rows.append(row | costs.get(label, {}))
    return rows


def _results(summaries: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Returns seed, accuracy and test images of all runs that have a network, by its label."""
    found: dict[str, list[dict[str, Any]]] = {}
    for (method, network), label in _rows().items():
        for ending, averaged in (("", ""), ("_ema", ", averaged")):
            for summary in summaries:
                accuracy = summary.get(f"{network}{ending}_test_accuracy")
                if summary["method"] == method and accuracy is not None:
                    result = {"seed": summary["seed"], "accuracy": accuracy, "images": summary["test_images"]}
                    found.setdefault(label + averaged, []).append(result)
    return found


def _rows() -> dict[tuple[str, str], str]:
    """Returns labels of the table's rows, by method and name of a network in the summary: CNNs first, int8 last."""
    rows = {}
    for method, task in METHODS.items():
        for role, kind in task.roles.items():
            rows[method, role] = task.label if role == task.main else CNN if kind == "cnn" else f"{task.label}: {role}"
    ordered = sorted(rows.items(), key=lambda row: (row[1] != CNN, row[0][0] == COMPARED[0]))
    return dict(ordered) | {(COMPARED[0], "int8"): INT8}


def _standard_error(result: dict[str, Any]) -> float:
    """That of an accuracy by the number of images; two hits and two misses are added, so that it is not 0 at 100 %."""
    images = result["images"] + 4
    share = (result["accuracy"] * result["images"] + 2) / images
    return (share * (1 - share) / images) ** 0.5


def _differences(summaries: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns title, difference and 95 % interval of each of DIFFERENCES that the summaries allow.

    Over several seeds in pairs of a seed; of one seed as of two independent samples of test images, which is wider
    than the truth: the networks are tested on the same images.
    """
    results, found = _results(summaries), []
    for title, label, other in DIFFERENCES:
        if label not in results or other not in results:
            continue
        difference = paired_difference(results[label], results[other], "accuracy")
        if difference["low"] is None:
            half = 1.96 * sum(_standard_error(results[name][0]) ** 2 for name in (label, other)) ** 0.5
            middle = difference["difference"]
            difference |= {"low": middle - half, "high": middle + half}
        found.append({"title": title, **difference})
    return found


def table(summaries: Sequence[dict[str, Any]], costs: Mapping[str, dict[str, float]] | None = None) -> str:
    """Returns what was trained and tested, a line for each kind of network, and the differences with a verdict on each.

    Args:
        summaries: of runs, as `train` returns them, on the same data; one run or those of a comparison.
        costs: by label, as the rows of comparison.csv have them.

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
    +-: standard error by the number of images; ( ): 95 % interval, likewise, of one seed
    """
    rows = []
    for row in rows_of(summaries, costs or {}):
        accuracy = f"{100 * row['accuracy']:.2f} +- {100 * row['uncertainty']:.2f}"
        rows.append({"network": row["network"], "accuracy, %": accuracy, **(_shown_costs(row) if costs else {})})
    differences, seeds = _differences(summaries), {summary["seed"] for summary in summaries}
    width = max((len(found["title"]) for found in differences), default=0) + 1
    notes = [f"{found['title'] + ':':<{width}} {_verdict(found)}" for found in differences]
    if len(seeds) > 1:
        spread, interval = f"standard deviation over {len(seeds)} seeds", "in pairs of a seed"
    else:
        spread, interval = "standard error by the number of images", "likewise, of one seed"
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
    difference, low, high = (100 * found[name] for name in ("difference", "low", "high"))
    word = "better" if low > 0 else "worse" if high < 0 else "within the noise"
    return f"{difference:+.2f} points ({low:+.2f} to {high:+.2f}): {word}"


def _shown_costs(row: dict[str, Any]) -> dict[str, str]:
    if "bytes" not in row:  # an average of weights: as the network it is of
        return dict.fromkeys(("mult.", "add.", "uJ", "images/s", "kB"), "-")
    return {
        "mult.": f"{row['multiplications'] / 1e6:.3g}",
        "add.": f"{row['additions'] / 1e6:.3g}",
        "uJ": f"{row['picojoules'] / 1e6:.3g}",
        "images/s": f"{row['images_per_second']:.0f}",
        "kB": f"{row['bytes'] / 1e3:.0f}",
    }
