"""Declared options: help, group, type and range of each said once, for the command line, its help and every check."""

import argparse
import dataclasses
import math
import numbers
import os
from collections.abc import Iterable
from typing import Any

FLOAT_MOST = 3.4028234663852886e38  # of float32: beyond, torch refuses a number for its tensors
INT_MOST = 2**31 - 1
_NAMES = {bool: "true or false", int: "an integer", float: "a number", str: "text"}


def option(default: Any, help: str, group: str, **metadata: Any) -> Any:
    """Declares an option as a field of a dataclass.

    Args:
        default: may be None; then `type` says what other values are.
        help: for --help; the default is added to it.
        group: heading under which --help has it.
        metadata: `type` where it is not that of the default; `choices`; `least` and `most`, of a number; `alone`, the
            value where the option is given without one; `needs`, {other option: values with which this has an effect}.
    """
    return dataclasses.field(default=default, metadata={"help": help, "group": group, **metadata})


def kind_of(field: dataclasses.Field) -> type:
    return field.metadata.get("type") or type(field.default)


def check(config: Any) -> None:
    """Checks type, choice and range of every field of a frozen dataclass; numbers become those of the declared type.

    Raises:
        ValueError: the message names field, expected, got.
    """
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value is None and field.default is None:
            continue
        value = _checked(field, value)
        object.__setattr__(config, field.name, value)


def check_values(declared: type, where: str, values: dict[str, Any]) -> None:
    """Checks values, by name, as the fields of a dataclass declare them; None passes.

    Raises:
        ValueError: the message names `where`, field, expected, got.
    """
    for field in dataclasses.fields(declared):
        if values.get(field.name) is not None:
            try:
                _checked(field, values[field.name])
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from None


def _checked(field: dataclasses.Field, value: Any) -> Any:
    kind, metadata = kind_of(field), field.metadata
    if kind is str and isinstance(value, os.PathLike):
        value = os.fspath(value)
    accepted = {bool: bool, int: numbers.Integral, float: numbers.Real, str: str}[kind]
    if not isinstance(value, accepted) or (kind is not bool and isinstance(value, bool)):
        raise ValueError(f"{field.name}: expected {_NAMES[kind]}, got {value!r}")
    choices = metadata.get("choices")
    if choices and value not in choices:
        raise ValueError(f"{field.name}: expected one of {', '.join(choices)}, got {value!r}")
    if kind in (int, float):
        least, most = metadata.get("least", -math.inf), metadata.get("most", INT_MOST if kind is int else FLOAT_MOST)
        if not least <= value <= most:
            upper = f" and at most {most}" if "most" in metadata or value > most else ""
            raise ValueError(f"{field.name}: expected a finite number of at least {least}{upper}, got {value}")
        value = kind(value)
    return value


def add_arguments(parser: argparse.ArgumentParser, config: type) -> None:
    """Adds an option to the parser for every field of a dataclass, under the heading of its group."""
    groups: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        title = field.metadata["group"]
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        group = groups[title]
        flag = flag_of(field.name)
        text = field.metadata["help"] + ("" if field.default is None else f" (default: {field.default})")
        kind, choices = kind_of(field), field.metadata.get("choices")
        if kind is bool:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, help=text)
        elif "alone" in field.metadata:
            group.add_argument(flag, nargs="?", const=field.metadata["alone"], choices=choices, help=text)
        else:
            group.add_argument(flag, type=kind, choices=choices, help=text)


def refuse_unused(config: Any, given: Iterable[str]) -> None:
    """Raises ValueError where an option given has no effect beside the others, naming both."""
    declared = {field.name: field for field in dataclasses.fields(config)}
    for name in given:
        for other, values in declared[name].metadata.get("needs", {}).items():
            if getattr(config, other) not in values:
                got = f"{flag_of(other)} {str(getattr(config, other)).lower()}"
                wanted = " or ".join(str(value).lower() for value in values)
                raise ValueError(
                    f"{name}: expected {flag_of(other)} {wanted} beside it, got {got}: it has no effect there"
                )


def flag_of(name: str) -> str:
    return "--" + name.replace("_", "-")
