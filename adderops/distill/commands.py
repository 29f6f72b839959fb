"""`python -m adderops.distill COMMAND`: what is done with runs: eval, compare, export, quantize, report."""

import argparse
import io
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from adderops.distill.build import device_type, load_data_of
from adderops.distill.checkpoint import write_csv
from adderops.distill.config import DEVICES, Config
from adderops.distill.data import ImageSet, calibration_batches
from adderops.distill.evaluate import evaluate
from adderops.distill.paired import compare_groups, group_rows
from adderops.distill.quantize import add_options, quantize
from adderops.distill.run_folder import NETWORKS, RunFolder, compared_runs, differing_options
from adderops.distill.text_table import text_table
from adderops.export import export_onnx, export_program
from adderops.files import write_atomically
from adderops.models import classifier

COMMANDS = ("eval", "compare", "export", "quantize", "report")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m adderops.distill", description="What is done with run folders.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, run, help: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=help, description=help[0].upper() + help[1:] + ".")
        command.set_defaults(run=run)
        return command

    command = add("eval", _evaluate, "test the saved networks of a finished run again")
    command.add_argument("folder", type=Path, metavar="RUN", help="run folder")
    command.add_argument("--weights", choices=NETWORKS, help="network to test (default: all that the run has)")
    command.add_argument(
        "--data", help="test on the test images of this set, normalized as the run's are (default: the run's test set)"
    )
    command.add_argument(
        "--reestimate-batchnorm",
        type=int,
        metavar="N",
        help="before, take the statistics of every BatchNorm anew from N training images: the averages that training "
        "kept lag behind weights which still move when it ends (default: as saved)",
    )
    command.add_argument("--root", help="folder in which mnist, cifar10 and so on lie (default: as in training)")
    command.add_argument("--device", choices=DEVICES, help="where to test (default: as in training)")
    command.add_argument("--threads", type=int, help="CPU threads (default: as in training)")
    command.add_argument("--workers", type=int, help="processes that load images (default: as in training)")

    command = add("compare", _compare, "table, statistics over seeds, and curves of several runs, finished or not")
    command.add_argument(
        "folders", type=Path, nargs="+", metavar="RUN", help="run folders, or those of --method compare"
    )
    command.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the curves of the test accuracy")
    command.add_argument("--csv", type=Path, metavar="FILE", help="write the table of runs, with all options")

    command = add("export", _export, "write a network of a finished run for use elsewhere")
    command.add_argument("folder", type=Path, metavar="RUN", help="run folder")
    command.add_argument("--format", choices=tuple(EXPORTED), required=True, help="of the file")
    command.add_argument("--weights", choices=NETWORKS, help="network to export (default: student; of cnn: teacher)")
    command.add_argument("--output", type=Path, metavar="FILE", help="default: RUN/export/WEIGHTS.pt, .pt2 or .onnx")

    command = add("quantize", quantize, "make the student of a finished run a network of bytes, and test and time it")
    add_options(command)

    command = add("report", _report, "write report.html and its figures: curves, distillation, weights, operations")
    command.add_argument("folder", type=Path, metavar="RUN", help="run folder, of a finished run or not")
    command.add_argument("--output", type=Path, metavar="FOLDER", help="folder to write to (default: RUN/report)")
    return parser


def main(arguments: Sequence[str]) -> int:
    """Runs a command line that begins with one of `COMMANDS`; returns the exit status."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except (ValueError, OSError, ImportError) as error:
        print(f"adderops.distill {arguments[0]}: error: {error}", file=sys.stderr)
        return 1
    return 0


# --- eval ---


def _evaluate(options: argparse.Namespace) -> None:
    run = RunFolder.load(options.folder)
    given = {name: getattr(options, name) for name in ("root", "device", "threads", "workers")}
    config = replace(run.config, **{name: value for name, value in given.items() if value is not None})
    run = replace(run, config=config)
    networks = {name: run.network(name) for name in ([options.weights] if options.weights else run.networks)}
    device = torch.device(device_type(config))
    torch.set_num_threads(config.threads)
    count = options.reestimate_batchnorm
    if count is not None and count < 2:
        raise ValueError(f"--reestimate-batchnorm: expected at least 2 images, got {count}")
    own = load_data_of(config) if count or options.data is None else None
    if options.data is None:
        images, kind = own.test, f"{run.tested_on} images"
    else:
        images, kind = _other_set(run, options.data, next(iter(networks.values()))), f"test images of {options.data}"
    print(f"{run.title}: {len(images)} {kind}")
    for name, network in networks.items():
        network.to(device, memory_format=torch.channels_last if config.channels_last else torch.preserve_format)
        if count:
            update_bn(calibration_batches(own.train, count), network, device)
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
        trained = run.curve(f"{name}_test_accuracy")[-1]
        if count:
            line += f"   (BatchNorm statistics of {min(count, len(own.train))} training images)"
        if options.data is None and abs(trained - accuracy) > 0.5 / len(images):  # another machine rounds otherwise
            line += f"   (when the training ended: {100 * trained:.2f} %)"
        print(line, flush=True)


def _other_set(run: RunFolder, data: str, network: nn.Module) -> ImageSet:
    """Returns the test images of another set, normalized as the run's: that is part of its networks."""
    config = replace(run.config, data=data, augment="none", train_images=None, validation=0, download=False)
    other = load_data_of(config)
    [(image, _)] = other.test.batches([torch.tensor([0])])
    expected = (*run.input_shape(network), len(classifier(network)[1].weight))
    got = (*image.shape[1:], other.num_classes)
    if got != expected:
        raise ValueError(f"--data: expected images (C, H, W) and classes {expected} as {run.path} has, got {got}")
    mean, std = (255 * torch.tensor(values) for values in run.preprocessing())
    return ImageSet(other.test.source, other.test.indices, mean, std, other.test.transform)


# --- compare ---


def _compare(options: argparse.Namespace) -> None:
    runs = [RunFolder.load(folder) for given in options.folders for folder in _run_folders(given)]
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


def _export(options: argparse.Namespace) -> None:
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
    suffix, content_of = EXPORTED[options.format]
    output = options.output or run.path / "export" / f"{name}{suffix}"
    try:
        content = content_of(network, torch.zeros(1, *shape), facts)
    except RuntimeError as error:  # of torch.export: in networks of other libraries
        raise ValueError(f"--format {options.format}: torch cannot export {run.config.arch}: {error}") from error
    output.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(output, content)
    print("\n".join([str(output), *(f"{key:<10}{value}" for key, value in facts.items())]))


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


def _report(options: argparse.Namespace) -> None:
    from adderops.distill.report import write_report

    run = RunFolder.load(options.folder)
    print(write_report(run, options.output or run.path / "report"))
