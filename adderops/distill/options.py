"""Options as fields of a dataclass: one declaration of default, help, type and range, for command line and Python."""

import argparse
import math
import numbers
import os
from collections.abc import Callable, Iterable
from dataclasses import MISSING, Field, field, fields
from pathlib import Path
from typing import Any

LARGEST_INT = 2**31 - 1
LARGEST_FLOAT = 3.4e38  # of float32: beyond, torch refuses a number for its tensors
LARGEST_THREADS = 1024  # the OpenMP runtime ends the process where it cannot start a thread

KINDS = {bool: "true or false", int: "an integer", float: "a number", str: "a string", Path: "a path"}


def option(default: Any = MISSING, help: str = "", **metadata: Any) -> Any:
    """Declares an option.

    Args:
        default: None where something else decides; an option without it is an argument that the command needs.
        help: what it is; the command line adds the default.
        metadata: `type` of the value, for a default of None or none; `least` and `most`; `choices`; `needs`, {other
            option: values beside which this one has an effect}; for the command line `group`, the heading in --help,
            `alone`, the value where the option is given without one, `metavar`, `nargs` and `positional`.
    """
    return field(default=default, metadata={"help": help, **metadata})


def kind_of(f: Field) -> type:
    """Returns the type of an option's value."""
    return f.metadata.get("type") or type(f.default)


def check(options: Any, label: Callable[[str], str] = lambda name: name) -> None:
    """Checks every field of an instance against its declaration; None stands for 'not given'.

    Numbers and paths become those of the declared type, of numpy's for example.

    Raises:
        ValueError: a value of another type or outside its range; the message names field (by `label`), expected, got.
    """
    for f in fields(options):
        value = getattr(options, f.name)
        if value is None and f.default is None:
            continue
        if f.metadata.get("nargs"):
            checked = type(value)(_checked(f, item, label) for item in value)
        else:
            checked = _checked(f, value, label)
        object.__setattr__(options, f.name, checked)


def check_values(declared: type, where: str, values: dict[str, Any]) -> None:
    """Checks values, by name, as the fields of a dataclass declare them; None passes.

    Raises:
        ValueError: the message names `where`, field, expected, got.
    """
    for f in fields(declared):
        if values.get(f.name) is not None:
            _checked(f, values[f.name], lambda name: f"{where}: {name}")


def _checked(f: Field, value: Any, label: Callable[[str], str]) -> Any:
    """Returns the value as the declared type."""
    kind = kind_of(f)
    if kind is str and isinstance(value, os.PathLike):
        value = os.fspath(value)
    expected = _expected(f, kind, value)
    if expected is not None:
        raise ValueError(f"{label(f.name)}: expected {expected}, got {_shown(value)}")
    return kind(value)


def _expected(f: Field, kind: type, value: Any) -> str | None:
    """Returns what an option expects where the value is something else."""
    choices, least, most = (f.metadata.get(name) for name in ("choices", "least", "most"))
    accepted = {int: numbers.Integral, float: numbers.Real}.get(kind, kind)
    if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
        return KINDS[kind]
    if choices:
        return None if value in choices else f"one of {', '.join(choices)}"
    if kind not in (int, float):
        return None
    bound = LARGEST_FLOAT if kind is float else LARGEST_INT
    least = -bound if least is None else least
    if least <= value <= (bound if most is None else most):
        return None
    if most is None and least < value < math.inf:
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
    """Adds the options of a dataclass to a parser, whose default must be `argparse.SUPPRESS`; groups under headings."""
    groups: dict[str, Any] = {}
    for f in fields(options):
        kind, metadata, text = kind_of(f), f.metadata, f.metadata["help"]
        settings = {name: metadata[name] for name in ("metavar", "nargs", "choices") if name in metadata}
        if metadata.get("positional"):
            parser.add_argument(f.name, type=kind, help=text, **settings)
            continue
        group = parser
        if "group" in metadata:
            title = metadata["group"]
            groups[title] = group = groups.get(title) or parser.add_argument_group(title)
        if f.default not in (None, MISSING):
            text += f" (default: {f.default})"
        if kind is bool:
            group.add_argument(flag(f.name), action=argparse.BooleanOptionalAction, help=text)
        elif "alone" in metadata:
            group.add_argument(flag(f.name), type=kind, nargs="?", const=metadata["alone"], help=text, **settings)
        else:
            group.add_argument(flag(f.name), type=kind, help=text, required=f.default is MISSING, **settings)


def refuse_unused(options: Any, given: Iterable[str]) -> None:
    """Raises ValueError where an option given has no effect beside the others, naming both."""
    declared = {f.name: f for f in fields(options)}
    for name in given:
        for other, values in declared[name].metadata.get("needs", {}).items():
            if getattr(options, other) not in values:
                got = f"{flag(other)} {str(getattr(options, other)).lower()}"
                wanted = " or ".join(str(value).lower() for value in values)
                raise ValueError(
                    f"{name}: expected {flag(other)} {wanted} beside it, got {got}: it has no effect there"
                )
