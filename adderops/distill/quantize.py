"""`python -m adderops.distill quantize RUN`: the student of a run as a network of bytes, its accuracy and speed."""

import copy
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adderops.distill.data import calibration_batches
from adderops.distill.evaluate import evaluate
from adderops.distill.run_folder import RunFolder, saved_networks
from adderops.quant import Scheme, calibrate, convert, reestimate_batchnorm, save

TIMED_SECONDS = 0.2
TIMED_ROUNDS = 7


def students() -> tuple[str, ...]:
    """Returns the names of the networks that can be quantized."""
    return tuple(name for name in saved_networks() if name.startswith("student"))


def quantize(run: RunFolder, options: Any, output: Path) -> None:
    """Writes the int8 network of a run's student and prints its accuracy and speed beside the others'.

    Args:
        run: finished, with a student.
        options: of the command: `adderops.distill.commands.QuantizeOptions`.
        output: of the file.
    """
    student = run.network(options.weights)
    trained_bits = run.config.bits
    if trained_bits not in (None, options.bits or trained_bits):
        raise ValueError(f"--bits: expected {trained_bits}, which the run was trained with, got {options.bits}")
    scheme = Scheme(options.bits or trained_bits or 8, options.method, 0.9997, options.filter_groups, options.ends)
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
    if "teacher" in run.networks:
        networks["CNN, float32"] = run.network("teacher")
    if trained_bits is None:
        networks["adder, float32"] = student
    networks[f"adder, {scheme.bits} bits"] = integer
    accuracies = {
        name: evaluate({"it": network}, data.test, torch.device("cpu"))["it_test_accuracy"]
        for name, network in networks.items()
    }
    [(images, _)] = data.test.batches([torch.arange(options.batch_size) % len(data.test)])
    speeds = images_per_second(networks, images)
    print(f"{run.title}: {len(data.test)} {run.tested_on} images; batches of {options.batch_size}")
    for name in networks:
        print(f"{name:<16}{100 * accuracies[name]:6.2f} %  {speeds[name]:8.0f} images/s")
    print(output)


@torch.inference_mode()
def images_per_second(networks: dict[str, nn.Module], images: Tensor) -> dict[str, float]:
    """Medians of rounds in which the networks take turns, channels last."""
    images = images.contiguous(memory_format=torch.channels_last)
    calls: dict[str, Callable[[], Tensor]] = {}
    for name, network in networks.items():
        network = copy.deepcopy(network).to(memory_format=torch.channels_last)
        calls[name] = lambda network=network: network(images)
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
