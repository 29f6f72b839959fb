"""`--method compare`: trains the runs of a comparison and measures what distillation and int8 gain and cost.

For each seed: the CNN together with the adder network that it teaches (pkkd), and the adder network trained on the
labels alone (plain); the distilled network also in int8.
"""

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
from adderops.distill.runs.folder import RunFolder, compared_runs
from adderops.distill.runs.quantize import images_per_second
from adderops.distill.runs.results import CNN, INT8, PKKD, PLAIN, rows_of, table
from adderops.distill.trainer import train
from adderops.operations import count_operations, energy
from adderops.quant import Scheme, calibrate, convert, reestimate_batchnorm

TIMED_BATCH = 64


def compare(config: Config, data: Data, folder: Path, device: torch.device) -> str:
    """Trains the runs of a comparison, each in its own folder, and tests them; finished runs are not trained again.

    The folder gets config.json, summary.json (the summaries of all runs), comparison.csv (the table) and
    comparison.png (accuracy over energy).

    Args:
        config: with method 'compare'.
        data: the image set of the configuration.
        folder: made if missing.
        device: for training; int8 and the timing run on the CPU.

    Returns:
        The table with its notes; under torchrun on process 0 only, '' on the others.

    Raises:
        ValueError: there is no teacher, so there is nothing to compare; or as `train`, like all other errors.
    """
    from adderops.distill.runs.figures import (  # needs matplotlib: fail before the training
        draw_trade_off,
        png,
    )

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
    except (ValueError, RuntimeError) as error:  # another library's network, or one hardly trained
        notes = [f"no int8: {error}"]
    costs = _costs(networks, data)
    write_json(folder / "summary.json", summaries)
    rows = rows_of(summaries, costs)
    write_csv(folder / "comparison.csv", rows)
    write_atomically(folder / "comparison.png", png(draw_trade_off(rows)))
    return "\n".join([table(summaries, costs), *notes, f"figure: {folder / 'comparison.png'}"])


def _test_in_int8(summaries: list[dict[str, Any]], runs: list[RunFolder], data: Data) -> nn.Module:
    """Adds the int8 accuracy to the summaries of the distilled runs; returns the int8 network of the first seed."""
    distilled = [(summary, run) for summary, run in zip(summaries, runs, strict=True) if run.task.distills]
    networks = [_in_int8(run, data) for _, run in distilled]
    for network, (summary, run) in zip(networks, distilled, strict=True):
        summary |= evaluate({"int8": network}, data.test, torch.device("cpu"), workers=run.config.workers)
    return networks[0]


def _in_int8(run: RunFolder, data: Data) -> nn.Module:
    """Returns the student of a run with all layers in int8."""
    if run.config.bits is not None:
        raise ValueError(f"the student already has {run.config.bits} bits: see the command quantize")
    batches = list(calibration_batches(data.train))
    student = calibrate(run.network("student"), batches, Scheme(ends="int8"))
    return convert(reestimate_batchnorm(student, batches).eval(), batches[0])


def _costs(networks: dict[str, nn.Module], data: Data) -> dict[str, dict[str, float]]:
    """Returns the costs of each network by label; the plain student costs what the distilled one does."""
    [(images, _)] = data.test.batches([torch.arange(TIMED_BATCH) % len(data.test)])
    speeds, costs = images_per_second(networks, dict.fromkeys(networks, images)), {}
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
