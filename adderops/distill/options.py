"""Options as fields of a dataclass: one declaration gives default, help, type and range to the command line and Python.

`Config` holds those of training; each command of `adderops.distill.commands` has its own.
"""

import argparse
import math
from collections.abc import Callable
from dataclasses import MISSING, Field, field, fields
from pathlib import Path
from typing import Any

LARGEST_INT = 2**31 - 1
LARGEST_FLOAT = 3.4e38  # of float32, in which torch computes
LARGEST_THREADS = 1024  # the OpenMP runtime ends the process where it cannot start a thread

KINDS = {bool: "true or false", int: "an integer", float: "a number", str: "a string", Path: "a path"}


def option(default: Any = MISSING, help: str = "", **metadata: Any) -> Any:
    """Declares an option.

    Args:
        default: None where something else decides; an option without it is an argument that the command needs.
        help: what it is; the command line adds the default.
        metadata: `type` of the value, for a default of None or none; `least` and `most`; `choices`; for the command
            line, `metavar`, `nargs` and `positional`.
    """
    return field(default=default, metadata={"help": help, **metadata})


def kind_of(f: Field) -> type:
    """Returns the type of an option's value."""
    return f.metadata.get("type") or type(f.default)


def check(options: Any, label: Callable[[str], str] = lambda name: name) -> None:
    """Checks every field of an instance against its declaration; None stands for 'not given'.

    Raises:
        ValueError: a value of another type or outside its range; the message names field (by `label`), expected, got.
    """
    for f in fields(options):
        value = getattr(options, f.name)
        if value is None and f.default is None:
            continue
        for item in value if f.metadata.get("nargs") else [value]:
            expected = _expected(f, item)
            if expected is not None:
                raise ValueError(f"{label(f.name)}: expected {expected}, got {_shown(item)}")


def _expected(f: Field, value: Any) -> str | None:
    """Returns what an option expects where the value is something else."""
    choices, least, most = (f.metadata.get(name) for name in ("choices", "least", "most"))
    if choices:
        return None if value in choices else f"one of {', '.join(choices)}"
    kind = kind_of(f)
    accepted = (int, float) if kind is float else kind
    if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
        return KINDS[kind]
    if kind not in (int, float):
        return None
    if least is None:
        least = -LARGEST_INT
    bound = LARGEST_FLOAT if kind is float else LARGEST_INT
    if least <= value <= (bound if most is None else most):
        return None
    if most is None and math.isfinite(value) and value > least:
        most = bound
    return f"a finite number of at least {least}" + (f" and at most {most}" if most is not None else "")


def _shown(value: Any) -> str:
    return str(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else repr(value)[:200]


def flag(name: str) -> str:
    """Returns an option as it is written on the command line.

    >>> flag("batch_size")
    '--batch-size'
    """
    return "--" + name.replace("_", "-")


def add_arguments(parser: argparse.ArgumentParser, options: type) -> None:
    """Adds the options of a dataclass to a parser, whose default must be `argparse.SUPPRESS`."""
    for f in fields(options):
        kind, metadata, text = kind_of(f), f.metadata, f.metadata["help"]
        settings = {name: metadata[name] for name in ("metavar", "nargs", "choices") if name in metadata}
        if metadata.get("positional"):
            parser.add_argument(f.name, type=kind, help=text, **settings)
            continue
        if f.default not in (None, MISSING):
            text += f" (default: {f.default})"
        if kind is bool:
            parser.add_argument(flag(f.name), action=argparse.BooleanOptionalAction, help=text)
        else:
            parser.add_argument(flag(f.name), type=kind, help=text, required=f.default is MISSING, **settings)
