"""`python -m adderops.distill quantize RUN`: the student of a run as a network of bytes, its accuracy and speed."""

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from adderops.distill.build import load_data_of
from adderops.distill.data import calibration_batches
from adderops.distill.evaluate import evaluate
from adderops.distill.run_folder import SAVED, RunFolder
from adderops.quant import Scheme, calibrate, convert, reestimate_batchnorm, save
from adderops.quant.scheme import ENDS, METHODS

STUDENTS = tuple(name for name in SAVED if name.startswith("student"))
TIMED_SECONDS = 0.2
TIMED_ROUNDS = 7


def add_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("folder", type=Path, metavar="RUN", help="run folder with a student")
    command.add_argument("--weights", choices=STUDENTS, default="student", help="network to take")
    command.add_argument(
        "--bits", type=int, help="of inputs and weights of the adder layers, 2 to 8 (default: 8, or the run's --bits)"
    )
    command.add_argument("--method", choices=METHODS, default="redistribution", help="how grids are chosen")
    command.add_argument("--filter-groups", type=int, default=1, help="grids a layer (default: 1)")
    command.add_argument("--ends", choices=ENDS, default="float", help="first convolution and classifier")
    command.add_argument("--images", type=int, default=2000, help="training images to calibrate by (default: 2000)")
    command.add_argument(
        "--reestimate",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="take the BatchNorm statistics anew behind the rounded layers, by the same images (default: yes)",
    )
    command.add_argument("--batch-size", type=int, default=64, help="of the timing (default: 64)")
    command.add_argument("--threads", type=int, help="CPU threads (default: as in training)")
    command.add_argument("--output", type=Path, metavar="FILE.safetensors", help="default: RUN/export/int8.safetensors")


def quantize(options: argparse.Namespace) -> None:
    run = RunFolder.load(options.folder)
    student = run.network(options.weights)
    trained_bits = run.config.bits
    if trained_bits not in (None, options.bits or trained_bits):
        raise ValueError(f"--bits: expected {trained_bits}, which the run was trained with, got {options.bits}")
    scheme = Scheme(options.bits or trained_bits or 8, options.method, 0.9997, options.filter_groups, options.ends)
    if options.images < 1 or options.batch_size < 1:
        raise ValueError("--images, --batch-size: expected positive numbers")
    torch.set_num_threads(options.threads or run.config.threads)
    data, output = load_data_of(run.config), options.output or run.path / "export" / "int8.safetensors"
    batches = list(calibration_batches(data.train, options.images))

    if trained_bits is None:
        rounded = calibrate(copy.deepcopy(student), batches, scheme)
        if options.reestimate:
            reestimate_batchnorm(rounded, batches)
    else:
        rounded = student
    integer = convert(rounded.eval(), batches[0])
    mean, std = run.preprocessing()
    facts = {"network": run.title, "mean": mean, "std": std, "side": batches[0].shape[-1]}
    if getattr(run, "class_names", None) is not None:
        facts["classes"] = list(run.class_names)
    output.parent.mkdir(parents=True, exist_ok=True)
    save(integer, batches[0], output, facts)

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
