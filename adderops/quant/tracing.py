"""Traces a calibrated model to a simple float graph: one tensor per node, no computed sizes, no containers."""

import copy
import operator
import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.fx import Graph, GraphModule, Node
from torch.fx.graph import CodeGen
from torch.fx.node import Argument
from torch.utils._pytree import TreeSpec, tree_leaves, tree_unflatten

from adderops.export import export_program
from adderops.quant.calibration import unwrapped
from adderops.quant.fake_quantized import Quantized

aten = torch.ops.aten
_SPLITS = (aten.split.Tensor, aten.split_with_sizes.default)
_NORM = aten._native_batch_norm_legit_no_training.default


def node_argument(node: Node, i: int) -> Node:
    """Returns argument i of a node, which must be a node, that is, a tensor."""
    argument = node.args[i]
    assert isinstance(argument, Node)
    return argument


def trace(model: nn.Module, example: Tensor) -> tuple[GraphModule, dict[str, Quantized]]:
    """Returns the graph of a calibrated model with unquantized layers, and its quantized layers by name in the graph.

    Raises:
        ValueError: the model does not take the example.
        Also what `torch.export.export` raises.
    """
    root = _replica(model)
    device = next((tensor.device for tensor in root.parameters()), example.device)
    with torch.autocast(device.type, enabled=False):
        images = example.detach().to(device, torch.float32)
        try:
            result = root(images)
        except (RuntimeError, ValueError, TypeError) as error:
            shape, reason = tuple(example.shape), (str(error) or type(error).__name__).splitlines()[0]
            raise ValueError(f"example: expected an input of the model, got shape {shape}: {reason}") from error
        _drop_watching_hooks(root, images, result)
        layers = _make_plain(root)
        program = export_program(root, images).run_decompositions({})  # nothing in place
    traced = program.module(check_guards=False)
    assert isinstance(traced, GraphModule) and program.call_spec.out_spec is not None
    _tidy(traced, program.call_spec.out_spec)
    return traced, layers


def _replica(model: nn.Module) -> nn.Module:
    """Returns a float32 copy of the model in evaluation mode, in a Sequential, so that it may itself be a layer."""
    kept = {id(t): t.detach().clone() for m in model.modules() for t in vars(m).values() if isinstance(t, Tensor)}
    # `kept`: deepcopy refuses tensors with a graph, which a hook may have stored in a module
    root = nn.Sequential(copy.deepcopy(model, kept)).eval().float()
    for module in root.modules():
        module._compiled_call_impl = None
    while wrapped := [name for name, module in root.named_modules() if unwrapped(module) is not module]:
        root.set_submodule(wrapped[0], unwrapped(root.get_submodule(wrapped[0])))
    return root


def _drop_watching_hooks(root: nn.Module, images: Tensor, result: Any) -> None:
    """Removes all hooks if the result does not depend on them: they would see tensors of the trace, without values."""
    hooks = [hooks for m in root.modules() for hooks in (m._forward_hooks, m._forward_pre_hooks) if hooks]
    kept = [dict(some) for some in hooks]
    for some in hooks:
        some.clear()
    pairs = zip(tree_leaves(root(images)), tree_leaves(result), strict=True) if hooks else ()
    if not all(a is b or (isinstance(a, Tensor) and torch.equal(a, b)) for a, b in pairs):
        for some, before in zip(hooks, kept, strict=True):
            some.update(before)


def _make_plain(root: nn.Module) -> dict[str, Quantized]:
    """Replaces the quantized layers of a model by ordinary ones, and returns them under all of their names."""
    names: dict[Quantized, list[str]] = {}
    for name, module in root.named_modules(remove_duplicate=False):
        if isinstance(module, Quantized):
            names.setdefault(module, []).append(name)
    for layer, known_as in names.items():
        plain = layer.plain()
        for name in known_as:
            root.set_submodule(name, plain)
    return {name: layer for layer, known_as in names.items() for name in known_as if not layer.in_floats}


def _tidy(traced: GraphModule, out_spec: TreeSpec) -> None:
    """Simplifies the graph of an exported program in place; it computes the same values.

    Each node gets `meta['layer']`, the name of the layer that it came from.
    """
    graph = traced.graph
    graph.set_codegen(CodeGen())
    for node in list(graph.nodes):
        node.meta["layer"] = _layer_of(node)
        if node.op == "output":
            [results] = node.args
            assert isinstance(results, (tuple, list))
            node.args = (_plain(tree_unflatten(list(results), out_spec)),)
        elif node.target == aten._assert_tensor_metadata.default:
            graph.erase_node(node)
        elif node.target == operator.getitem:
            _replace_item(graph, node)
        elif node.target == aten.slice.Tensor:
            _replace_slice(node)
        elif node.target in (aten.view.default, aten.reshape.default, aten.expand.default):
            # the trace saw contiguous tensors; uint8 activations are channels_last, where `view` may fail
            node.target = aten.reshape.default if node.target == aten.view.default else node.target
            _name_sizes(node)
        elif node.target == aten._to_copy.default and node.kwargs.keys() == {"dtype"}:
            node.target, node.args, node.kwargs = aten.to.dtype, (node.args[0], node.kwargs["dtype"]), {}
    graph.eliminate_dead_code()


def _layer_of(node: Node) -> str | None:
    """Returns the name of the module in whose forward the node was traced, without the Sequential of `_replica`."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return None
    path = list(stack.values())[-1][0]
    return path.removeprefix("L['self'].").removeprefix("0").removeprefix(".")


def _plain(value: Any) -> Any:
    """Returns the outputs in plain tuples and dicts."""
    if isinstance(value, (list, tuple)):
        return tuple(_plain(item) for item in value)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if not isinstance(value, Node):
        raise ValueError(f"model: expected to return tensors, in tuples or dicts, got {type(value).__name__}")
    return value


def _replace_item(graph: Graph, node: Node) -> None:
    """Replaces an item of an operator with several results by an operator with one."""
    source, (_, i) = node_argument(node, 0), node.args
    assert isinstance(i, int)
    x, *rest = source.args
    new: tuple[OpOverload, tuple[Argument, ...]] | None = None
    if source.target in _SPLITS:
        dim = rest[1] if len(rest) > 1 else source.kwargs.get("dim", 0)
        sizes = [value.shape[dim] for value in source.meta["val"]]
        if all(isinstance(size, int) for size in sizes):
            new = aten.slice.Tensor, (x, dim, sum(sizes[:i]), sum(sizes[: i + 1]))
    elif source.target == aten.unbind.int:
        new = aten.select.int, (x, *(rest or (0,)), i)
    elif source.target == _NORM and i == 0:
        weight, bias, mean, variance, momentum, eps = rest
        new = aten.batch_norm.default, (x, weight, bias, mean, variance, False, momentum, eps, False)
    if new is not None:
        with graph.inserting_before(node):
            made = graph.call_function(*new)
        made.meta = dict(node.meta)
        node.replace_all_uses_with(made)
        graph.erase_node(node)


def _replace_slice(node: Node) -> None:
    """Replaces x[:] by x, and an end of sys.maxsize by None."""
    x = node_argument(node, 0)
    arguments: list[Argument] = [*node.args, *[None] * (5 - len(node.args))]
    dim, start, end, step = arguments[1:]
    if isinstance(end, int) and end == sys.maxsize:
        end = None
    if not start and end is None and step in (None, 1):
        node.replace_all_uses_with(x)
    else:
        node.args = (x, dim or 0, start, end, 1 if step is None else step)


def _name_sizes(node: Node) -> None:
    """Replaces the size of the batch by -1: the remaining size in `reshape`, the unchanged size in `expand`."""
    shape = node.meta["val"].shape
    following = [i for i, size in enumerate(shape) if not isinstance(size, int)]
    source = node_argument(node, 0).meta["val"].shape
    if following == [0] and (node.target != aten.expand.default or not isinstance(source[0], int)):
        node.args = (node.args[0], [-1, *shape[1:]], *node.args[2:])
    elif not following:
        node.args = (node.args[0], list(shape), *node.args[2:])
