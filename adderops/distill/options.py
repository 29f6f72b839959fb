"""Options as fields of a dataclass: one declaration gives default, help, type and range to command line and Python.

`adderops.distill.config.Options` has the options of training; each command in `adderops.distill.runs` has its own.
"""

import argparse
import math
import numbers
import os
from collections.abc import Callable, Iterable
from dataclasses import MISSING, Field, field, fields
from pathlib import Path
from typing import Any

LARGEST_INT = 2**31 - 1
LARGEST_FLOAT = 3.4e38  # of float32: torch refuses larger numbers for its tensors
LARGEST_THREADS = 1024  # OpenMP ends the process where it cannot start a thread

_NAMES = {bool: "true or false", int: "an integer", float: "a number", str: "a string", Path: "a path"}
_ACCEPTED: dict[type, Any] = {
    bool: bool,
    int: numbers.Integral,
    float: numbers.Real,
    str: (str, os.PathLike),
    Path: (str, os.PathLike),
}


def option(
    default: Any = MISSING, help: str | Callable[[], str] = "", group: str | None = None, **metadata: Any
) -> Any:
    """Declares an option.

    Args:
        default: None where something else decides; an option without a default is required.
        help: what it is; the command line adds the default.  A function where registered names are part of it.
        group: heading under which --help has it.
        metadata: `type` of the value, where the default is None or missing; `choices`; `least` and `most`, for numbers;
            `alone`, the value where the option is given without one; `needs`, {other option: values with which this has
            an effect}; for the command line, `metavar`, `nargs` and `positional`.  Choices and values in `needs` may be
            functions, too.
    """
    return field(default=default, metadata={"help": help, "group": group, **metadata})


def now(value: Any) -> Any:
    """Returns the value, or what a function returns: names may be registered after the declaration."""
    return value() if callable(value) else value


def kind_of(f: Field[Any]) -> type:
    """Returns the type of an option's value."""
    return f.metadata.get("type") or type(f.default)


def flag(name: str) -> str:
    """Returns the option's name on the command line.

    >>> flag("batch_size")
    '--batch-size'
    """
    return "--" + name.replace("_", "-")


def check(options: Any, label: Callable[[str], str] = lambda name: name) -> None:
    """Checks type, choice and range of every field of a frozen dataclass; converts the values to the declared types.

    None means 'not given' where it is the default.

    Raises:
        ValueError: the message names field (by `label`), expected, got.
    """
    for f in fields(options):
        value = getattr(options, f.name)
        if value is None and f.default is None:
            continue
        several = "nargs" in f.metadata
        values = [_checked(f, item, label(f.name)) for item in (value if several else [value])]
        object.__setattr__(options, f.name, tuple(values) if several else values[0])


def check_values(declared: type, where: str, values: dict[str, Any]) -> None:
    """Checks values, by name, against the fields of a dataclass; None passes.

    Raises:
        ValueError: the message names `where`, field, expected, got.
    """
    for f in fields(declared):
        if values.get(f.name) is not None:
            _checked(f, values[f.name], f"{where}: {f.name}")


def _checked(f: Field[Any], value: Any, label: str) -> Any:
    kind, metadata = kind_of(f), f.metadata
    if not isinstance(value, _ACCEPTED[kind]) or (kind is not bool and isinstance(value, bool)):
        raise ValueError(f"{label}: expected {_NAMES[kind]}, got {_shown(value)}")
    choices = now(metadata.get("choices"))
    if choices and value not in choices:
        raise ValueError(f"{label}: expected one of {', '.join(choices)}, got {_shown(value)}")
    if kind in (int, float):
        least = metadata.get("least", -LARGEST_INT if kind is int else -LARGEST_FLOAT)
        most = metadata.get("most", LARGEST_INT if kind is int else LARGEST_FLOAT)
        if not least <= value <= most:
            upper = f" and at most {most}" if "most" in metadata or most < value < math.inf else ""
            raise ValueError(f"{label}: expected a finite number of at least {least}{upper}, got {_shown(value)}")
    return kind(os.fspath(value) if kind is str else value)


def _shown(value: Any) -> str:
    text = str(value) if isinstance(value, numbers.Real) and not isinstance(value, bool) else repr(value)
    return text[:200]


def add_arguments(parser: argparse.ArgumentParser, options: type) -> None:
    """Adds the options of a dataclass to a parser, each under its group.

    The parser's `argument_default` must be `argparse.SUPPRESS`, so that options not given are absent.
    """
    groups: dict[str | None, Any] = {None: parser}
    for f in fields(options):
        kind, metadata, text = kind_of(f), f.metadata, now(f.metadata["help"])
        title = metadata["group"]
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        group = groups[title]
        settings = {name: now(metadata[name]) for name in ("metavar", "nargs", "choices") if name in metadata}
        if metadata.get("positional"):
            group.add_argument(f.name, type=kind, help=text, **settings)
            continue
        if f.default not in (None, MISSING):
            text += f" (default: {f.default})"
        if kind is bool:
            group.add_argument(flag(f.name), action=argparse.BooleanOptionalAction, help=text)
        elif "alone" in metadata:
            group.add_argument(flag(f.name), nargs="?", const=metadata["alone"], help=text, **settings)
        else:
            group.add_argument(flag(f.name), type=kind, help=text, required=f.default is MISSING, **settings)


def refuse_unused(options: Any, given: Iterable[str]) -> None:
    """Raises ValueError where an option has no effect together with the others, naming both.

    Args:
        options: all of them.
        given: names of those that the user gave.
    """
    declared = {f.name: f for f in fields(options)}
    for name in given:
        for other, values in declared[name].metadata.get("needs", {}).items():
            values = now(values)
            if getattr(options, other) not in values:
                got = f"{flag(other)} {str(getattr(options, other)).lower()}"
                wanted = " or ".join(str(value).lower() for value in values)
                raise ValueError(
                    f"{name}: expected {flag(other)} {wanted} beside it, got {got}: it has no effect there"
                )


def parse_weights(text: str) -> list[float]:
    """Returns the numbers of --class-weights.

    Raises:
        ValueError: not numbers of at least 0, one of them positive, with commas between.

    >>> parse_weights("1,2.5")
    [1.0, 2.5]
    """
    try:
        weights = [float(word) for word in text.split(",")]
    except ValueError:
        weights = []
    if not weights or not all(0 <= weight <= 1e6 for weight in weights) or not any(weights):
        raise ValueError(
            f"class_weights: expected balanced, or numbers from 0 to 1e6 with commas between, got {text!r}"
        )
    return weights
