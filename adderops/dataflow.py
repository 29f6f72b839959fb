"""Finds what comes before and after each convolution of a model, from its graph if torch.fx can trace it."""

import copy
import inspect
from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from adderops.optim import AdaptiveRateLayer

# These subtract a mean.  A frozen BatchNorm is not among them: its statistics belong to other weights.
_NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm)
_NORM_FUNCTIONS = (F.batch_norm, F.instance_norm, F.group_norm, F.layer_norm)
_WEIGHTED = (_ConvNd, nn.Linear, AdaptiveRateLayer)
_WEIGHTED_FUNCTIONS = (F.linear, F.conv1d, F.conv2d, F.conv3d, torch.matmul, torch.bmm, torch.einsum)
# These pass the values of a channel on to the normalisation unchanged, or a mean or maximum of them.
_PASSING = (
    *(nn.Identity, nn.Flatten, nn.Unflatten, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d),
    *(nn.Dropout, nn.Dropout2d, nn.ChannelShuffle, nn.PixelShuffle, nn.PixelUnshuffle, nn.Upsample, nn.ZeroPad2d),
)
_PASSING_NAMES = frozenset(
    "cat concat getitem getattr chunk split view reshape flatten unflatten permute transpose contiguous to float half "
    "dropout max_pool2d avg_pool2d adaptive_avg_pool2d interpolate pad pixel_shuffle unsqueeze squeeze".split()
)
_SIZE_NAMES = frozenset(("size", "dim", "shape", "ndim", "dtype", "device"))
_GATES = (nn.Sigmoid, nn.Hardsigmoid, nn.Tanh, nn.Softmax)
_GATE_NAMES = frozenset(("sigmoid", "sigmoid_", "hardsigmoid", "hard_sigmoid", "tanh", "softmax"))


def reasons_to_stay(model: nn.Module) -> dict[nn.Module, str | None]:
    """Returns for each convolution of a model why it should not become an adder layer, or None if it should.

    An adder layer needs a normalisation after it, because its outputs are all <= 0 and large: a gate would stay
    closed, and the output of a head would have one sign. The first convolution and the classifier stay, as in
    AdderNet. If torch.fx cannot trace the whole model, it traces the parts that it can, and the order of registration
    decides on the rest.

    >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))
    >>> [reason for reason in reasons_to_stay(model).values()]
    ['first convolution', None, 'classifier']
    """
    weighted = [m for m in model.modules() if isinstance(m, _WEIGHTED)]
    reasons: dict[nn.Module, str | None] = {m: "not used by forward" for m in weighted if isinstance(m, _ConvNd)}
    if reasons:
        shadow, original = _structure(model)
        examination = _Examination(reasons, original)
        examination.examine(shadow, whole=True)
        ends = {next(iter(reasons)): "first convolution"}
        if weighted[-1] in reasons:
            ends.setdefault(weighted[-1], "classifier")
        reasons |= {conv: reason for conv, reason in ends.items() if conv not in examination.within_whole}
    return reasons


def _structure(model: nn.Module) -> tuple[nn.Module, dict[nn.Module, nn.Module]]:
    """Returns a copy in training mode that shares all tensors, for tracing, and the module that each part copies."""
    memo = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    try:
        shadow = copy.deepcopy(model, memo)
    except Exception:  # something in it cannot be copied
        shadow = model
    original = dict(zip(shadow.modules(), model.modules(), strict=True))
    return (shadow if shadow is model else shadow.train()), original


class _Tracer(fx.Tracer):
    """Keeps a module as one node if the rule knows it, or if it cannot be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.closed: list[nn.Module] = []

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return super().is_leaf_module(module, name) or isinstance(module, (*_NORMS, *_WEIGHTED))

    def call_module(
        self, module: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if self.is_leaf_module(module, self.path_of_module(module)):
            return super().call_module(module, forward, args, kwargs)
        last = next(reversed(self.graph.nodes), None)
        closed = len(self.closed)
        try:
            return super().call_module(module, forward, args, kwargs)
        except Exception:
            del self.closed[closed:]
            for node in reversed(self.graph.nodes):
                if node is last:
                    break
                self.graph.erase_node(node)
            self.closed.append(module)
            return self.create_proxy("call_module", self.path_of_module(module), args, kwargs)


def _trace(module: nn.Module) -> tuple[fx.Graph, list[nn.Module]] | None:
    """Returns the graph of a module and the submodules that cannot be traced; None if its own forward cannot."""
    try:
        parameters = inspect.signature(module.forward).parameters.values()
        defaults = {p.name: p.default for p in parameters if p.default is None or isinstance(p.default, bool)}
        tracer = _Tracer()
        return tracer.trace(module, concrete_args=defaults or None), tracer.closed
    except Exception:  # a forward may raise anything when called with proxies
        return None


class _Examination:
    """Collects the reason to stay, or None, of each convolution of a model."""

    def __init__(self, reasons: dict[nn.Module, str | None], original: dict[nn.Module, nn.Module]) -> None:
        self.reasons, self.original = reasons, original
        self.within_whole: set[nn.Module] = set()  # convolutions in the graph of the whole model

    def examine(self, module: nn.Module, following: nn.Module | None = None, whole: bool = False) -> None:
        """Decides on the convolutions in a module by its graph, or else by its parts.

        Args:
            module: the module.
            following: the module registered next, taken for the reader of the output.
            whole: the module is the whole model: nothing comes before or after it.
        """
        traced = None if isinstance(module, _WEIGHTED) else _trace(module)
        if traced is None:
            self._examine_parts(module, following, whole)
            return
        graph, closed = traced
        modules = dict(module.named_modules())
        before = _weights_before(graph, modules)
        found: dict[nn.Module, list[str | None]] = {}
        for node in graph.nodes:
            conv = _module_of(node, modules)
            if isinstance(conv, _ConvNd):
                reason = _lack_of_norm(node, modules, isinstance(following, _NORMS))
                if whole and node not in before:
                    reason = "first convolution"
                elif whole and not _weights_behind(node, modules):
                    reason = "classifier"
                found.setdefault(self.original[conv], []).append(reason)
        for conv, each in found.items():  # all uses of a convolution must allow it
            self.reasons[conv] = next((reason for reason in each if reason is not None), None)
        if whole:
            self.within_whole.update(found)
        for part in closed:
            self._examine_parts(part)

    def _examine_parts(self, module: nn.Module, following: nn.Module | None = None, whole: bool = False) -> None:
        if isinstance(module, _ConvNd):
            normalized = isinstance(following, _NORMS)
            self.reasons[self.original[module]] = None if normalized else "no normalisation registered after it"
        children = list(module.children())
        if len(children) == 1:  # a wrapper
            self.examine(children[0], following, whole)
            return
        for child, following in zip(children, [*children[1:], None], strict=False):
            self.examine(child, following)


def _name_of(node: fx.Node) -> str:
    if node.op == "output":
        return "the output"
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))


def _module_of(node: fx.Node, modules: dict[str, nn.Module]) -> nn.Module | None:
    return modules[str(node.target)] if node.op == "call_module" else None


def _lack_of_norm(node: fx.Node, modules: dict[str, nn.Module], output_is_normalized: bool) -> str | None:
    """Returns which reader of a node's output is not a normalisation; None if all are."""
    readers, seen, read = [node], set(), False
    while readers:
        for user in readers.pop().users:
            module = _module_of(user, modules)
            name = _name_of(user)
            if user in seen or (module is None and name in _SIZE_NAMES):
                continue
            if name == "getattr" and user.args[1] in _SIZE_NAMES:
                continue
            seen.add(user)
            read = True
            if isinstance(module, _NORMS) or user.target in _NORM_FUNCTIONS:
                if user.users and all(_is_gate(reader, modules) for reader in user.users):
                    return "gate"
            elif isinstance(module, _PASSING) or (module is None and name in _PASSING_NAMES):
                readers.append(user)
            elif not (user.op == "output" and output_is_normalized):
                return f"no normalisation after it but {name if module is None else type(module).__name__}"
    return None if read else "its output is not used"


def _is_gate(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    module = _module_of(node, modules)
    return _name_of(node) in _GATE_NAMES if module is None else isinstance(module, _GATES)


def _has_weights(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    module = _module_of(node, modules)
    if module is not None:
        return any(isinstance(m, _WEIGHTED) for m in module.modules())
    return node.op == "call_function" and node.target in _WEIGHTED_FUNCTIONS


def _weights_before(graph: fx.Graph, modules: dict[str, nn.Module]) -> set[fx.Node]:
    """Returns the nodes that depend on a layer with weights."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if any(source in found or _has_weights(source, modules) for source in node.all_input_nodes):
            found.add(node)
    return found


def _weights_behind(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    readers, seen = [node], set()
    while readers:
        for user in readers.pop().users:
            if _has_weights(user, modules):
                return True
            if user not in seen:
                seen.add(user)
                readers.append(user)
    return False
