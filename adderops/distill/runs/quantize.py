"""`quantize RUN`: converts the student of a finished run to an int8 network and prints its accuracy and speed."""

import copy
import statistics
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from adderops.distill.data import calibration_batches
from adderops.distill.evaluate import evaluate
from adderops.distill.options import option
from adderops.distill.runs.command import CommandOptions, of_training, output_file, run_folder, weights_option
from adderops.distill.runs.folder import RunFolder
from adderops.distill.runs.tables import percent, text_table
from adderops.quant import Scheme, calibrate, convert, reestimate_batchnorm, save
from adderops.quant.scheme import ENDS, METHODS

TIMED_SECONDS = 0.2
TIMED_ROUNDS = 7


@dataclass(frozen=True)
class Options(CommandOptions):
    folder: Path = run_folder("run folder with an adder network")
    weights: str | None = weights_option("network to convert (default: the run's adder network)", kinds=("adder",))
    bits: int | None = option(
        None,
        "bits of the adder layers' inputs and weights (default: 8, or the run's --bits)",
        type=int,
        least=2,
        most=8,
    )
    method: str = option("redistribution", "how grids are chosen", choices=METHODS)
    filter_groups: int = option(1, "grids per layer", least=1)
    ends: str = option("float", "first convolution and classifier", choices=ENDS)
    images: int = option(2000, "training images for the calibration", least=1)
    reestimate: bool = option(True, "re-estimate the BatchNorm statistics after the rounded layers, on the same images")
    batch_size: int = option(64, "images per batch of the timing", least=1, most=2**16)
    threads: int | None = of_training("threads", "CPU threads (default: as in training)")
    output: Path | None = option(
        None, "file in an existing folder (default: RUN/export/int8.safetensors)", type=Path, metavar="FILE.safetensors"
    )


def run(options: Options) -> None:
    run = RunFolder.load(options.folder)
    output = output_file(options.output, run.path / "export" / "int8.safetensors")
    adders = [name for name in run.networks if run.kind(name) == "adder"]
    student, trained_bits = run.network(options.weights or next(iter(adders), "student")), run.config.bits
    if trained_bits not in (None, options.bits or trained_bits):
        raise ValueError(f"--bits: expected {trained_bits}, which the run was trained with, got {options.bits}")
    bits = options.bits or trained_bits or 8
    scheme = Scheme(bits, options.method, filter_groups=options.filter_groups, ends=options.ends)
    torch.set_num_threads(options.threads or run.config.threads)
    data = run.load_data()
    batches = list(calibration_batches(data.train, options.images))

    if trained_bits is None:
        rounded = calibrate(copy.deepcopy(student), batches, scheme)
        if options.reestimate:
            reestimate_batchnorm(rounded, batches)
    else:
        rounded = student
    integer = convert(rounded.eval(), batches[0])
    facts = {name: data.facts()[name] for name in ("classes", "channels", "side", "mean", "std")}
    save(integer, batches[0], output, {"network": run.title, **facts})

    networks: dict[str, nn.Module] = {}
    if cnns := [name for name in run.networks if run.kind(name) == "cnn"]:
        networks["CNN, float32"] = run.network(cnns[0])
    if trained_bits is None:
        networks["adder, float32"] = student
    networks[f"adder, {bits} bits"] = integer
    [(images, _)] = data.test.batches([torch.arange(options.batch_size) % len(data.test)])
    speeds = images_per_second(networks, images)
    rows = []
    for label, network in networks.items():
        accuracy = evaluate({"it": network}, data.test, torch.device("cpu"))["it_test_accuracy"]
        rows.append({"network": label, "accuracy, %": percent(accuracy), "images/s": f"{speeds[label]:.0f}"})
    print(f"{run.title}: {len(data.test)} {run.tested_on} images; batches of {options.batch_size}")
    print(f"{text_table(rows)}\n{output}")


@torch.inference_mode()
def images_per_second(networks: dict[str, nn.Module], images: Tensor) -> dict[str, float]:
    """Returns the median speed of each network, channels last, over rounds in which the networks take turns."""
    images = images.contiguous(memory_format=torch.channels_last)
    copies = {name: copy.deepcopy(network) for name, network in networks.items()}
    calls = {name: partial(own.to(memory_format=torch.channels_last), images) for name, own in copies.items()}
    rates: dict[str, list[float]] = {name: [] for name in networks}
    for _ in range(TIMED_ROUNDS):
        for name, call in calls.items():
            call()
            begin, count = time.perf_counter(), 0
            while time.perf_counter() < begin + TIMED_SECONDS:
                call()
                count += 1
            rates[name].append(count * len(images) / (time.perf_counter() - begin))
    return {name: statistics.median(values) for name, values in rates.items()}
