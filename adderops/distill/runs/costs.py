"""What the networks of finished runs cost per image: operations, energy and time, with the accuracy beside them."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from adderops.distill.data import Data
from adderops.distill.data.facts import differences
from adderops.distill.runs.folder import RunFolder
from adderops.distill.runs.onnxruntime_int8 import OnnxNetwork
from adderops.distill.runs.paired import group_rows, mean_and_deviation
from adderops.distill.runs.quantize import FILE, FILE_OF_CNN, images_per_second
from adderops.distill.runs.results import labels_of, standard_error
from adderops.distill.runs.spike import FACTS, load_spiking, spiking_facts
from adderops.distill.runs.tables import percent, text_table
from adderops.operations import Operations, count_operations, count_spiking_operations, energy
from adderops.quant import load
from adderops.spiking import sites
from adderops.spiking.calibration import CALIBRATIONS

COUNTED, TIMED_BATCH = 500, 64  # images
COSTS = """\
+-: standard deviation over the seeds, of one seed the standard error from the number of images
mult., add.: millions per image, |x - w| is two additions; those of spikes: means over {} {} images, with membranes
uJ: their energy in 45 nm circuits (Horowitz, ISSCC 2014), in float32, of int8 networks in int8
in int8: the same as if all operations were in int8, the additions of spiking networks included
images/s: on the CPU, batches of {}, for spiking networks divided by their steps if that is faster, threads: {}"""


@dataclass(frozen=True)
class Network:
    """A network that a run left.

    Attributes:
        label: what tables call it.
        accuracy: on the run's test images.
        images: number of test images, if not all.
        network: the network itself.
        trained: the network in floats whose operations and parameters it has: itself, or what it was quantized from.
        precision: of its layers; of a quantized network with `float_ends` not of the first convolution and classifier.
    """

    label: str
    accuracy: float
    network: nn.Module
    trained: nn.Module
    precision: str = "float32"
    float_ends: bool = False
    images: int | None = None

    def count(self, images: Tensor) -> dict[str, float]:
        """Returns the columns of the operations; those of a spiking network are means over the images."""
        spikes = any(site.steps for site in sites(self.trained).values())
        counted = (count_spiking_operations if spikes else count_operations)(self.trained, images)
        ends = [layer for layer in counted.layers if self.float_ends and not layer.layer.startswith("Adder")]
        inner = [layer for layer in counted.layers if layer not in ends]
        return {
            "multiplications": counted.multiplications,
            "additions": counted.additions,
            "picojoules": energy(Operations(tuple(inner)), self.precision) + energy(Operations(tuple(ends))),
            "picojoules_in_int8": energy(counted, "int8"),
            "parameters": sum(parameter.numel() for parameter in self.trained.parameters()),
        }


def networks_of(run: RunFolder) -> list[Network]:
    """Returns the networks of a finished run: those that it trained, each before what `quantize`, `spike` made of it.

    A quantized network of an older version, without its accuracy in the file, is left out.
    """
    labels = {name: label for (_, name), label in labels_of([run.config.method]).items()}  # CNNs first
    found = []
    for row in run.results():
        name, label = row["network"], labels[row["network"]]
        if run.config.spiking is not None and run.kind(name) == "spiking":
            label += f", {run.config.spiking.steps} steps"
        network = run.network(name)
        found.append((name, Network(label, row["test_accuracy"], network, network)))
    adder, cnn = (run.path / "export" / name for name in (FILE, FILE_OF_CNN))
    quantized: list[tuple[nn.Module, Mapping[str, Any], str, bool]] = []
    if adder.is_file():
        integer, known = load(adder)
        float_ends, kind = known["scheme"]["ends"] == "float", f"int{known['scheme']['bits']}"
        quantized.append((integer, known["facts"], kind + ", ends in float32" * float_ends, float_ends))
    if cnn.is_file():
        onnx = OnnxNetwork(cnn.read_bytes())
        quantized.append((onnx, onnx.facts, "int8", False))
    for network, facts, kind, float_ends in quantized:
        if "test_accuracy" in facts:
            name, accuracy = facts["weights"], float(facts["test_accuracy"])
            label = labels[name.removesuffix("_best")] + ", best" * name.endswith("_best") + f", {kind}"
            found.append((name, Network(label, accuracy, network, run.network(name), "int8", float_ends)))
    converted = [(spiking_facts(file.parent), file.parent) for file in run.path.glob(f"spiking/*/{FACTS}")]
    for facts, folder in sorted(
        converted, key=lambda one: (one[0]["steps"], list(CALIBRATIONS).index(one[0]["calibrate"]))
    ):
        network = load_spiking(folder)
        label = f"spiking, {facts['steps']} steps, {facts['calibrate']}"
        one = Network(label, facts["spiking_accuracy"], network, network, images=facts["test_images"])
        found.append((facts["network"].split()[0], one))
    return [one for _, one in sorted(found, key=lambda item: list(labels).index(item[0].removesuffix("_best")))]


def why_not(runs: Sequence[RunFolder]) -> str:
    """Returns why the networks of some runs have no common table of costs; '' if they have one."""
    for run in runs:
        if not (run.finished and run.records_data):
            lacks = "data.json" if run.finished else "summary.json"
            return f"{run.path}: expected a finished run, got one without a {lacks}"
        if found := differences(runs[0].data, run.data):
            return f"{run.path}: expected the images of {runs[0].path}, got others: {'; '.join(found)}"
    return ""


def cost_rows(runs: Sequence[RunFolder], data: Data, by: Sequence[str]) -> tuple[list[dict[str, Any]], list[str]]:
    """Returns one row per network, and a note on each that could not be counted.

    Networks of runs that differ in the seed alone share a row: their accuracy is a mean with its standard deviation,
    their operations are means, and the first of them is timed.

    Args:
        runs: finished, on the same images.
        data: these images.
        by: options in which runs differ, apart from the seed; they follow the label where it is not enough.
    """
    images, timed = (
        torch.cat([x for x, _ in data.test.batches([torch.arange(count) % len(data.test)])])
        for count in (min(COUNTED, len(data.test)), TIMED_BATCH)
    )

    def label(one: Network) -> str:
        return one.label if one.images in (None, len(data.test)) else f"{one.label}, {one.images} images"

    found = [run.config.flat() | {"network": label(one), "of": one} for run in runs for one in networks_of(run)]
    groups = group_rows(found, ["network", *by])
    names = {key: _name(key, list(groups), by) for key in groups}
    networks = {names[key]: group[0]["of"].network for key, group in groups.items()}
    speeds = images_per_second(networks, {name: faster_batch(network, timed) for name, network in networks.items()})
    rows, notes = [], []
    for key, group in groups.items():
        accuracy, deviation = mean_and_deviation([row["of"].accuracy for row in group])
        tested = group[0]["of"].images or len(data.test)
        error = standard_error({"accuracy": accuracy, "images": tested}) if deviation is None else deviation
        row = {"network": names[key], "seeds": len(group), "accuracy": accuracy, "uncertainty": error}
        rows.append(row | {"images_per_second": speeds[names[key]]})
        try:
            counts = [one["of"].count(images) for one in group]
        except (ValueError, RuntimeError) as reason:  # a network of others
            notes.append(f"{names[key]}: not counted: {reason}")
            continue
        rows[-1] |= {column: sum(count[column] for count in counts) / len(counts) for column in counts[0]}
    return rows, notes


@torch.inference_mode()
def faster_batch(network: nn.Module, images: Tensor) -> Tensor:
    """Returns the images, or for a spiking network one per T of them if that takes less time per image.

    The layers of a spiking network see T inputs per image, more than caches hold in a batch that suits a CNN.
    """

    def seconds(batch: Tensor) -> float:
        network(batch)
        begin = time.perf_counter()
        network(batch)
        return (time.perf_counter() - begin) / len(batch)

    steps = max((site.steps or 1 for site in sites(network).values()), default=1)
    fewer = images[: max(1, len(images) // steps)]
    return fewer if steps > 1 and seconds(fewer) < seconds(images) else images


def _name(key: tuple[Any, ...], keys: Sequence[tuple[Any, ...]], by: Sequence[str]) -> str:
    """Returns a label, with the options that tell it from the same label of other runs: one, if one can."""
    others = [other[1:] for other in keys if other[0] == key[0] and other != key]
    differing = [i for i in range(len(by)) if any(other[i] != key[1:][i] for other in others)]
    alone = [i for i in differing if key[1:][i] is not None and all(other[i] != key[1:][i] for other in others)]
    told = [f"{by[i]} {key[1:][i]}" for i in alone[:1] or differing if key[1:][i] is not None]
    return ", ".join([key[0], *told])


def costs_table(rows: Sequence[dict[str, Any]], notes: Sequence[str], data: Data, tested_on: str) -> str:
    """Returns the table of `cost_rows` with its notes."""
    table = [
        {
            "network": row["network"],
            "accuracy, %": percent(row["accuracy"], row["uncertainty"]),
            "mult.": _shown(row, "multiplications", 1e6, ".3g"),
            "add.": _shown(row, "additions", 1e6, ".3g"),
            "uJ": _shown(row, "picojoules", 1e6, ".3g"),
            "in int8": _shown(row, "picojoules_in_int8", 1e6, ".3g"),
            "images/s": f"{row['images_per_second']:.0f}",
            "parameters": _shown(row, "parameters", 1, ",.0f"),
        }
        for row in rows
    ]
    caption = COSTS.format(min(COUNTED, len(data.test)), tested_on, TIMED_BATCH, torch.get_num_threads())
    return "\n\n".join([text_table(table), "\n".join([*notes, caption])])


def _shown(row: dict[str, Any], column: str, unit: float, form: str) -> str:
    return format(row[column] / unit, form) if column in row else "-"
