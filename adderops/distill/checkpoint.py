"""Files of a run: checkpoint, log and configuration, each written atomically and checked when read."""

import csv
import io
import json
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import NoneType
from typing import Any

import torch
from torch import Tensor

from adderops.atomic import write_atomically
from adderops.distill.data.facts import check_facts, differences
from adderops.models.checkpoints import find_state_dict

FORMAT = 2
# Entries of every checkpoint, and their types.
CONTENT: dict[str, type] = {"config": dict, "epoch": int, "step": int, "sums": dict, "log": list, "layers": list}
CONTENT |= {"task": dict, "optimizer": dict}
LOG_COLUMNS = ("epoch", "images_per_second", "seconds")  # of every row, for every method


def write_json(path: Path, content: Any) -> None:
    write_atomically(path, (json.dumps(content, indent=2) + "\n").encode())


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """Writes a CSV file with the columns of the first row."""
    text = io.StringIO()
    if rows:
        writer = csv.DictWriter(text, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    write_atomically(path, text.getvalue().encode())


def save_tensors(path: Path, content: dict[str, Any]) -> None:
    """`torch.save`, atomically."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_atomically(path, buffer.getbuffer())


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Saves the state of a run.  It has no random state, which follows from seed, epoch and step."""
    save_tensors(path, {"format": FORMAT, **content})


@contextmanager
def reading(path: Path, expected: str, got: str = "a damaged file") -> Iterator[None]:
    """Turns every error that the content of a file causes into one error that names the file.

    Raises:
        ValueError: path, expected, got, and the reason.
    """
    try:
        yield
    except (MemoryError, ImportError):  # not the file's fault
        raise
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path}: expected {expected}, got {got} ({reason})") from error


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Loads what `save_checkpoint` wrote; executes no code from the file.

    Raises:
        FileNotFoundError: there is none.
        ValueError: damaged, or not one of ours.
    """
    content = _load_tensors(path, "checkpoint")
    if not isinstance(content, dict) or not (type(found := content.get("format")) is int and found == FORMAT):
        raise ValueError(f"{path}: expected a checkpoint of format {FORMAT}, got something else")
    with reading(path, "a checkpoint of a run"):
        for name, kind in CONTENT.items():
            if not isinstance(content.get(name), kind) or isinstance(content.get(name), bool):
                raise ValueError(f"{name}: expected {kind.__name__}, got {type(content.get(name)).__name__}")
        json.dumps(content["config"])  # numbers, strings, null: nothing that compares otherwise
        if min(content["epoch"], content["step"]) < 0 or len(content["log"]) != content["epoch"]:
            raise ValueError(
                f"expected a row of the log for each epoch done, got {len(content['log'])} for {content['epoch']}"
            )
        for row in content["log"]:
            _require_numbers({name: row.get(name) for name in LOG_COLUMNS})
        for row in content["layers"]:
            _require_numbers({"epoch": row.get("epoch")})
        _require_numbers(content["sums"])
        for of_network in content.get("best", {}).values():
            _require_numbers({name: of_network.get(name) for name in ("epoch", "accuracy")})
        for name, value in ((name, value) for row in content["log"] + content["layers"] for name, value in row.items()):
            if not isinstance(name, str) or not isinstance(value, (int, float, str, NoneType)):
                raise ValueError(f"{name}: expected a number, got {type(value).__name__}")
            is_share = value is None or (isinstance(value, (int, float)) and 0 <= value <= 1)
            if name.endswith("_accuracy") and not is_share:
                raise ValueError(f"{name}: expected a share from 0 to 1, got {value}")
    return content


def _require_numbers(row: dict[str, Any]) -> None:
    for name, value in row.items():
        if not isinstance(value, (int, float)):
            raise ValueError(f"{name}: expected a number, got {type(value).__name__}")


def require_same_configuration(folder: Path, changed: dict[str, tuple[Any, Any]]) -> None:
    """Raises ValueError where a run would continue with other options.

    Args:
        changed: name -> (the checkpoint's value, ours).
    """
    if changed:
        described = ", ".join(f"{name} {old!r} -> {new!r}" for name, (old, new) in changed.items())
        raise ValueError(f"{folder}: expected the configuration of the run in this folder, got another: {described}")


def require_same_data(folder: Path, saved: dict[str, Any] | None, data: dict[str, Any]) -> None:
    """Raises ValueError where a run would continue with other images or classes.

    Args:
        folder: of the run.
        saved: `Data.facts` in the checkpoint; None: a run of an older version, which cannot be checked.
        data: `Data.facts` now.
    """
    if saved is None:
        return
    with reading(folder / "checkpoint.pt", "the data set of a run"):
        check_facts(saved)
    if found := differences(saved, data):
        raise ValueError(f"{folder}: expected the images that the run began with, got others: {'; '.join(found)}")


def restore(part: Any, state: dict[str, Any]) -> None:
    """Calls `part.load_state_dict(state)`, and checks the state of an optimizer, which torch hardly does.

    Raises:
        ValueError: the state of another optimizer.
    """
    if isinstance(part, torch.optim.Optimizer):
        groups = part.state_dict()["param_groups"]
        if _types(groups) != _types(state["param_groups"]):
            raise ValueError("expected the parameter groups of this optimizer, got others")
        parameters = [p for group in part.param_groups for p in group["params"]]
        for i, values in state["state"].items():
            for name, value in values.items():
                if isinstance(value, Tensor) and value.dim() and value.shape != parameters[i].shape:
                    raise ValueError(
                        f"{name} of parameter {i}: expected shape {tuple(parameters[i].shape)}, "
                        f"got {tuple(value.shape)}"
                    )
    part.load_state_dict(state)


def _types(groups: list[dict[str, Any]]) -> list[dict[str, type]]:
    """Returns the types of an optimizer's settings, except one that older versions did not save."""
    return [{name: type(value) for name, value in group.items() if name != "initial_lr"} for group in groups]


def load_state_dict(path: Path) -> dict[str, Tensor]:
    """Loads a state_dict, also out of a trainer's checkpoint; executes no code from the file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: damaged, or not a state_dict.
    """
    content = _load_tensors(path, "state_dict")
    with reading(path, "a state_dict", "something else"):
        state = dict(find_state_dict(content))
    for name, value in state.items():
        if not isinstance(name, str):
            raise ValueError(f"{path}: expected a state_dict, got something else (a name of {type(name).__name__})")
        if value.layout == torch.strided and value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise ValueError(f"{path}: {name}: expected a number for each element, got one for several")
    return state


def _load_tensors(path: Path, what: str) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no {what}")
    with reading(path, f"a whole {what}"):
        if zipfile.is_zipfile(path):  # files of old PyTorch versions, such as the reference's, are not
            with zipfile.ZipFile(path) as archive:
                records = archive.infolist()
                # as torch.save writes them; compressed or overlapping records could unpack to any size
                if any(record.compress_type != zipfile.ZIP_STORED for record in records):
                    raise ValueError("a compressed record")
                if sum(record.file_size for record in records) > path.stat().st_size:
                    raise ValueError("records larger than the file")
                damaged = archive.testzip()  # torch.load does not look at the checksums
            if damaged is not None:
                raise ValueError(f"wrong checksum of {damaged}")
        return torch.load(path, map_location="cpu", weights_only=True)
