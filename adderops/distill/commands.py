"""`python -m adderops.distill COMMAND`: what is done with runs: eval, compare, export, quantize, report."""

import argparse
import io
import json
import math
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adderops.atomic import write_atomically
from adderops.batchnorm import reestimate_batchnorm
from adderops.distill.build import device_type
from adderops.distill.checkpoint import write_csv, write_json
from adderops.distill.config import Config, Options
from adderops.distill.data import calibration_batches, load_test_images
from adderops.distill.data.facts import differences
from adderops.distill.ending import ending
from adderops.distill.evaluate import evaluate
from adderops.distill.options import add_arguments, check, flag, kind_of, option
from adderops.distill.paired import compare_groups, group_rows
from adderops.distill.quantize import quantize, students
from adderops.distill.run_folder import RunFolder, compared_runs, differing_options, saved_networks
from adderops.distill.text_table import text_table
from adderops.export import export_onnx, export_program
from adderops.models import classifier
from adderops.quant.scheme import ENDS, METHODS


def _of_config(name: str, help: str) -> Any:
    """An option that changes one of the run's configuration, with the same range."""
    of_run = Options.__dataclass_fields__[name]
    return option(None, **{**of_run.metadata, "type": kind_of(of_run), "help": help})


class _Options:
    """Of a command; checked as `Config` checks its own."""

    def __post_init__(self) -> None:
        check(self, label=lambda name: name if name in ("folder", "folders") else flag(name))


def _folder(help: str = "run folder", **metadata: Any) -> Any:
    return option(help=help, type=Path, metavar="RUN", positional=True, **metadata)


@dataclass(frozen=True)
class EvalOptions(_Options):
    folder: Path = _folder()
    weights: str | None = option(
        None, "network to test (default: all that the run has)", choices=saved_networks, type=str
    )
    data: str | None = option(
        None,
        "test on the test images of this set, sized and normalized as the run's are, classes found by name "
        "(default: the run's test set)",
        type=str,
    )
    reestimate_batchnorm: int | None = option(
        None,
        "before, take the statistics of every BatchNorm again from N training images: the averages that training kept "
        "lag behind weights which still move when it ends (default: as saved)",
        type=int,
        least=2,
        metavar="N",
    )
    root: str | None = _of_config("root", "folder in which mnist, cifar10 and so on lie (default: as in training)")
    device: str | None = _of_config("device", "where to test (default: as in training)")
    threads: int | None = _of_config("threads", "CPU threads (default: as in training)")
    workers: int | None = _of_config("workers", "processes that load images (default: as in training)")


@dataclass(frozen=True)
class CompareOptions(_Options):
    folders: tuple[Path, ...] = _folder("run folders, or those of --method compare", nargs="+")
    plot: Path | None = option(None, "draw the curves of the test accuracy", type=Path, metavar="FILE.png")
    csv: Path | None = option(None, "write the table of runs, with all options", type=Path, metavar="FILE")


@dataclass(frozen=True)
class ExportOptions(_Options):
    folder: Path = _folder()
    format: str = option(help="of the file", choices=("state_dict", "torch", "onnx"), type=str)
    weights: str | None = option(
        None, "network to export (default: student; of cnn: teacher)", choices=saved_networks, type=str
    )
    output: Path | None = option(
        None, "file in an existing folder (default: RUN/export/WEIGHTS.pt, .pt2 or .onnx)", type=Path, metavar="FILE"
    )


@dataclass(frozen=True)
class QuantizeOptions(_Options):
    folder: Path = _folder("run folder with a student")
    weights: str = option("student", "network to take", choices=students)
    bits: int | None = option(
        None,
        "of inputs and weights of the adder layers (default: 8, or the run's --bits)",
        type=int,
        least=2,
        most=8,
    )
    method: str = option("redistribution", "how grids are chosen", choices=METHODS)
    filter_groups: int = option(1, "grids per layer", least=1)
    ends: str = option("float", "first convolution and classifier", choices=ENDS)
    images: int = option(2000, "training images to calibrate by", least=1)
    reestimate: bool = option(True, "take the BatchNorm statistics again behind the rounded layers, by the same images")
    batch_size: int = option(64, "images per batch of the timing", least=1, most=2**16)
    threads: int | None = _of_config("threads", "CPU threads (default: as in training)")
    output: Path | None = option(
        None, "file in an existing folder (default: RUN/export/int8.safetensors)", type=Path, metavar="FILE.safetensors"
    )


@dataclass(frozen=True)
class ReportOptions(_Options):
    folder: Path = _folder("run folder, of a finished run or not")
    output: Path | None = option(None, "folder to write to (default: RUN/report)", type=Path, metavar="FOLDER")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m adderops.distill", description="What is done with run folders.", allow_abbrev=False
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, (options, run, help) in COMMANDS.items():
        command = commands.add_parser(
            name,
            help=help,
            description=help[0].upper() + help[1:] + ".",
            argument_default=argparse.SUPPRESS,
            allow_abbrev=False,
        )
        command.set_defaults(command=run, options=options)
        add_arguments(command, options)
    return parser


def run(arguments: Sequence[str]) -> int:
    """Runs a command line that begins with one of `COMMANDS`; returns the exit status of the process."""
    given = vars(_parser().parse_args(arguments))
    command, options = given.pop("command"), given.pop("options")
    with ending(f"adderops.distill {arguments[0]}") as end:
        command(options(**given))
    return end.status


def output_file(output: Path | None, default: Path) -> Path:
    """Returns the file to write, known to be in a folder before minutes of work are lost for want of it.

    Raises:
        FileNotFoundError: the folder of a file that the user names.
    """
    if output is None:
        default.parent.mkdir(exist_ok=True)
        return default
    if not output.parent.is_dir():
        raise FileNotFoundError(f"--output: expected a file in an existing folder, got {output}")
    return output


# --- eval ---


def _evaluate(options: EvalOptions) -> None:
    run = RunFolder.load(options.folder)
    given = {name: getattr(options, name) for name in ("root", "device", "threads", "workers")}
    config = run.config.changed(**{name: value for name, value in given.items() if value is not None})
    run = replace(run, config=config)
    networks = {name: run.network(name) for name in ([options.weights] if options.weights else run.networks)}
    device = torch.device(device_type(config.device))
    torch.set_num_threads(config.threads)
    count, kind = options.reestimate_batchnorm, f"{run.tested_on} images"
    own = run.load_data() if count or (options.data is None and config.validation) else None
    if options.data is not None:
        images, _ = load_test_images(options.data, run.data, Path(config.root))
        kind = f"test images of {options.data}"
    elif config.validation:
        images = own.test
    else:
        images, sums = load_test_images(config.data, run.data, Path(config.root), own=True)
        other = differences({"checksums": run.data["checksums"]}, {"checksums": sums})
        kind += f" ({', '.join(other)} than when the run was trained)" * bool(other)
    print(f"{run.title}: {len(images)} {kind}")
    for name, network in networks.items():
        network.to(device, memory_format=torch.channels_last if config.channels_last else torch.preserve_format)
        if count:
            reestimate_batchnorm(network, calibration_batches(own.train, count, config.workers), device)
        begin = time.perf_counter()
        tested = evaluate(
            {name: network},
            images,
            device,
            amp=config.amp,
            channels_last=config.channels_last,
            workers=config.workers,
        )
        speed = len(images) / (time.perf_counter() - begin)
        accuracy, loss = tested[f"{name}_test_accuracy"], tested[f"{name}_test_loss"]
        error = (accuracy * (1 - accuracy) / len(images)) ** 0.5
        line = f"{name:<12}{100 * accuracy:6.2f} % +- {100 * error:.2f}   loss {loss:.4f}   {speed:.0f} images/s"
        tests = [value for value in run.curve(f"{name.removesuffix('_best')}_test_accuracy") if not math.isnan(value)]
        trained = max(tests) if name.endswith("_best") else tests[-1]
        if count:
            line += f"   (BatchNorm statistics of {min(count, len(own.train))} training images)"
        if options.data is None and abs(trained - accuracy) > 0.5 / len(images):  # another machine rounds otherwise
            line += f"   (when the training ended: {100 * trained:.2f} %)"
        print(line, flush=True)


# --- compare ---


def _compare(options: CompareOptions) -> None:
    folders = [folder for given in options.folders for folder in _run_folders(given)]
    twice = sorted(str(f) for f, n in Counter(folder.resolve() for folder in folders).items() if n > 1)
    if twice:
        raise ValueError(f"RUN: expected each run once, got {', '.join(twice)} twice")
    runs = [RunFolder.load(folder) for folder in folders]
    rows = [row for run in runs for row in run.results()]
    by = ["method", *(name for name in differing_options(rows) if name not in ("method", "seed")), "network"]
    seeds = ["seed"] if len({row["seed"] for row in rows}) > 1 else []
    common = [str(rows[0][name]) for name in ("data", "arch") if name not in by]
    print(", ".join([*common, f"{' or '.join(sorted({run.tested_on for run in runs}))} accuracy in %"]) + "\n")
    table = [
        {"run": row["run"]}
        | {name: _shown(row[name]) for name in [*by, *seeds] if name != "epochs"}
        | {
            "epochs": f"{row['epochs_done']}" + ("" if row["finished"] else f"/{row['epochs']}"),
            "last": _percent(row["test_accuracy"]),
            "best": _percent(row["best_test_accuracy"]),
            "best_epoch": str(row["best_epoch"]),
            "training": _percent(row["train_accuracy"]),
            "images/s": f"{row['images_per_second']:.0f}",
            "hours": f"{row['hours']:.3g}",
        }
        for row in rows
    ]
    print(text_table(table))
    if options.csv:
        write_csv(options.csv, rows)
    if options.plot:
        from adderops.distill.figures import draw_comparison, png

        write_atomically(options.plot, png(draw_comparison(runs, by)))
    finished = [row for row in rows if row["finished"]]
    if all(len(group) == 1 for group in group_rows(finished, by).values()):
        return
    print(
        "\nfinished runs, last epoch: mean and deviation over the seeds; mean difference to the first line at\n"
        "equal seeds, with its 95 % confidence interval (Student t)\n"
    )
    table = [
        {name: _shown(group[name]) for name in by}
        | {
            "n": str(group["n"]),
            "mean": _percent(group["mean"]),
            "deviation": _percent(group["deviation"]),
            "pairs": str(group["pairs"]) if i else "-",
            "difference": _percent(group["difference"], signed=True),
            "interval": "-" if group["low"] is None else f"{100 * group['low']:+.2f} to {100 * group['high']:+.2f}",
        }
        for i, group in enumerate(compare_groups(finished, by, "test_accuracy"))
    ]
    print(text_table(table))


def _run_folders(folder: Path) -> list[Path]:
    """Returns the folder, or the run folders in it that --method compare has made so far."""
    config = Config.load(folder / "config.json") if (folder / "config.json").is_file() else None
    if config is None or config.method != "compare":
        return [folder]
    found = [run for run in compared_runs(config, folder) if (run / "log.csv").is_file()]
    if not found:
        raise FileNotFoundError(f"{folder}: expected run folders pkkd and plain, got none with an epoch done")
    return found


def _shown(value: Any) -> str:
    return "-" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _percent(share: float | None, signed: bool = False) -> str:
    return "-" if share is None else f"{100 * share:{'+' if signed else ''}.2f}"


# --- export ---


def _export(options: ExportOptions) -> None:
    run = RunFolder.load(options.folder)
    name = options.weights or run.networks[0]
    network, (mean, std) = run.network(name), run.preprocessing()
    shape, classes = run.input_shape(network), len(classifier(network)[1].weight)
    facts = {
        "input": f"float32 (N, {', '.join(map(str, shape))}): (pixel / 255 - mean) / std, by channel",
        "mean": json.dumps(mean),
        "std": json.dumps(std),
        "output": f"logits (N, {classes})",
        "network": f"{name} of {run.title}",
    }
    if names := run.class_names:
        facts["classes"] = json.dumps(names)
    suffix, content_of = EXPORTED[options.format]
    output = output_file(options.output, run.path / "export" / f"{name}{suffix}")
    try:
        content = content_of(network, torch.zeros(1, *shape), facts)
    except RuntimeError as error:  # of torch.export: in networks of other libraries
        raise ValueError(f"--format {options.format}: torch cannot export {run.config.arch}: {error}") from error
    write_atomically(output, content)
    if options.format == "state_dict":  # which has no room for them
        write_json(output.with_suffix(".json"), facts)
    print("\n".join([str(output), *(f"{key:<10}{_shortened(value)}" for key, value in facts.items())]))


def _shortened(text: str) -> str:
    return text if len(text) <= 200 else text[:200] + " ..."


def _state_dict(network: nn.Module, example: Tensor, facts: dict[str, str]) -> bytes:
    buffer = io.BytesIO()
    torch.save(network.state_dict(), buffer)
    return buffer.getvalue()


def _program(network: nn.Module, example: Tensor, facts: dict[str, str]) -> bytes:
    buffer = io.BytesIO()
    torch.export.save(export_program(network, example), buffer, extra_files={"preprocessing.json": json.dumps(facts)})
    return buffer.getvalue()


def _onnx(network: nn.Module, example: Tensor, facts: dict[str, str]) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.onnx"
        export_onnx(network, example, path)
        import onnx  # is there if export_onnx has passed

        model = onnx.load(path)
    onnx.helper.set_model_props(model, facts)
    return model.SerializeToString()


# By --format: suffix, and what makes the content of the file from network, example and facts to store.
EXPORTED = {"state_dict": (".pt", _state_dict), "torch": (".pt2", _program), "onnx": (".onnx", _onnx)}


# --- report ---


def _report(options: ReportOptions) -> None:
    from adderops.distill.report import write_report

    run = RunFolder.load(options.folder)
    print(write_report(run, options.output or run.path / "report"))


def _quantize(options: QuantizeOptions) -> None:
    run = RunFolder.load(options.folder)
    quantize(run, options, output_file(options.output, run.path / "export" / "int8.safetensors"))


# By name: options, what runs it, help.
COMMANDS = {
    "eval": (EvalOptions, _evaluate, "test the saved networks of a finished run again"),
    "compare": (CompareOptions, _compare, "table, statistics over seeds, and curves of several runs, finished or not"),
    "export": (ExportOptions, _export, "write a network of a finished run for use elsewhere"),
    "quantize": (
        QuantizeOptions,
        _quantize,
        "the student of a finished run as an int8 network, tested and timed",
    ),
    "report": (ReportOptions, _report, "write report.html and its figures: curves, distillation, weights, operations"),
}
