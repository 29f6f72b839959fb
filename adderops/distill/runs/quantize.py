"""`quantize RUN`: converts a network of a finished run to int8 and prints its accuracy and speed."""

import copy
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from adderops.atomic import write_atomically
from adderops.distill.data import Data, calibration_batches
from adderops.distill.evaluate import evaluate
from adderops.distill.options import flag, option
from adderops.distill.runs.command import CommandOptions, of_training, output_file, run_folder, weights_option
from adderops.distill.runs.firmware import CLASSES, IMAGES, Interpreted, check_files, pixel_values, write_test_images
from adderops.distill.runs.folder import RunFolder
from adderops.distill.runs.onnxruntime_int8 import OnnxNetwork, quantize_cnn, with_facts
from adderops.distill.runs.tables import percent, text_table
from adderops.edge import code_size, export_c, program_of
from adderops.edge.cost import TARGETS, network_cycles
from adderops.edge.export import EPILOGUES, source_of
from adderops.quant import Scheme, calibrate, convert, reestimate_batchnorm, save
from adderops.quant.calibration import calibrate_ends
from adderops.quant.scheme import ENDS, METHODS

FILE, FILE_OF_CNN = "int8.safetensors", "int8.onnx"  # in RUN/export
OF_ADDERS = ("bits", "method", "filter_groups", "ends", "reestimate", "c")
TIMED_SECONDS = 0.2
TIMED_ROUNDS = 7


@dataclass(frozen=True)
class Options(CommandOptions):
    folder: Path = run_folder("run folder with an adder network or a CNN")
    weights: str | None = weights_option("network to convert (default: the run's adder network, or else its CNN)")
    bits: int | None = option(
        None,
        "bits of the adder layers' inputs and weights (default: 8, or the run's --bits)",
        type=int,
        least=2,
        most=8,
    )
    method: str = option("redistribution", "how grids are chosen", choices=METHODS)
    filter_groups: int = option(1, "grids per layer", least=1)
    ends: str | None = option(
        None, "first convolution and classifier (default: float; with --c int8)", choices=ENDS, type=str
    )
    images: int = option(2000, "training images for the calibration", least=1)
    reestimate: bool = option(True, "re-estimate the BatchNorm statistics after the rounded layers, on the same images")
    batch_size: int = option(64, "images per batch of the timing", least=1, most=2**16)
    threads: int | None = of_training("threads", "CPU threads (default: as in training)")
    output: Path | None = option(
        None,
        f"file in an existing folder (default: RUN/export/{FILE}, for a CNN {FILE_OF_CNN})",
        type=Path,
        metavar="FILE",
    )
    c: Path | None = option(
        None,
        "also write the int8 network as C for a microcontroller, PATH.h and PATH.c in an existing folder, and print "
        "what it takes there",
        group="C",
        type=Path,
        metavar="PATH",
    )
    main: bool | None = option(
        None,
        "beside them main.c, which prints the classes of images, a CMakeLists.txt, and test images with their classes: "
        "images.bin, classes.txt",
        group="C",
        type=bool,
    )
    epilogue: str | None = option(
        None,
        "arithmetic after each sum: float32, or integer for processors without floats (default: float32)",
        group="C",
        choices=EPILOGUES,
        type=str,
    )
    target: str | None = option(
        None, "processor of the modelled time (default: cortex-m4)", group="C", choices=TARGETS, type=str
    )
    mhz: float | None = option(None, "its clock (default: 120)", group="C", type=float, least=1, most=10_000)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.c is None:
            for name in ("main", "epilogue", "target", "mhz"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{flag(name)}: expected --c with it, got none, so it has no effect")
        elif self.ends == "float":
            raise ValueError("--ends: expected int8 with --c, whose code has no convolution of floats, got float")


def run(options: Options) -> None:
    run = RunFolder.load(options.folder)
    of_kind = {kind: [name for name in run.networks if run.kind(name) == kind] for kind in ("adder", "cnn")}
    name = options.weights or next((name for names in of_kind.values() for name in names), "student")
    network = run.network(name)
    if run.kind(name) not in of_kind:
        raise ValueError(f"RUN: expected one with an adder network or a CNN, got the {run.kind(name)} {name}")
    torch.set_num_threads(options.threads or run.config.threads)
    if run.kind(name) == "cnn":
        _quantize_cnn(options, run, name, network)
        return
    output = output_file(options.output, run.path / "export" / FILE)
    if options.c is not None:
        check_files(options.c, bool(options.main))
    student, trained_bits = network, run.config.bits
    if trained_bits not in (None, options.bits or trained_bits):
        raise ValueError(f"--bits: expected {trained_bits}, which the run was trained with, got {options.bits}")
    bits = options.bits or trained_bits or 8
    ends = options.ends or ("float" if options.c is None else "int8")
    scheme = Scheme(bits, options.method, filter_groups=options.filter_groups, ends=ends)
    data = run.load_data()
    batches = list(calibration_batches(data.train, options.images))

    if trained_bits is None:
        rounded = calibrate(copy.deepcopy(student), batches, scheme)
        if options.reestimate:
            reestimate_batchnorm(rounded, batches)
    else:
        rounded = student if ends == "float" else calibrate_ends(student, batches)
    integer = convert(rounded.eval(), batches[0])
    written = "" if options.c is None else _write_c(options, run, integer, batches[0], data)

    networks: dict[str, nn.Module] = {}
    if of_kind["cnn"]:
        networks["CNN, float32"] = run.network(of_kind["cnn"][0])
    if trained_bits is None:
        networks["adder, float32"] = student
    networks[f"adder, {bits} bits"] = integer
    untimed: dict[str, nn.Module] = {}
    if options.c is not None and options.epilogue == "integer":  # another function; float32 has the bits of `integer`
        program = program_of(integer, batches[0], options.epilogue)
        untimed[f"adder, {bits} bits, fixed point"] = Interpreted(program)
    accuracies = _test(options, run, data, networks, untimed)
    facts = {key: data.facts()[key] for key in ("classes", "channels", "side", "mean", "std")}
    facts |= {"network": run.title, "weights": name, "test_accuracy": accuracies[f"adder, {bits} bits"]}
    save(integer, batches[0], output, facts)
    print(output)
    if written:
        print(f"\n{written}")


def _quantize_cnn(options: Options, run: RunFolder, name: str, cnn: nn.Module) -> None:
    for f in fields(options):
        if f.name in OF_ADDERS and (value := getattr(options, f.name)) != f.default:
            raise ValueError(f"{flag(f.name)}: expected none for a CNN, which onnxruntime quantizes, got {value}")
    output, data = output_file(options.output, run.path / "export" / FILE_OF_CNN), run.load_data()
    content = quantize_cnn(cnn, list(calibration_batches(data.train, options.images)))
    networks = {"CNN, float32": cnn, "CNN, int8": OnnxNetwork(content)}
    accuracies = _test(options, run, data, networks, {})
    facts = {"network": run.title, "weights": name, "test_accuracy": str(accuracies["CNN, int8"])}
    write_atomically(output, with_facts(content, facts))
    print(output)


def _test(
    options: Options, run: RunFolder, data: Data, networks: dict[str, nn.Module], untimed: dict[str, nn.Module]
) -> dict[str, float]:
    """Prints a table of test accuracies, and of the speeds of those to be timed; returns the accuracies."""
    [(images, _)] = data.test.batches([torch.arange(options.batch_size) % len(data.test)])
    timed = images_per_second(networks, dict.fromkeys(networks, images))
    speeds = {label: f"{speed:.0f}" for label, speed in timed.items()}
    accuracies, rows = {}, []
    for label, network in (networks | untimed).items():
        accuracies[label] = evaluate({"it": network}, data.test, torch.device("cpu"))["it_test_accuracy"]
        cells = {"accuracy, %": percent(accuracies[label]), "images/s": speeds.get(label, "-")}
        rows.append({"network": label, **cells})
    print(f"{run.title}: {len(data.test)} {run.tested_on} images; batches of {options.batch_size}\n{text_table(rows)}")
    return accuracies


def _write_c(options: Options, run: RunFolder, integer: nn.Module, example: Tensor, data: Data) -> str:
    """Writes the C files; returns what they take, and how to try them."""
    assert options.c is not None
    folder, name, main = options.c.parent, options.c.name, bool(options.main)
    epilogue, target, mhz = options.epilogue or "float32", options.target or TARGETS[0], options.mhz or 120
    program = program_of(integer, example, epilogue)
    report = export_c(
        integer, example, folder, name, epilogue=epilogue, pixels=pixel_values(data.test), main=main, cmake=main
    )
    try:
        cycles = network_cycles(source_of(program), target)
        time = f"{cycles / 1e6:.2f} M cycles, {cycles / mhz / 1e3:.2f} ms on a {target} at {mhz:g} MHz"
        time += ": modelled, no board has confirmed it"
    except ValueError as error:
        time = f"not modelled ({error})"
    try:
        sizes = code_size(f"{options.c}.c", target)
        kinds = ", ".join(f"{kind} {size}" for kind, size in sizes.items())
        size = f"{sum(sizes.values())} bytes on a {target} (arm-none-eabi-gcc -O2): {kinds}"
    except FileNotFoundError as error:
        size = f"not measured ({error})"
    lines = [f"{report}\ncode: {size}\ntime: {time}", "", *report.files]
    if main:
        count = write_test_images(program, data.test, folder)
        lines += [
            f"{folder / IMAGES}: {count} {run.tested_on} images",
            f"{folder / CLASSES}: what main.c prints for them",
        ]
    return "\n".join(lines)


@torch.inference_mode()
def images_per_second(networks: Mapping[str, nn.Module], images: Mapping[str, Tensor]) -> dict[str, float]:
    """Returns the median speed of each network on a batch of its own, over rounds in which the networks take turns.

    Networks and images are channels last.
    """
    batches = {name: batch.contiguous(memory_format=torch.channels_last) for name, batch in images.items()}
    copies = {name: copy.deepcopy(network) for name, network in networks.items()}
    calls = {name: partial(own.to(memory_format=torch.channels_last), batches[name]) for name, own in copies.items()}
    rates: dict[str, list[float]] = {name: [] for name in networks}
    for _ in range(TIMED_ROUNDS):
        for name, call in calls.items():
            call()
            begin, count = time.perf_counter(), 0
            while time.perf_counter() < begin + TIMED_SECONDS:
                call()
                count += 1
            rates[name].append(count * len(batches[name]) / (time.perf_counter() - begin))
    return {name: statistics.median(values) for name, values in rates.items()}
