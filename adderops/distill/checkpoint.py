"""Files of a run: checkpoint, log and configuration, each written atomically and checked when read."""

import csv
import io
import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adderops.files import write_atomically
from adderops.models.checkpoints import find_state_dict

FORMAT = 2


def write_json(path: Path, content: Any) -> None:
    write_atomically(path, (json.dumps(content, indent=2) + "\n").encode())


def write_csv(path: Path, rows: list[dict[str, float]]) -> None:
    """Writes the log anew: its rows are part of the checkpoint, so that a resumed run has each of them once."""
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
    """Saves the state of a run.  No random state is among it: that of each step follows from seed, epoch and step."""
    save_tensors(path, {"format": FORMAT, **content})


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Loads what `save_checkpoint` wrote; executes no code from the file.

    Raises:
        FileNotFoundError: there is none.
        ValueError: damaged, or not one of ours.
    """
    content = _load_tensors(path, "checkpoint")
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{path}: expected a checkpoint of format {FORMAT}, got something else")
    return content


def load_state_dict(path: Path) -> dict[str, Tensor]:
    """Loads a state_dict, or that of a trainer's checkpoint; executes no code from the file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: damaged, or not a state_dict.
    """
    content = _load_tensors(path, "state_dict")
    try:
        return dict(find_state_dict(content))
    except ValueError:
        raise ValueError(f"{path}: expected a state_dict, got something else") from None


def _load_tensors(path: Path, what: str) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no {what}")
    try:
        if zipfile.is_zipfile(path):  # old files of PyTorch, the reference's among them, are not
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()  # torch.load does not look at the checksums
            if damaged is not None:
                raise ValueError(f"wrong checksum of {damaged}")
        return torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, zipfile.BadZipFile, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path}: expected a whole {what}, got a damaged file ({reason})") from error
