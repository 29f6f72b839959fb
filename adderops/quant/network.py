"""The integer network as an object: what `convert` returns and `load` reads."""

import re
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule

from adderops.quant.checks import check, check_keys
from adderops.quant.graph import DTYPES, build, describe, tensors_of
from adderops.quant.grid import Grid
from adderops.quant.scheme import Scheme

_KEY = "adderops.quant"  # of what a network knows of itself, in `meta`
_KNOWLEDGE = {"scheme", "layers"}


class IntegerNetwork(GraphModule):
    """A network whose adder layers compute in bytes, for inference with any batch size.

    Its `graph` and `code` are readable, its buffers are the bytes of the weights with scale and offset, under the names
    of the layers.  It deep-copies, pickles as data, moves between devices, and is the same in training and evaluation.
    Made by `convert` and `load`.
    """

    def __reduce__(self):
        return restore, (document_of(self), tensors_of(self), self.training)

    def _apply(self, fn, recurse=True):
        if fn(torch.empty(0)).dtype != torch.float32:
            raise TypeError("IntegerNetwork: expected to keep its dtypes (bytes, with scales in float32), got another")
        return super()._apply(fn, recurse)


def assemble(graph: Graph, tensors: Mapping[str, Tensor], knowledge: dict[str, Any]) -> IntegerNetwork:
    """The network of a graph, its tensors by name, and what `document_of` adds to them."""
    network = IntegerNetwork({name: in_memory_format(tensor) for name, tensor in tensors.items()}, graph)
    network.meta[_KEY] = knowledge
    return network


def document_of(network: nn.Module) -> dict[str, Any]:
    """The network but for its tensors as JSON holds it: `input`, `nodes`, `output`, `scheme`, `layers`.

    Raises:
        ValueError: not a network of `convert` or `load`, or one with operations that have no place in a file.
    """
    knowledge = network.meta.get(_KEY) if isinstance(network, GraphModule) else None
    if knowledge is None:
        raise ValueError("integer: expected what adderops.quant.convert returned, got another module")
    graph = describe(network, knowledge["shape"], knowledge["dtype"])
    return graph | {key: knowledge[key] for key in sorted(_KNOWLEDGE)}


def restore(document: dict[str, Any], tensors: Mapping[str, Tensor], training: bool = False) -> IntegerNetwork:
    """Makes a network of data: the inverse of `document_of`.

    Raises:
        ValueError: the document of no network, or tensors that do not fit it.
    """
    check_keys("document", document, {"input", "nodes", "output"} | _KNOWLEDGE)
    for name, tensor in tensors.items():
        check(tensor.dtype in DTYPES.values(), name, f"one of {', '.join(DTYPES)}", tensor.dtype)
        finite = not tensor.is_floating_point() or bool(tensor.isfinite().all())
        check(finite, name, "finite numbers", "NaN or infinity")
        taken = [part for part in name.split(".") if hasattr(_EMPTY, part)]
        check(not taken, "tensor", "a name that is no attribute of a module", name)
    graph = build(document, tensors)
    _check_layers(document["scheme"], document["layers"], tensors)
    shape, dtype = document["input"]["shape"][1:], getattr(torch, document["input"]["dtype"])
    knowledge = {key: document[key] for key in _KNOWLEDGE} | {"shape": tuple(shape), "dtype": dtype}
    return assemble(graph, tensors, knowledge).train(training)


def _check_layers(scheme: Any, layers: Any, tensors: Mapping[str, Tensor]) -> None:
    """Every quantized layer has the weights that its grids speak of."""
    check_keys("scheme", scheme, {field.name for field in fields(Scheme)})
    Scheme(**scheme)
    check(isinstance(layers, dict), "layers", "an object", layers)
    for name, grids in layers.items():
        check(isinstance(grids, list) and 0 < len(grids) <= 256, f"layers: {name}", "a list of grids", grids)
        for i, values in enumerate(grids):
            where, part = f"layers: {name}", f"{name}.group{i}" if len(grids) > 1 else name
            check_keys(where, values, {field.name for field in fields(Grid)})
            grid = Grid(**values)
            check(type(grid.bits) is int and 2 <= grid.bits <= 8, f"{where}: bits", "2 to 8", grid.bits)
            valid = type(grid.zero_point) is int and 0 <= grid.zero_point <= grid.quant_max
            check(valid, f"{where}: zero_point", f"0 to {grid.quant_max}", grid.zero_point)
            valid = type(grid.scale) is float and 0 < grid.scale < float("inf")
            check(valid, f"{where}: scale", "a positive number", grid.scale)
            weight = tensors.get(f"{part}.weight" if part else "weight")
            check(weight is not None, where, f"the weights of {part!r}", "none")
            if weight.dtype == torch.int8:
                continue  # of a layer that multiplies
            check(weight.dtype == torch.uint8 and weight.numel() > 0, where, "bytes", weight.dtype)
            check(int(weight.max()) <= grid.quant_max, where, f"bytes up to {grid.quant_max}", int(weight.max()))


def in_memory_format(tensor: Tensor) -> Tensor:
    """As the operators read it: what has four dimensions channels last, the rest contiguous."""
    last = torch.channels_last if tensor.dim() == 4 else torch.contiguous_format
    return torch.empty_like(tensor, memory_format=last).copy_(tensor)


def tensor_name(name: str) -> str:
    """The name of a layer's tensor in the integer network: identifiers that are no attributes of a module."""
    parts = [re.sub(r"\W", "_", part, flags=re.ASCII) for part in name.split(".")]
    return ".".join(part + "_" if hasattr(_EMPTY, part) else part for part in parts)


_EMPTY = GraphModule({}, Graph())
torch.serialization.add_safe_globals([restore])  # which checks what it is given: torch.load(weights_only=True) does
