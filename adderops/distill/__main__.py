"""`python -m adderops.distill`: trains an adder network by PKKD and prints what the distillation was worth."""

import argparse
import signal
import sys
import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from adderops.distill import commands, distributed, lock
from adderops.distill.build import device_type, load_data_of
from adderops.distill.comparison import compare
from adderops.distill.comparison import table as _table
from adderops.distill.config import Config, Options
from adderops.distill.ending import ending
from adderops.distill.interrupt import end_at_once
from adderops.distill.options import add_arguments, flag, refuse_unused
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
    add_arguments(parser, Options)
    return parser


def _open_run(parser: argparse.ArgumentParser, given: dict[str, Any]) -> tuple[Config, AbstractContextManager[Path]]:
    """Returns the configuration of the run that the options ask for, and what gives its folder and keeps it owned."""
    resume, output = given.pop("resume", None), given.pop("output", None)
    if resume is not None:
        others = sorted(set(given) - {"threads", "workers", "device"}) + ["output"] * (output is not None)
        if others:
            refused = ", ".join(map(flag, others))
            parser.error(f"--resume takes everything from the run's config.json; drop {refused}")
        if not (resume / "config.json").is_file():
            remedy = "; start it again with --output" if resume.is_dir() and not lock.holds_work(resume) else ""
            raise FileNotFoundError(f"--resume: expected a run folder, got {resume} without a config.json{remedy}")
        return Config.load(resume / "config.json").changed(**given), lock.own(resume)
    options = Options(**given)
    refuse_unused(options, given)
    config = options.resolve()
    stamp = time.strftime("%Y%m%d-%H%M%S")
    return config, lock.own_new(output, f"{Path(config.data).name}-{Path(config.arch).name}-{config.method}-{stamp}")


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns 0, 1 for an error, or 128 + the signal that stopped it."""
    status = run(sys.argv[1:] if arguments is None else arguments)
    return status if status >= 128 else min(status, 1)


def run(arguments: list[str]) -> int:
    """Runs the command line; returns the exit status of its process, see `adderops.distill.ending`."""
    if arguments and arguments[0] in commands.COMMANDS:
        return commands.run(arguments)
    parser = _parser()
    given = vars(parser.parse_args(arguments))
    with ending("adderops.distill") as end:
        with distributed.process_group(device_type(given.get("device", "auto"))) as device:
            config, opened = _open_run(parser, given)
            with opened as end.folder:
                data = load_data_of(config)
                first = distributed.rank() == 0
                if first:
                    print(f"run folder: {end.folder}", flush=True)
                if config.method == "compare":
                    results = compare(config, data, end.folder, device)
                else:
                    results = _table([train(config, data, end.folder, device)])
                if first:
                    print(f"\n{results}\nrun folder: {end.folder}")
    return end.status


if __name__ == "__main__":
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, end_at_once)
    sys.exit(run(sys.argv[1:]))
