"""A network of bytes as a file that runs without the code it was trained with."""

import io
import json
import os
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from adderops.export import export_program
from adderops.files import write_atomically
from adderops.quant.grid import Grid
from adderops.quant.scheme import Scheme

FORMAT = 1
_FACTS = "adderops_quant.json"


def save(integer: GraphModule, example: Tensor, path: str | os.PathLike, facts: dict[str, Any] | None = None) -> None:
    """Saves what `convert` returned as a `torch.export` program of any batch size, with scheme and grids, atomically.

    Args:
        integer: the network of bytes.
        example: an input (N, ...).
        path: of the file (usually *.pt2).
        facts: what else shall be known of it (how images are normalized, say); anything that JSON can hold.

    Raises:
        ValueError: a module that `convert` did not make.
        FileNotFoundError: the folder of path does not exist.
    """
    made_by = integer.meta.get("adderops.quant") if isinstance(integer, GraphModule) else None
    if made_by is None:
        raise ValueError("integer: expected what adderops.quant.convert returned, got another module")
    if not Path(path).parent.is_dir():
        raise FileNotFoundError(f"path: expected a file in an existing folder, got {os.fspath(path)!r}")
    content = {"format": FORMAT, **made_by, "facts": facts or {}}
    buffer = io.BytesIO()
    with warnings.catch_warnings():  # of weights that are not contiguous: they have their memory for themselves
        warnings.filterwarnings("ignore", message="No complete tensor found")
        torch.export.save(export_program(integer, example), buffer, extra_files={_FACTS: json.dumps(content)})
    write_atomically(Path(path), buffer.getbuffer())


def load(path: str | os.PathLike) -> tuple[nn.Module, dict[str, Any]]:
    """Loads what `save` wrote; needs the operators (`import adderops`), none of the code that trained the network.

    Returns:
        The network, and what is known of it: `scheme`, `layers` (the grids by layer) and `facts`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a damaged file, one that `save` did not write, or one whose bytes do not fit its grids.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file")
    extra = {_FACTS: ""}
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"wrong checksum of {damaged}")
        program = torch.export.load(os.fspath(path), extra_files=extra)
    except (RuntimeError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: expected a program of adderops.quant.save, got a damaged file ({error})") from error
    content = json.loads(extra[_FACTS] or "{}")
    if content.get("format") != FORMAT:
        raise ValueError(f"{path}: expected a network of bytes of format {FORMAT}, got {content.get('format')}")
    Scheme(**content["scheme"])
    _check_bytes(path, program.state_dict, content["layers"])
    return program.module(check_guards=False), content


def _check_bytes(path: str | os.PathLike, state: dict[str, Tensor], layers: dict[str, list[dict[str, Any]]]) -> None:
    """Every adder layer has the bytes, scales and offsets that its grids speak of."""
    for name, grids in layers.items():
        for i, fields in enumerate(grids):
            grid, part = Grid(**fields), f"{name}.group{i}" if len(grids) > 1 else name
            weight = state.get(f"{part}.weight")
            if weight is None:
                raise ValueError(f"{path}: expected the weights of {part!r}, got none")
            if weight.dtype == torch.int8:
                continue  # of a layer that multiplies
            if weight.dtype != torch.uint8 or int(weight.max()) > grid.quant_max:
                raise ValueError(
                    f"{path}: {part}: expected bytes up to {grid.quant_max}, got {weight.dtype} up to {weight.max()}"
                )
            for kind in ("scale", "offset"):
                values = state.get(f"{part}.{kind}")
                if values is None or not bool(values.isfinite().all()):
                    raise ValueError(f"{path}: {part}: expected a finite {kind} for each filter, got {values}")
