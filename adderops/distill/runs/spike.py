"""`spike RUN`: makes the CNN of a finished run a spiking network, without training, tests it and writes it."""

import json
import shlex
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from adderops.distill.build import device_type
from adderops.distill.checkpoint import load_state_dict, reading, save_tensors, write_json
from adderops.distill.data import calibration_batches
from adderops.distill.evaluate import TEST_BATCH, evaluate
from adderops.distill.networks import arch_of
from adderops.distill.options import flag, option
from adderops.distill.runs.command import CommandOptions, of_training, run_folder, weights_option
from adderops.distill.runs.folder import RunFolder, role_of
from adderops.distill.runs.tables import percent, text_table
from adderops.models import create_model
from adderops.spiking.calibration import CALIBRATIONS, calibrate, converted

NETWORK, FACTS = "network.pt", "spiking.json"


@dataclass(frozen=True)
class Options(CommandOptions):
    folder: Path = run_folder("run folder with a CNN")
    weights: str | None = weights_option("CNN to convert (default: the run's own)", kinds=("cnn",))
    steps: int = option(32, "time steps per image", least=1, most=4096)
    calibrate: str = option(
        "advanced",
        "what is fitted to the CNN's activations: thresholds (none), biases too (light), weights, biases and initial "
        "membranes too (advanced)",
        choices=tuple(CALIBRATIONS),
    )
    images: int = option(1024, "training images for the calibration", least=1)
    test_images: int | None = option(
        None, "test on so many images, evenly spaced among the test images (default: all)", type=int, least=1
    )
    device: str | None = of_training("device", "where to calibrate and test (default: as in training)")
    threads: int | None = of_training("threads", "CPU threads (default: as in training)")
    output: Path | None = option(
        None, "folder to write, new or in an existing one (default: RUN/spiking/WEIGHTS-STEPS-CALIBRATE)", type=Path
    )


def run(options: Options) -> None:
    run = RunFolder.load(options.folder)
    cnns = [name for name in run.networks if run.kind(name) == "cnn"]
    if not cnns:
        why = "; no adder network becomes spiking without training: the mean of |spike - w| is not |mean - w|"
        adder = any(run.kind(name) == "adder" for name in run.networks)
        raise ValueError(f"{run.path}: expected a run with a CNN, got {run.config.method}{why if adder else ''}")
    name = options.weights or cnns[0]
    cnn, data = run.network(name), run.load_data()
    folder = options.output or run.path / "spiking" / f"{name}-{options.steps}-{options.calibrate}"
    if options.output is not None and not folder.parent.is_dir():
        raise FileNotFoundError(f"--output: expected a folder in an existing one, got {folder}")
    folder.mkdir(parents=True, exist_ok=True)
    device = torch.device(device_type(options.device or run.config.device))
    torch.set_num_threads(options.threads or run.config.threads)

    images = torch.cat(list(calibration_batches(data.train, options.images))).to(device)
    network = calibrate(cnn.to(device), images, options.steps, options.calibrate)
    count = min(options.test_images or len(data.test), len(data.test))
    chosen = torch.arange(count) * len(data.test) // count
    tested, rows = dict[str, float](), list[dict[str, str]]()
    for kind, label, tested_network, batch in (
        ("cnn", "CNN", cnn, TEST_BATCH),
        ("spiking", f"spiking, {options.steps} steps, {options.calibrate}", network, TEST_BATCH // options.steps or 1),
    ):
        result = evaluate({kind: tested_network}, data.test.batches(chosen.split(batch)), device)
        accuracy, loss = (result[f"{kind}_test_{quantity}"] for quantity in ("accuracy", "loss"))
        tested |= {f"{kind}_accuracy": accuracy, f"{kind}_loss": loss}
        rows.append({"network": label, "accuracy, %": percent(accuracy), "loss": f"{loss:.4f}"})

    facts = {
        "network": f"{name} of {run.title}",
        "arch": arch_of(run.config, role_of(name)),
        "shape": run.input_shape(),
        "num_classes": run.num_classes(),
        "steps": options.steps,
        "calibrate": options.calibrate,
        "images": len(images),
        "test_images": count,
        **tested,
        "command": _command(options),
    }
    (folder / FACTS).unlink(missing_ok=True)  # it never describes another network
    save_tensors(folder / NETWORK, network.cpu().state_dict())
    write_json(folder / FACTS, facts)
    print(f"{run.title}: {count} {run.tested_on} images\n{text_table(rows)}\n{folder}")


def load_spiking(folder: Path) -> nn.Module:
    """Returns the network that `spike` wrote to a folder, on the CPU and in evaluation mode.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged.
    """
    facts, path = spiking_facts(folder), folder / NETWORK
    state = load_state_dict(path)
    with reading(path, f"a state_dict of a spiking {facts['arch']}", "another"):
        cnn = create_model(facts["arch"], "cnn", facts["shape"][0], facts["num_classes"])
        network = converted(cnn, facts["steps"])
        network.load_state_dict(state)
    return network


def spiking_facts(folder: Path) -> dict[str, Any]:
    """Returns what `spike` wrote to a folder about its network: arch, shape, steps, accuracies as shares and so on.

    Raises:
        FileNotFoundError: not such a folder.
        ValueError: the file is damaged.
    """
    path = folder / FACTS
    if not path.is_file():
        raise FileNotFoundError(f"{folder}: expected a folder that `spike` wrote, got one without {FACTS}")
    with reading(path, f"a {FACTS} as this program writes it"):
        facts: dict[str, Any] = json.loads(path.read_text())
        for name in (
            "network",
            "arch",
            "shape",
            "num_classes",
            "steps",
            "calibrate",
            "spiking_accuracy",
            "test_images",
        ):
            facts[name]
        CALIBRATIONS[facts["calibrate"]]
    return facts


def _command(options: Options) -> str:
    words = ["python", "-m", "adderops.distill", "spike", str(options.folder)]
    for f in fields(options)[1:]:
        if (value := getattr(options, f.name)) is not None:
            words += [flag(f.name), str(value)]
    return shlex.join(words)
