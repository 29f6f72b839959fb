"""`python -m adderops.distill`: trains an adder network by PKKD and prints what the distillation was worth."""

import argparse
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from adderops.distill import commands, distributed
from adderops.distill.build import device_type, load_data_of
from adderops.distill.checkpoint import write_json
from adderops.distill.config import Config
from adderops.distill.data import Data
from adderops.distill.interrupt import Interrupted
from adderops.distill.options import add_arguments, flag, refuse_unused
from adderops.distill.trainer import train

DESCRIPTION = """\
Trains an adder network (student) together with a CNN of the same architecture (teacher) by PKKD, arXiv 2009.13044.
Without arguments: scikit-learn's digits, the student with and without distillation, a table; under two minutes.

What is done with runs: python -m adderops.distill COMMAND --help, where COMMAND is
  eval      test the saved networks again
  compare   table, statistics over seeds, and curves of several runs
  export    state_dict, torch.export program or ONNX file of a network
  quantize  the student as a network of bytes: accuracy, images a second, file
  report    report.html: curves, distillation, weights, operations"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m adderops.distill",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,  # so that options given are told from defaults
        allow_abbrev=False,
    )
    folder = parser.add_argument_group("run folder")
    folder.add_argument(
        "--output", type=Path, metavar="FOLDER", help="run folder to make (default: runs/DATA-ARCH-METHOD-TIME)"
    )
    folder.add_argument(
        "--resume",
        type=Path,
        metavar="FOLDER",
        help="run folder to continue as its config.json says; no other option but --threads, --workers, --device",
    )
    add_arguments(parser, Config)
    return parser


def _open_run(parser: argparse.ArgumentParser, given: dict[str, Any]) -> tuple[Config, Path]:
    """Returns configuration and folder of the run that the options ask for."""
    resume, output = given.pop("resume", None), given.pop("output", None)
    if resume is not None:
        others = sorted(set(given) - {"threads", "workers", "device"}) + ["output"] * (output is not None)
        if others:
            refused = ", ".join(map(flag, others))
            parser.error(f"--resume takes everything from the run's config.json; drop {refused}")
        if not (resume / "config.json").is_file():
            raise FileNotFoundError(f"--resume: expected a run folder, got {resume} without a config.json")
        return replace(Config.load(resume / "config.json"), **given), resume
    config = Config(**given)
    refuse_unused(config, given)
    config = config.resolve()
    if output is None:
        stamp = time.strftime("%Y%m%d-%H%M%S")
        name = f"{Path(config.data).name}-{Path(config.arch).name}-{config.method}-{stamp}"
        output = Path("runs") / distributed.of_first(name)
    if distributed.rank() == 0 and output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise FileExistsError(f"--output: {output} exists; continue it with --resume, or choose another folder")
    return config, output


def _compare(config: Config, data: Data, folder: Path, device: torch.device) -> list[dict[str, Any]]:
    """Runs pkkd and plain in subfolders; those that are finished already return at once."""
    if distributed.rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "config.json", asdict(config))
    summaries = [train(replace(config, method=method), data, folder / method, device) for method in ("pkkd", "plain")]
    if distributed.rank() == 0:
        write_json(folder / "summary.json", summaries)
    return summaries


def _table(summaries: list[dict[str, Any]]) -> str:
    """One line for each network trained, with the standard error that the number of test images implies."""
    named = {
        ("pkkd", "teacher"): "teacher: CNN, by the labels",
        ("pkkd", "student"): "student: adder network, by PKKD",
        ("plain", "student"): "plain:   adder network, by the labels",
        ("cnn", "teacher"): "cnn:     CNN, by the labels",
    }
    lines = []
    for summary in summaries:
        for name in ("teacher", "teacher_ema", "student", "student_ema"):
            accuracy = summary.get(f"{name}_test_accuracy")
            if accuracy is not None:
                label = named[summary["method"], name.removesuffix("_ema")] + ", averaged" * name.endswith("_ema")
                error = (accuracy * (1 - accuracy) / summary["test_images"]) ** 0.5
                lines.append(f"{label:<40}{100 * accuracy:6.2f} % +- {100 * error:.2f}")
    first = summaries[0]
    kind = "validation" if first["test_is_validation"] else "test"
    title = f"{first['dataset']}, {first['network']}, seed {first['seed']}, {first['epochs']} epochs"
    return "\n".join([f"{title}: {kind} accuracy", *lines])


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments and arguments[0] in commands.COMMANDS:
        return commands.main(arguments)
    parser = _parser()
    given = vars(parser.parse_args(arguments))
    folder = None
    try:
        with distributed.process_group(
            device_type(Config(**{k: v for k, v in given.items() if k == "device"}))
        ) as device:
            config, folder = _open_run(parser, given)
            data = load_data_of(config)
            first = distributed.rank() == 0
            if first:
                print(f"run folder: {folder}", flush=True)
            if config.method == "compare":
                summaries = _compare(config, data, folder, device)
            else:
                summaries = [train(config, data, folder, device)]
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        print(f"adderops.distill: error: {error}", file=sys.stderr)
        return 1
    except Interrupted as stopped:
        print(f"\nadderops.distill: {stopped}; continue with --resume {folder}", file=sys.stderr)
        return 128 + stopped.signum
    except KeyboardInterrupt:
        print(f"\nadderops.distill: interrupted; continue with --resume {folder}", file=sys.stderr)
        return 130
    if first:
        print(f"\n{_table(summaries)}\nrun folder: {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
