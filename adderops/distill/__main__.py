"""`python -m adderops.distill`: trains an adder network by PKKD and prints what the distillation was worth."""

import argparse
import sys
import time
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from adderops.distill import commands, distributed
from adderops.distill.build import device_type, load_data_of
from adderops.distill.comparison import compare
from adderops.distill.comparison import table as _table
from adderops.distill.config import Config
from adderops.distill.interrupt import Interrupted
from adderops.distill.trainer import train

DESCRIPTION = """\
Trains an adder network (student) together with a CNN of the same architecture (teacher) by PKKD, arXiv 2009.13044.
Without arguments: scikit-learn's digits, CNN, adder network with and without distillation, and int8: their accuracy,
energy and speed in a table; under two minutes.

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
    )
    for f in fields(Config):
        flag = "--" + f.name.replace("_", "-")
        text = f.metadata["help"] + ("" if f.default is None else f" (default: {f.default})")
        kind = f.metadata.get("type") or type(f.default)
        if kind is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, help=text)
        else:
            parser.add_argument(flag, type=kind, choices=f.metadata.get("choices"), help=text)
    parser.add_argument(
        "--output", type=Path, metavar="FOLDER", help="run folder to make (default: runs/DATA-ARCH-METHOD-TIME)"
    )
    parser.add_argument(
        "--resume",
        type=Path,
        metavar="FOLDER",
        help="run folder to continue as its config.json says; no other option but --threads, --workers, --device",
    )
    return parser


def _open_run(parser: argparse.ArgumentParser, given: dict[str, Any]) -> tuple[Config, Path]:
    """Returns configuration and folder of the run that the options ask for."""
    resume, output = given.pop("resume", None), given.pop("output", None)
    if resume is not None:
        others = sorted(set(given) - {"threads", "workers", "device"}) + ["output"] * (output is not None)
        if others:
            refused = ", ".join("--" + name.replace("_", "-") for name in others)
            parser.error(f"--resume takes everything from the run's config.json; drop {refused}")
        if not (resume / "config.json").is_file():
            raise FileNotFoundError(f"--resume: expected a run folder, got {resume} without a config.json")
        return replace(Config.load(resume / "config.json"), **given), resume
    config = Config(**given).resolve()
    if output is None:
        stamp = time.strftime("%Y%m%d-%H%M%S")
        name = f"{Path(config.data).name}-{Path(config.arch).name}-{config.method}-{stamp}"
        output = Path("runs") / distributed.of_first(name)
    if distributed.rank() == 0 and output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise FileExistsError(f"--output: {output} exists; continue it with --resume, or choose another folder")
    return config, output


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
                results = compare(config, data, folder, device)
            else:
                results = _table([train(config, data, folder, device)])
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
        print(f"\n{results}\nrun folder: {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
