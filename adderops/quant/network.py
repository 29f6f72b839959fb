"""The integer network: what `convert` returns, and `load` reads from a file."""

import re
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule

from adderops.quant.checks import check, check_keys, invalid
from adderops.quant.graph import DTYPES, build, describe, tensors_of
from adderops.quant.grid import Grid
from adderops.quant.scheme import Scheme

_KEY = "adderops.quant"  # of `meta`: scheme and layers, as in a file, and shape and dtype of the input
_KNOWLEDGE = {"scheme", "layers"}


class IntegerNetwork(GraphModule):
    """A quantized network for inference with any batch size: its adder layers compute in uint8.

    `convert` and `load` return one. It maps images of the shape and dtype that it was converted for to what the
    original network returns. Its `graph` and `code` are readable; its buffers hold weights (uint8), scales and offsets
    under the names of the layers. It can be deep-copied, pickled (as data) and moved between devices, and computes the
    same in training and evaluation mode.

    Raises:
        TypeError: a conversion to another dtype, such as `half()`.

    >>> from adderops.models import lenet5
    >>> from adderops.quant import calibrate, convert, reestimate_batchnorm
    >>> images = torch.randn(8, 1, 32, 32)
    >>> model = reestimate_batchnorm(lenet5(), [images]).eval()  # stands for training
    >>> integer = convert(calibrate(model, [images]), images)
    >>> isinstance(integer, IntegerNetwork), integer(images).shape
    (True, torch.Size([8, 10]))
    """

    def __reduce__(self) -> tuple[Any, ...]:
        return restore, (document_of(self), tensors_of(self), self.training)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "IntegerNetwork":
        if fn(torch.empty(0)).dtype != torch.float32:
            raise TypeError("IntegerNetwork: expected to keep its dtypes (bytes, with scales in float32), got another")
        return super()._apply(fn, recurse)


def assemble(graph: Graph, tensors: Mapping[str, Tensor], knowledge: dict[str, Any]) -> IntegerNetwork:
    """Returns the network of a graph and its tensors by name; `knowledge` is described at `_KEY`."""
    network = IntegerNetwork({name: in_memory_format(tensor) for name, tensor in tensors.items()}, graph)
    network.meta[_KEY] = knowledge
    return network


def document_of(network: nn.Module) -> dict[str, Any]:
    """Returns a network without its tensors, as JSON holds it: `input`, `nodes`, `output`, `scheme`, `layers`.

    Raises:
        ValueError: not a network of `convert` or `load`, or one with operations that a file cannot hold.
    """
    knowledge = network.meta.get(_KEY) if isinstance(network, GraphModule) else None
    if not isinstance(network, GraphModule) or knowledge is None:
        raise ValueError("integer: expected what adderops.quant.convert returned, got another module")
    graph = describe(network, knowledge["shape"], knowledge["dtype"])
    return graph | {key: knowledge[key] for key in sorted(_KNOWLEDGE)}


def restore(document: dict[str, Any], tensors: Mapping[str, Tensor], training: bool = False) -> IntegerNetwork:
    """Builds a network from data: the inverse of `document_of`.

    Raises:
        ValueError: not the document of a network, or tensors that do not fit it.
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
    """Checks that every quantized layer has weights on its grids."""
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
            if weight is None:
                raise invalid(where, f"the weights of {part!r}", "none")
            if weight.dtype == torch.int8:
                continue  # a layer that multiplies
            check(weight.dtype == torch.uint8 and weight.numel() > 0, where, "bytes", weight.dtype)
            check(int(weight.max()) <= grid.quant_max, where, f"bytes up to {grid.quant_max}", int(weight.max()))


def in_memory_format(tensor: Tensor) -> Tensor:
    """Returns a copy as the operators read it: channels_last if it has four dimensions, otherwise contiguous."""
    last = torch.channels_last if tensor.dim() == 4 else torch.contiguous_format
    return torch.empty_like(tensor, memory_format=last).copy_(tensor)


def tensor_name(name: str) -> str:
    """Returns the name of a layer's tensor in the integer network: identifiers that are not attributes of a module."""
    parts = [re.sub(r"\W", "_", part, flags=re.ASCII) for part in name.split(".")]
    return ".".join(part + "_" if hasattr(_EMPTY, part) else part for part in parts)


_EMPTY = GraphModule({}, Graph())
# so that torch.load(weights_only=True) takes a pickled network; safe, because `restore` checks its arguments
torch.serialization.add_safe_globals([restore])
