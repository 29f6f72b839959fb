"""Files of a run: checkpoint, log and configuration, each written atomically and checked when read."""

import csv
import io
import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from adderops.files import write_atomically

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
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no checkpoint")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch.load does not look at the checksums
        if damaged is not None:
            raise ValueError(f"wrong checksum of {damaged}")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, zipfile.BadZipFile, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path}: expected a whole checkpoint, got a damaged one ({reason})") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{path}: expected a checkpoint of format {FORMAT}, got something else")
    return content
