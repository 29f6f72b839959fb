"""`export RUN`: writes a network of a finished run as a state_dict, a torch.export program, an ONNX or a NIR file.

Each file comes with what its user must know: preprocessing, input shape, classes.
"""

import io
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from adderops.atomic import write_atomically
from adderops.distill.checkpoint import write_json
from adderops.distill.options import option
from adderops.distill.runs.command import CommandOptions, output_file, run_folder, weights_option
from adderops.distill.runs.folder import RunFolder
from adderops.distill.runs.spike import load_spiking, spiking_facts
from adderops.export import export_onnx, export_program
from adderops.spiking import sites, to_nir

LONGEST_SHOWN = 200  # characters


def _state_dict(network: nn.Module, example: Tensor, facts: dict[str, str]) -> bytes:
    buffer = io.BytesIO()
    torch.save(network.state_dict(), buffer)
    return buffer.getvalue()


def _program(network: nn.Module, example: Tensor, facts: dict[str, str]) -> bytes:
    buffer = io.BytesIO()
    torch.export.save(export_program(network, example), buffer, extra_files={"preprocessing.json": json.dumps(facts)})
    return buffer.getvalue()


def _onnx(network: nn.Module, example: Tensor, facts: dict[str, str]) -> bytes:
    if sites(network):
        raise ValueError("--format onnx: ONNX has no spiking neurons: expected torch, state_dict or nir")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.onnx"
        export_onnx(network, example, path)
        import onnx  # installed, or export_onnx would have refused

        model = onnx.load(path)
    onnx.helper.set_model_props(model, facts)
    return model.SerializeToString()


def _nir(network: nn.Module, example: Tensor, facts: dict[str, str]) -> bytes:
    if not sites(network):
        raise ValueError(
            f"--format nir: expected a spiking network, got {facts['network']}: train one (as --method dsr does), or "
            "convert a CNN by `spike RUN` and pass its folder by --spiking"
        )
    graph = to_nir(network, example.shape[1:])
    graph.metadata |= facts
    import nir  # installed, or to_nir would have refused

    buffer = io.BytesIO()
    nir.write(buffer, graph)
    return buffer.getvalue()


# By --format: the suffix, and what makes the content of the file from a network, an example and the facts to store.
FORMATS = {
    "state_dict": (".pt", _state_dict),
    "torch": (".pt2", _program),
    "onnx": (".onnx", _onnx),
    "nir": (".nir", _nir),
}


@dataclass(frozen=True)
class Options(CommandOptions):
    folder: Path = run_folder()
    format: str = option(help="format of the file", choices=tuple(FORMATS), type=str)
    weights: str | None = weights_option(
        "network to export (default: the one that the run is about)", kinds=("adder", "cnn", "spiking")
    )
    spiking: Path | None = option(
        None, "folder that `spike RUN` wrote: export its network instead", type=Path, metavar="FOLDER"
    )
    output: Path | None = option(
        None,
        "file in an existing folder (default: RUN/export/WEIGHTS.pt, .pt2, .onnx or .nir)",
        type=Path,
        metavar="FILE",
    )


def run(options: Options) -> None:
    run = RunFolder.load(options.folder)
    if options.spiking is None:
        name = options.weights or run.networks[0]
        network = run.network(name)
    else:
        name, network = options.spiking.resolve().name, load_spiking(options.spiking)
        if options.weights or not (made_of := spiking_facts(options.spiking)["network"]).endswith(f" of {run.title}"):
            raise ValueError(
                f"--spiking: expected a network of {run.title}, without --weights, got {options.weights or made_of}"
            )
    data, shape = run.data, run.input_shape()
    facts = {
        "input": f"float32 (N, {', '.join(map(str, shape))}): (pixel / 255 - mean) / std, by channel",
        "mean": json.dumps(data["mean"]),
        "std": json.dumps(data["std"]),
        "output": f"logits (N, {run.num_classes()})",
        "network": f"{name} of {run.title}",
    }
    if run.records_data and data["classes"] is not None:  # of an older run they may have changed since the training
        facts["classes"] = json.dumps(data["classes"])
    suffix, content_of = FORMATS[options.format]
    output = output_file(options.output, run.path / "export" / f"{name}{suffix}")
    try:
        content = content_of(network, torch.zeros(1, *shape), facts)
    except RuntimeError as error:  # from torch.export, for networks of other libraries
        raise ValueError(f"--format {options.format}: torch cannot export {run.config.arch}: {error}") from error
    write_atomically(output, content)
    if options.format == "state_dict":  # has no room for the facts
        write_json(output.with_suffix(".json"), facts)
    print("\n".join([str(output), *(f"{key:<10}{_shortened(value)}" for key, value in facts.items())]))


def _shortened(text: str) -> str:
    return text if len(text) <= LONGEST_SHOWN else text[:LONGEST_SHOWN] + " ..."
