"""The graph of an integer network as data: JSON with a closed list of operations, checked before it becomes a graph.

    {"input": {"name": "input", "shape": [-1, 3, 32, 32], "dtype": "float32"},
     "nodes": [{"name": "relu", "op": "relu", "layer": "stem", "inputs": {"input": "conv2d"}, "attributes": {},
                "shape": [-1, 16, 32, 32], "dtype": "float32"}, ...],
     "output": "linear"}

Nodes are in the order of computation. An input is the name of an earlier node, of the network's input or of a tensor; a
list of names for `cat` and `stack`; null if omitted. An attribute is a number, a boolean, a list of numbers or one of a
few words. -1 in a shape is the batch, which is always the first dimension. The names of inputs and attributes are those
of PyTorch's operators (`self` is called `input`).
"""

import math
import re
from collections.abc import Callable, Mapping
from functools import partial
from itertools import count
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Graph, GraphModule, Node

from adderops import _ops
from adderops.quant.checks import ARGUMENTS, INDICES, LEAST, MOST, check, check_keys, invalid

aten = torch.ops.aten

_SIMPLE = "abs amax avg_pool2d batch_norm cat clamp clamp_min clone contiguous conv1d conv2d elu exp gelu group_norm"
_SIMPLE += " hardsigmoid hardswish hardtanh index_select layer_norm leaky_relu linear matmul max_pool2d maximum minimum"
_SIMPLE += " mish neg pad permute pixel_shuffle prelu relu relu6 reshape round sigmoid silu softplus sqrt squeeze stack"
_SIMPLE += " take tanh unsqueeze adaptive_avg_pool2d channel_shuffle"
OPERATIONS: dict[str, OpOverload] = {
    "adder_conv2d_int8": _ops.adder_conv2d_int8,
    "quantize": _ops.quantize,
    "adder_conv2d": _ops.adder_conv2d,
    "add": aten.add.Tensor,
    "sub": aten.sub.Tensor,
    "rsub": aten.rsub.Scalar,
    "mul": aten.mul.Tensor,
    "div": aten.div.Tensor,
    "pow": aten.pow.Tensor_Scalar,
    "conv2d_same": aten.conv2d.padding,
    "conv_transpose2d": aten.conv_transpose2d.input,
    "log_softmax": aten.log_softmax.int,
    "mean": aten.mean.dim,
    "select": aten.select.int,
    "slice": aten.slice.Tensor,
    "softmax": aten.softmax.int,
    "squeeze_dim": aten.squeeze.dim,
    "sum": aten.sum.dim_IntList,
    "to": aten.to.dtype,
    "transpose": aten.transpose.int,
    "upsample_bilinear2d": aten.upsample_bilinear2d.vec,
    "upsample_nearest2d": aten.upsample_nearest2d.vec,
} | {name: getattr(aten, name).default for name in _SIMPLE.split()}
_NAMES = {function: name for name, function in OPERATIONS.items()}
_WITH_NUMBERS = {"add", "sub", "mul", "div"}  # whose second operand may be a number

DTYPES = {str(t).removeprefix("torch."): t for t in (torch.uint8, torch.int8, torch.int64, torch.float32)}
INPUT_DTYPES = {str(t).removeprefix("torch."): t for t in (torch.float32, torch.bfloat16, torch.float16, torch.float64)}
_DTYPES_OF_NODES = DTYPES | INPUT_DTYPES | {"int32": torch.int32}
_FORMATS = {
    "contiguous": torch.contiguous_format,
    "channels_last": torch.channels_last,
    "preserve": torch.preserve_format,
}
_WORDS = ("same", "valid", "none", "tanh", "constant", "reflect", "replicate", "circular")

MOST_VALUES = 2**28  # per node and image
_BATCHES = (5, 7)  # batch sizes to try: a dimension that changes with them is the batch
TENSOR_NAME = re.compile(r"\w+(\.\w+)*", re.ASCII)
_NODE_NAME = re.compile(r"[A-Za-z_]\w*", re.ASCII)


# --- from a graph to data ---


def tensors_of(network: GraphModule) -> dict[str, Tensor]:
    """Returns the tensors that the graph of a network reads, by name."""
    names = sorted({str(node.target) for node in network.graph.nodes if node.op == "get_attr"})
    return {name: attrgetter(name)(network).detach() for name in names}


def describe(network: GraphModule, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Any]:
    """Returns input, nodes and output of a network whose input has this shape per image.

    Raises:
        ValueError: an operation that is not in the closed list, with name and layer of the node.
    """
    tensors = tensors_of(network)
    names: dict[Node, str] = {}
    taken = set(tensors)
    document: dict[str, Any] = {"nodes": []}

    def new_name(stem: str) -> str:
        name = next(name for i in count() if (name := f"{stem}_{i}" if i else stem) not in taken)
        taken.add(name)
        return name

    for node in network.graph.nodes:
        if node.op == "get_attr":
            names[node] = str(node.target)
        elif node.op == "placeholder":
            check("input" not in document, "network", "one input", "more")
            names[node] = new_name("input")
            document["input"] = {"name": names[node], "shape": [-1, *shape], "dtype": _word(dtype, INPUT_DTYPES)}
        elif node.op == "output":
            document["output"] = _output(node.args[0], names.__getitem__)
        else:
            entry = _entry(node, names)
            names[node] = entry["name"] = new_name(entry["op"])
            document["nodes"].append(entry)
    build(document, tensors, declare=True)
    return document


def _entry(node: Node, names: Mapping[Node, str]) -> dict[str, Any]:
    layer = node.meta.get("layer")
    where = f"node {node.name!r}" + (f" of layer {layer!r}" if layer else "")
    if not isinstance(node.target, OpOverload) or node.target not in _NAMES:
        raise invalid(where, "an operation of the closed list (docs/int8.md)", str(node.target))
    schema = node.target._schema.arguments
    positional = [a for a in schema if not a.kwarg_only]
    given = {a.name: value for a, value in zip(positional, node.args, strict=False)} | node.kwargs
    inputs, attributes = {}, {}
    for argument in schema:
        value = given.get(argument.name, argument.default_value)
        name = "input" if argument.name == "self" else argument.name
        if "Tensor" in str(argument.real_type) and not isinstance(value, (int, float)):
            inputs[name] = _output(value, names.__getitem__) if value is not None else None
        elif value is not None:
            attributes[name] = _attribute(value, f"{where}: {name}")
    if attributes.get("stride") == [] and "kernel_size" in attributes:
        attributes["stride"] = attributes["kernel_size"]
    return {"op": _NAMES[node.target], "layer": layer, "inputs": inputs, "attributes": attributes}


def _attribute(value: object, where: str) -> Any:
    if isinstance(value, torch.dtype):
        return _word(value, _DTYPES_OF_NODES)
    if isinstance(value, torch.memory_format):
        return _word(value, _FORMATS)
    if isinstance(value, (list, tuple)):
        return [_attribute(item, where) for item in value]
    check(isinstance(value, (bool, int, float, str)), where, "a number, not one that depends on the batch", value)
    return value


def _word(value: object, words: Mapping[str, object]) -> str:
    for word, meaning in words.items():
        if meaning == value:
            return word
    raise ValueError(f"network: expected {', '.join(words)}, got {value}")


def _output(value: Any, of: Callable[[Any], Any]) -> Any:
    """Maps a structure of nodes to one of names, or vice versa."""
    if isinstance(value, (list, tuple)):
        return [_output(item, of) for item in value]
    if isinstance(value, dict):
        return {str(key): _output(item, of) for key, item in value.items()}
    check(isinstance(value, (Node, str)), "output", "tensors in tuples and dicts", type(value).__name__)
    return of(value)


# --- from data to a graph ---


@torch.no_grad()
def build(document: dict[str, Any], tensors: Mapping[str, Tensor], *, declare: bool = False) -> Graph:
    """Returns the graph of a document, after a trial of each node on the meta device.

    Args:
        document: input, nodes and output; not trusted.
        tensors: the tensors that the nodes read, by name.
        declare: write shape and dtype into each node instead of comparing them.

    Raises:
        ValueError: not the document of a graph, or a graph that cannot run with every batch size.
    """
    graph, source = Graph(), document["input"]
    check_keys("input", source, {"name", "shape", "dtype"})
    check(isinstance(source["dtype"], str), "input: dtype", "a word", source["dtype"])
    check(source["dtype"] in INPUT_DTYPES, "input: dtype", f"one of {', '.join(INPUT_DTYPES)}", source["dtype"])
    shape = source["shape"]
    valid = isinstance(shape, list) and len(shape) > 1 and all(_is_int(size) for size in shape)
    check(valid and shape[0] == -1 and all(size > 0 for size in shape[1:]), "input: shape", "[-1, C, ...]", shape)
    check(math.prod(shape[1:]) <= MOST_VALUES, "input: shape", f"at most {MOST_VALUES} values per image", shape)

    unread = set(tensors)
    nodes: dict[str, Node] = {}
    probes: dict[str, list[Tensor]] = {}  # by name: one value on the meta device per batch size
    for name, tensor in tensors.items():
        check(TENSOR_NAME.fullmatch(name) is not None, "tensor", "names joined by dots", name)
        probes[name] = [tensor.to("meta")] * len(_BATCHES)

    def named(name: Any, where: str) -> str:
        check(isinstance(name, str) and _NODE_NAME.fullmatch(name) is not None, where, "an identifier", name)
        check(name not in probes, where, "a name that nothing else has", name)
        return name

    def probe_of(k: int, name: str) -> Tensor:
        check(name in probes, "input", "the name of an earlier value", name)
        return probes[name][k]

    def node_of(name: str) -> Node:
        check(name in probes, "output", "the name of a value", name)
        if name not in nodes:
            nodes[name] = graph.get_attr(name)
            unread.discard(name)
        return nodes[name]

    name = named(source["name"], "input: name")
    nodes[name] = graph.placeholder(name)
    dtype = INPUT_DTYPES[source["dtype"]]
    probes[name] = [torch.empty((batch, *shape[1:]), dtype=dtype, device="meta") for batch in _BATCHES]

    check(isinstance(document["nodes"], list), "nodes", "a list", document["nodes"])
    for i, entry in enumerate(document["nodes"]):
        declared = set() if declare else {"shape", "dtype"}
        check_keys(f"nodes[{i}]", entry, {"name", "op", "layer", "inputs", "attributes"} | declared)
        name = named(entry["name"], f"nodes[{i}]: name")
        where = f"node {name!r}"
        op, layer = entry["op"], entry["layer"]
        check(isinstance(op, str) and op in OPERATIONS, f"{where}: op", "an operation of the closed list", op)
        check(layer is None or isinstance(layer, str), f"{where}: layer", "a name or null", layer)
        arguments = _arguments(entry, where)
        made = []
        for k in range(len(_BATCHES)):
            values = [_replaced(kind, value, partial(probe_of, k)) for kind, value in arguments]
            if k == 0 and op in ARGUMENTS:
                ARGUMENTS[op](where, *values)
            made.append(_tried(op, values, where))
        if op in INDICES:
            INDICES[op](where, entry, tensors, document["nodes"][:i])
        found = _shape(made, where), _word(made[0].dtype, _DTYPES_OF_NODES)
        if declare:
            entry["shape"], entry["dtype"] = found
        check(entry["shape"] == found[0], f"{where}: shape", str(found[0]), entry["shape"])
        check(entry["dtype"] == found[1], f"{where}: dtype", found[1], entry["dtype"])
        values = [_replaced(kind, value, node_of) for kind, value in arguments]
        nodes[name] = graph.create_node("call_function", OPERATIONS[op], *_split(op, values), name=name)
        nodes[name].meta["layer"] = layer
        probes[name] = made
    check("output" in document, "output", "names", None)
    graph.output(_tuples(_output(document["output"], node_of)))
    check(not unread, "tensors", "no more than the nodes read", ", ".join(sorted(unread)))
    return graph


def _is_int(value: object) -> bool:
    return type(value) is int and -MOST <= value <= MOST


def _is_number(value: object) -> bool:
    return _is_int(value) or (type(value) is float and abs(value) <= torch.finfo(torch.float32).max)


_KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "int": ("an integer", _is_int),
    "float": ("a number of float32", _is_number),
    "number": ("a number of float32", _is_number),
    "bool": ("true or false", lambda value: type(value) is bool),
    "str": (f"one of {', '.join(_WORDS)}", lambda value: isinstance(value, str) and value in _WORDS),
    "ScalarType": ("a dtype", lambda value: isinstance(value, str) and value in _DTYPES_OF_NODES),
    "MemoryFormat": ("a memory format", lambda value: isinstance(value, str) and value in _FORMATS),
}


def _arguments(entry: dict[str, Any], where: str) -> list[tuple[str, Any]]:
    """Returns the arguments of a node in the order of its operator: (kind, value), tensors by name."""
    inputs, attributes = entry["inputs"], entry["attributes"]
    check(isinstance(inputs, dict), f"{where}: inputs", "an object", inputs)
    check(isinstance(attributes, dict), f"{where}: attributes", "an object", attributes)
    rest = {**inputs, **attributes}
    check(len(rest) == len(inputs) + len(attributes), where, "inputs and attributes of different names", list(inputs))
    arguments = []
    for argument in OPERATIONS[entry["op"]]._schema.arguments:
        name = "input" if argument.name == "self" else argument.name
        kind = str(argument.real_type)
        at = f"{where}: {name}"
        if name not in rest:
            check(argument.has_default_value() or kind.startswith("Optional"), at, "a value", "none")
            arguments.append(("default", argument.default_value))
            continue
        value = rest.pop(name)
        optional = kind.startswith("Optional")
        kind = kind.removeprefix("Optional[").removesuffix("]") if optional else kind
        if value is None:
            check(optional, at, "a value", None)
            kind = "default"
        elif "Tensor" in kind:
            if name in attributes:
                check(entry["op"] in _WITH_NUMBERS and _is_number(value), at, "a name among the inputs", value)
                kind = "number"
            elif kind == "List[Tensor]":
                valid = isinstance(value, list) and 0 < len(value) <= 4096
                check(valid and all(isinstance(item, str) for item in value), at, "a list of names", value)
            else:
                check(isinstance(value, str), at, "a name", value)
        else:
            check(name in attributes, at, "an attribute", "an input")
            value = _meaning(kind, value, at)
            numbers = value if isinstance(value, list) else [value] if name in LEAST and kind != "str" else []
            valid = name not in LEAST or all(number >= LEAST[name] for number in numbers)
            check(valid, at, f"at least {LEAST.get(name)}", value)
        arguments.append((kind, value))
    check(not rest, where, f"inputs and attributes of {entry['op']}", ", ".join(rest))
    return arguments


def _meaning(kind: str, value: Any, where: str) -> Any:
    """Returns the value of an attribute, given its type in PyTorch's schema."""
    if kind.startswith("List["):
        kind = kind.removeprefix("List[").removesuffix("]")
        check(isinstance(value, list) and len(value) <= 16, where, "a list", value)
        return [_meaning(kind, item, where) for item in value]
    expected, valid = _KINDS[kind]
    check(valid(value), where, expected, value)
    return _DTYPES_OF_NODES[value] if kind == "ScalarType" else _FORMATS[value] if kind == "MemoryFormat" else value


def _replaced(kind: str, value: Any, of: Callable[[str], Any]) -> Any:
    if "Tensor" not in kind:
        return value
    return [of(item) for item in value] if isinstance(value, list) else of(value)


def _split(op: str, values: list[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Returns positional and keyword arguments."""
    arguments = OPERATIONS[op]._schema.arguments
    positional = [value for argument, value in zip(arguments, values, strict=True) if not argument.kwarg_only]
    named = {argument.name: value for argument, value in zip(arguments, values, strict=True) if argument.kwarg_only}
    return tuple(positional), named


def _tried(op: str, values: list[Any], where: str) -> Tensor:
    positional, named = _split(op, values)
    try:
        made = OPERATIONS[op](*positional, **named)
    except Exception as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{where}: expected arguments that {op} takes, got others ({first[:200]})") from error
    check(isinstance(made, Tensor), where, "a tensor", type(made).__name__)
    return made


def _shape(made: list[Tensor], where: str) -> list[int]:
    first, second = (list(value.shape) for value in made)
    following = [i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b]
    valid = len(first) == len(second) and following in ([], [0])
    valid = valid and (not following or (first[0], second[0]) == _BATCHES)
    check(valid, f"{where}: shape", "the batch as its first dimension", f"{first} of a batch of {_BATCHES[0]}")
    values = math.prod(first[1:]) if following else math.prod(first)
    check(values <= MOST_VALUES, f"{where}: shape", f"at most {MOST_VALUES} values per image", first)
    return [-1, *first[1:]] if following else first


def _tuples(value: Any) -> Any:
    """Returns the output of a graph, with tuples for lists."""
    if isinstance(value, list):
        return tuple(_tuples(item) for item in value)
    return {key: _tuples(item) for key, item in value.items()} if isinstance(value, dict) else value
