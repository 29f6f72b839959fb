"""What a run records about its image set (data.json): names, size, normalization, and checksums to recognize it by."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from adderops.distill.data.images import Items, shown

# Type of each fact. `classes` is None if the set does not name them; `checksums` has an entry for what can be summed.
FACTS = {"name": str, "channels": int, "side": int, "num_classes": int, "mean": list, "std": list}
FACTS |= {"train_images": int, "test_images": int, "held_out": bool, "checksums": dict}


def checksums(part: str, items: Items, labels: Tensor) -> dict[str, str]:
    """Returns SHA-256 of the labels of a part, and of its pixels if they are in memory, else of its file names.

    >>> sums = checksums("test", TensorDataset(torch.zeros(1, 1, 2, 2)), torch.tensor([3]))
    >>> sums.keys()
    dict_keys(['test labels', 'test pixels'])
    """
    found = {f"{part} labels": _sha256(labels.numpy())}
    if isinstance(items, TensorDataset):
        found[f"{part} pixels"] = _sha256(items.tensors[0].contiguous().numpy())
    else:
        names = "\0".join(str(Path(path).relative_to(items.root)) for path, _ in items.samples)
        found[f"{part} file names"] = _sha256(names.encode(errors="surrogateescape"))
    return found


def _sha256(content: Any) -> str:
    return hashlib.sha256(content).hexdigest()


def read_facts(path: Path) -> dict[str, Any]:
    """Reads data.json.

    Raises:
        ValueError: a damaged file.
    """
    try:
        facts = json.loads(path.read_text())
        if not isinstance(facts, dict):
            raise ValueError(f"got {type(facts).__name__} instead of names and values")
        check_facts(facts)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected a data set as this program writes it ({error})") from error
    return facts


def check_facts(facts: dict[str, Any]) -> None:
    """Raises ValueError if the facts do not have the form that `Data.facts` gives them."""
    for name, kind in FACTS.items():
        if type(facts.get(name)) is not kind:
            raise ValueError(f"{name}: expected {kind.__name__}, got {type(facts.get(name)).__name__}")
    if not 1 <= facts["channels"] <= 4 or not 1 <= facts["side"] <= 2**16:
        raise ValueError(f"expected channels and side of images, got {facts['channels']} and {facts['side']}")
    for name, length in (("mean", facts["channels"]), ("std", facts["channels"])):
        if len(facts[name]) != length or not all(type(x) is float and 0 <= x <= 1 for x in facts[name]):
            raise ValueError(f"{name}: expected {length} numbers from 0 to 1, got {facts[name]}")
    if not all(isinstance(value, str) for value in facts["checksums"].values()):
        raise ValueError("checksums: expected strings, got others")
    if "classes" not in facts:
        raise ValueError("classes: expected names or null, got nothing")
    classes = facts["classes"]
    if classes is not None and (
        type(classes) is not list
        or len(set(map(str, classes))) != facts["num_classes"]
        or not all(isinstance(name, str) for name in classes)
    ):
        raise ValueError(f"classes: expected {facts['num_classes']} names, got {str(classes)[:100]}")


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Returns in words how a new set differs from the old one.

    >>> facts = {"name": "cats", "classes": ["a", "b"], "checksums": {}}
    >>> differences(facts, {**facts, "name": "dogs", "classes": ["b", "a"]})
    ['classes a, b -> b, a']
    """
    found = []
    if old.get("classes") != new.get("classes"):
        found.append(f"classes {_named(old)} -> {_named(new)}")
    for name in ("num_classes", "channels", "side", "train_images", "test_images"):
        if old.get(name) != new.get(name):
            found.append(f"{name.replace('_', ' ')} {old.get(name)} -> {new.get(name)}")
    theirs, ours = old["checksums"], new["checksums"]
    return found + [f"other {name}" for name in theirs if name in ours and theirs[name] != ours[name]]


def _named(facts: dict[str, Any]) -> str:
    return "without names" if facts.get("classes") is None else shown(facts["classes"])


def numbers_of(names: Sequence[str], numbering: Sequence[str]) -> Tensor:
    """Returns the index of each name in `numbering`.

    Raises:
        ValueError: names that `numbering` does not have; the message lists them.

    >>> numbers_of(["day", "night"], numbering=["night", "day"])
    tensor([1, 0])
    """
    unknown = [name for name in names if name not in numbering]
    if unknown:
        raise ValueError(f"expected classes among {shown(numbering)}, got unknown ones: {shown(unknown)}")
    return torch.tensor([list(numbering).index(name) for name in names])
