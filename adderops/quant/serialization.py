"""An integer network as a safetensors file: tensors and a graph, data only, with nothing that is executed.

    8 bytes      length of the header, little endian
    header       JSON: dtype, shape and position of each tensor, and in `__metadata__` one text, `adderops.quant`
    tensors      contiguous, in the order of the header

The text is JSON as well: `format`, `input`, `nodes`, `output` (adderops/quant/graph.py), `scheme`, `layers` (the
grids), `facts`, and the `sha256` of all of these and the tensors.  The checksum finds damage; the checks of `graph` and
`network` find what somebody may have forged.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from adderops.atomic import write_atomically
from adderops.quant.calibration import unwrapped
from adderops.quant.checks import check, check_keys
from adderops.quant.graph import tensors_of
from adderops.quant.network import IntegerNetwork, document_of, restore

FORMAT = 2
_KEY = "adderops.quant"
_LONGEST_HEADER = 2**23  # bytes; ResNet-50 takes 2**17
_SIZES = {"F32": 4, "U8": 1, "I8": 1, "I64": 8}


def save(
    integer: nn.Module, example: Tensor, path: str | os.PathLike[str], facts: dict[str, Any] | None = None
) -> None:
    """Saves an integer network as a safetensors file, written atomically: tensors, and the graph as JSON.

    Args:
        integer: what `convert` or `load` returned.
        example: an input (N, ...) of the shape and dtype that the network was converted for.
        path: the file to write, usually *.safetensors.
        facts: anything else to keep with the network, such as the normalization of images; JSON must be able to
            represent it.

    Raises:
        TypeError: example is not a tensor.
        ValueError: a module that `convert` did not return, an operation outside the closed list of docs/int8.md, an
            example of another shape or dtype, or facts that JSON cannot hold.
        FileNotFoundError: the folder of path does not exist.

    >>> import tempfile
    >>> from adderops.models import lenet5
    >>> from adderops.quant import calibrate, convert, reestimate_batchnorm
    >>> images = torch.randn(8, 1, 32, 32)
    >>> model = reestimate_batchnorm(lenet5(), [images]).eval()  # stands for training
    >>> integer = convert(calibrate(model, [images]), images)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(integer, images, f"{folder}/int8.safetensors", {"classes": 10})
    ...     loaded, known = load(f"{folder}/int8.safetensors")
    >>> torch.equal(loaded(images), integer(images)), known["facts"], known["scheme"]["bits"]
    (True, {'classes': 10}, 8)
    """
    integer = unwrapped(integer)
    document = document_of(integer)
    assert isinstance(integer, GraphModule)  # or it has been refused
    if not isinstance(example, Tensor):
        raise TypeError(f"save: example: expected a tensor, got {type(example).__name__}")
    source = document["input"]
    taken, given = (source["shape"][1:], source["dtype"]), (list(example.shape[1:]), str(example.dtype)[6:])
    check(taken == given, "save: example", f"(N, ...) of {taken[0]}, {taken[1]}", f"{given[0]}, {given[1]}")
    if not Path(path).parent.is_dir():
        raise FileNotFoundError(f"save: path: expected a file in an existing folder, got {os.fspath(path)!r}")
    document |= {"format": FORMAT, "facts": {} if facts is None else facts}
    try:
        same = json.loads(_json(document)) == document
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"save: facts: expected what JSON can hold, got {error}") from error
    check(same and isinstance(document["facts"], dict), "save: facts", "a dict of what JSON gives back", facts)
    tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors_of(integer).items()}
    restore({key: value for key, value in document.items() if key not in ("format", "facts")}, tensors)
    document["sha256"] = _checksum(document, tensors)
    content = safetensors.torch.save(tensors, {_KEY: _json(document)})
    header = int.from_bytes(content[:8], "little")
    check(header <= _LONGEST_HEADER, "integer", f"a graph of {_LONGEST_HEADER} bytes at most", header)
    write_atomically(Path(path), content)


def load(path: str | os.PathLike[str]) -> tuple[IntegerNetwork, dict[str, Any]]:
    """Loads a network that `save` wrote.

    The file is data: nothing in it is executed, whoever wrote it.

    Returns:
        The network, and a dict of what is known about it: `input` (name, shape with -1 for the batch, dtype), `scheme`,
        `layers` (the grids per layer) and `facts`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a damaged file, one that `save` did not write, or one whose parts do not fit together.

    >>> import tempfile
    >>> from adderops.models import lenet5
    >>> from adderops.quant import calibrate, convert, reestimate_batchnorm
    >>> images = torch.randn(8, 1, 32, 32)
    >>> model = reestimate_batchnorm(lenet5(), [images]).eval()  # stands for training
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(convert(calibrate(model, [images]), images), images, f"{folder}/int8.safetensors")
    ...     integer, known = load(f"{folder}/int8.safetensors")
    >>> integer(images).shape, known["input"]["shape"]
    (torch.Size([8, 10]), [-1, 1, 32, 32])
    """
    path = os.fspath(path)
    if not os.path.exists(path):
        raise FileNotFoundError(f"{path}: no such file")
    try:
        check(os.path.isfile(path), "file", "a regular one", "another kind")
        with open(path, "rb") as file:
            document, tensors = _read(file, os.fstat(file.fileno()).st_size)
        facts = document.pop("facts")
        check(isinstance(facts, dict), "facts", "an object", facts)
        network = restore(document, tensors)
    except (ValueError, TypeError, KeyError, RuntimeError, MemoryError, OverflowError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path}: not a sound network of adderops.quant.save: {reason}") from error
    return network, {key: document[key] for key in ("input", "scheme", "layers")} | {"facts": facts}


def _read(file: BinaryIO, size: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Returns the document and the tensors, read whole and with the right checksum, otherwise unchecked."""
    prefix = file.read(8)
    if prefix[:4] == b"PK\3\4":
        raise ValueError(
            "expected safetensors, got a zip archive, as adderops wrote (*.pt2) before format 2; it can hold code and "
            "is not opened: quantize the trained network again"
        )
    length = int.from_bytes(prefix, "little")
    most = min(_LONGEST_HEADER, size - 8)
    check(len(prefix) == 8 and 0 < length <= most, "header", f"1 to {most} bytes", length)
    raw = file.read(length)
    header = _parsed(raw, "header")
    check(isinstance(header, dict), "header", "an object", header)
    metadata = header.pop("__metadata__", None)
    check(isinstance(metadata, dict) and metadata.keys() == {_KEY}, "header", f"the metadata {_KEY!r}", "other")
    check(isinstance(metadata[_KEY], str), f"metadata {_KEY}", "a text", metadata[_KEY])
    end = 0
    for name, entry in header.items():
        check_keys(f"tensor {name!r}", entry, {"dtype", "shape", "data_offsets"})
        dtype, places = entry["dtype"], entry["data_offsets"]
        check(isinstance(dtype, str) and dtype in _SIZES, f"tensor {name!r}", f"one of {', '.join(_SIZES)}", dtype)
        valid = isinstance(places, list) and len(places) == 2 and all(type(place) is int for place in places)
        check(valid and 0 <= places[0] <= places[1], f"tensor {name!r}", "two offsets", places)
        end = max(end, places[1])
    check(end == size - 8 - length, "tensors", f"{size - 8 - length} bytes", end)
    try:
        tensors = safetensors.torch.load(prefix + raw + file.read())
    except Exception as error:  # of types of its own
        raise ValueError(f"tensors: {error}") from error
    document = _parsed(metadata[_KEY], "graph")
    keys = {"format", "input", "nodes", "output", "scheme", "layers", "facts", "sha256"}
    check(isinstance(document, dict), "graph", "an object", document)
    check(document.get("format") == FORMAT, "format", str(FORMAT), document.get("format"))
    check_keys("graph", document, keys)
    claimed = document.pop("sha256")
    check(claimed == _checksum(document, tensors), "sha256", "that of the content", claimed)
    del document["format"]
    return document, tensors


def _parsed(text: str | bytes, what: str) -> Any:
    """Reads strict JSON: no duplicate key, no NaN, no unbounded depth."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        check(len(made) == len(pairs), what, "each key once", "one twice")
        return made

    def refuse(word: str) -> None:
        raise ValueError(f"{what}: expected finite numbers, got {word}")

    try:
        text = text.decode("utf-8") if isinstance(text, bytes) else text
        return json.loads(text, object_pairs_hook=once, parse_constant=refuse)
    except RecursionError:
        raise ValueError(f"{what}: expected JSON of some depth, got one without end") from None


def _json(document: Mapping[str, Any]) -> str:
    return json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _checksum(document: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(_json(document).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"\n{name} {str(tensor.dtype)} {list(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
