"""The command line of `python -m adderops.distill`: training runs, and commands on run folders."""

import argparse
import importlib
import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from adderops.distill import distributed, lock
from adderops.distill.build import device_type, load_data_of
from adderops.distill.comparison import compare
from adderops.distill.config import Config, Options
from adderops.distill.ending import ending
from adderops.distill.methods.task import COMPARE
from adderops.distill.options import add_arguments, flag, refuse_unused
from adderops.distill.runs import COMMANDS
from adderops.distill.runs.results import table
from adderops.distill.trainer import train

PROGRAM = "python -m adderops.distill"
DESCRIPTION = f"""\
Trains an adder network (student) together with a CNN of the same architecture (teacher) by PKKD, arXiv 2009.13044.
Without arguments: scikit-learn's digits with a CNN, the adder network with and without distillation, and int8: their
accuracy, energy and speed in one table, in less than two minutes.

Commands on run folders: {PROGRAM} COMMAND --help, where COMMAND is
"""
DESCRIPTION += "\n".join(f"  {name:<10}{command.help}" for name, command in COMMANDS.items())


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line in this process, as `python -m adderops.distill` does.

    A program can first register methods and networks of its own, which are then choices of --method and --arch.

    Args:
        arguments: words of the command line; those of the program by default.

    Returns:
        The exit status: 0; 1 if a run failed (no memory, a lost process, an infinite loss); 2 if it was refused
        (options, a damaged file, a folder in use); 128 + n if signal n stopped it.

    Raises:
        SystemExit: for --help, and for words that are no options.

    >>> main(["eval", "no/such/run"])  # prints to stderr: ... expected a run folder, got one without a config.json
    2
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    return _command(words[0], words[1:]) if words and words[0] in COMMANDS else _training(words)


def _command(name: str, words: list[str]) -> int:
    with ending(f"adderops.distill {name}") as end:
        command = COMMANDS[name]
        module = importlib.import_module(f"adderops.distill.runs.{command.module}")
        parser = argparse.ArgumentParser(
            prog=f"{PROGRAM} {name}",
            description=command.help[0].upper() + command.help[1:] + ".",
            argument_default=argparse.SUPPRESS,
            allow_abbrev=False,
        )
        add_arguments(parser, module.Options)
        module.run(module.Options(**vars(parser.parse_args(words))))
    return end.status


def _training(words: list[str]) -> int:
    parser = training_parser()
    given = vars(parser.parse_args(words))
    with ending("adderops.distill") as end:
        with distributed.process_group(device_type(given.get("device", "auto"))) as device:
            config, opened = open_run(parser, given)
            with opened as end.folder:
                data = load_data_of(config)
                first = distributed.rank() == 0
                if first:
                    print(f"run folder: {end.folder}", flush=True)
                if config.method == COMPARE:
                    results = compare(config, data, end.folder, device)
                else:
                    results = table([train(config, data, end.folder, device)])
                if first:
                    print(f"\n{results}\nrun folder: {end.folder}")
    return end.status


def training_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line without a command; its result has only what was given."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,  # tells given options from defaults
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


def open_run(parser: argparse.ArgumentParser, given: dict[str, Any]) -> tuple[Config, AbstractContextManager[Path]]:
    """Returns the configuration of the run that the options ask for, and a context that owns its folder.

    Args:
        parser: refuses options that do not go with --resume.
        given: option -> value, from the command line.
    """
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
