"""A CNN becomes a spiking network: neurons over time steps where it has ReLUs."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

_OTHER_ACTIVATIONS = frozenset(
    "celu elu gelu hardsigmoid hardswish hardtanh leakyrelu leaky_relu mish prelu rrelu selu sigmoid silu softplus "
    "tanh".split()
)
_WITH_MODE = ("batch_norm", "dropout")  # training or evaluation


class _OverSteps(nn.Module):
    """Base of the modules that `spiking` inserts; steps = 0 makes the network the CNN that it stands for."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps = steps

    def extra_repr(self) -> str:
        return f"steps={self.steps}"


class Spikes(_OverSteps):
    """The neurons of a spiking network where its CNN has a ReLU.

    Args:
        neuron: (T, N, ...) -> (T, N, ...), with `reset()`: `IntegrateAndFire`, or a multi-step neuron of SpikingJelly.
        steps: T.
        constant: the input is (N, ...), the same current in all steps; otherwise (T·N, ...).
        activation: what the neurons stand for, relu or relu6.

    >>> from adderops.spiking import IntegrateAndFire
    >>> Spikes(IntegrateAndFire(), steps=4, constant=True)(torch.tensor([[0.5]])).flatten()
    tensor([0., 1., 0., 1.])
    """

    neuron: Any  # mypy knows no module with `reset`

    def __init__(
        self,
        neuron: nn.Module,
        steps: int,
        constant: bool = False,
        activation: Callable[[Tensor], Tensor] = F.relu,
    ) -> None:
        super().__init__(steps)
        self.neuron = neuron
        self.constant = constant
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """Returns the spikes (T·N, ...); without steps the activation."""
        if not self.steps:
            return self.activation(x)
        current = x.expand(self.steps, *x.shape) if self.constant else x.unflatten(0, (self.steps, -1))
        self.neuron.reset()
        spikes = self.neuron(current)
        self.neuron.reset()  # frees the membrane, and the graph that it may hold
        return spikes.flatten(0, 1)


class _Repeat(_OverSteps):
    """(N, ...) -> (T·N, ...): a constant current that meets spikes, at a shortcut."""

    def forward(self, x: Tensor) -> Tensor:
        return x.expand(self.steps, *x.shape).flatten(0, 1) if self.steps else x


class _MeanOverSteps(_OverSteps):
    """(T·N, ...) -> (N, ...)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.unflatten(0, (self.steps, -1)).mean(0) if self.steps else x


class _SumsOverSteps(_OverSteps):
    """(T·N, ...) -> (T·N, ...): the sum of all steps up to each."""

    def forward(self, x: Tensor) -> Tensor:
        return x.unflatten(0, (self.steps, -1)).cumsum(0).flatten(0, 1) if self.steps else x


class _IncrementsOverSteps(_OverSteps):
    """(T·N, ...) -> (T·N, ...): what each step adds, from the sums up to each."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.steps:
            return x
        sums = x.unflatten(0, (self.steps, -1))
        return torch.cat([sums[:1], sums.diff(dim=0)]).flatten(0, 1)


def spiking(
    model: nn.Module, steps: int, neuron: Callable[[], nn.Module], exact_max_pools: bool = False
) -> fx.GraphModule:
    r"""Returns the spiking network of a CNN: neurons where it has ReLUs, everything else as it is.

    The image is a constant current: what precedes the first neurons is computed once. Between neurons, tensors are
    (T·N, ...), with the steps outermost, so convolutions, BatchNorm and pooling see a larger batch. What follows the
    last neurons is computed once, on the mean of their spikes over the steps:

    .. math:: logits = head(\frac1T \sum_t s_t)

    The network shares all modules with the model: one optimizer, one BatchNorm. The neurons of the i-th ReLU are at
    `spikes.i.neuron`, see `sites`. A convolution of spikes only accumulates: their values can be folded into its
    weights.

    Args:
        model: images (N, C, H, W) to logits (N, classes), traceable by torch.fx, without activations but ReLU, ReLU6.
        steps: T, at least 1.
        neuron: makes the neurons of one ReLU: (T, N, ...) -> (T, N, ...), with `reset()`.
        exact_max_pools: the mean of a max pool's output is the maximum of the means, as in the CNN. The largest of the
            spikes in each step, the default, has a larger mean where neurons fire at different times. With counts
            c_k(t) of the spikes so far, the output is max_k c_k(t) - max_k c_k(t-1), which is 0 or 1 again.

    Raises:
        ValueError: steps below 1, an untraceable model, one without ReLU, with another activation, or with BatchNorm
            or dropout as functions, whose mode a trace fixes.

    >>> from adderops.models import lenet5
    >>> from adderops.spiking import IntegrateAndFire
    >>> network = spiking(lenet5("cnn"), steps=4, neuron=IntegrateAndFire)
    >>> network(torch.zeros(2, 1, 32, 32)).shape, list(sites(network))
    (torch.Size([2, 10]), ['spikes.0', 'spikes.1', 'spikes.2', 'spikes.3'])
    """
    if steps < 1:
        raise ValueError(f"spiking: steps: expected at least 1, got {steps}")
    try:
        traced = fx.symbolic_trace(model)
    except Exception as error:  # a forward may raise anything when called with proxies
        raise ValueError(
            f"spiking: model: expected one that torch.fx can trace, got {type(model).__name__}: {error}"
        ) from error
    graph, modules = traced.graph, dict(traced.named_modules())
    graph.eliminate_dead_code()  # sizes that nobody uses
    relus = [node for node in graph.nodes if name_of(node, modules) in ("relu", "relu6")]
    for node in graph.nodes:
        if (name := name_of(node, modules)) in _OTHER_ACTIVATIONS:
            raise ValueError(f"spiking: model: expected no activation but ReLU, got {name} at {node.name}")
        if name in _WITH_MODE and node.op == "call_function":  # the trace has the mode that the model has now
            raise ValueError(f"spiking: model: expected a module of torch.nn, got the function {name} at {node.name}")
    if not relus:
        raise ValueError(f"spiking: model: expected at least one ReLU, got {type(model).__name__} without")
    before, after = _users(relus, forward=False), _users(relus, forward=True)
    for i, node in enumerate(relus):
        name = f"spikes.{i}"
        activation = F.relu6 if "6" in name_of(node, modules) else F.relu
        traced.add_submodule(name, Spikes(neuron(), steps, node not in after, activation))
        with graph.inserting_before(node):
            site = graph.call_module(name, (_input_of(node),))
        node.replace_all_uses_with(site)
        graph.erase_node(node)
        relus[i] = site
    _fit_batches(traced, set(relus), before, after, steps, exact_max_pools)
    traced.delete_all_unused_submodules()
    traced.recompile()
    for module in {*traced.modules()} - {*model.modules()}:  # the model's keep their modes: it may have frozen some
        module.training = model.training
    return traced


def sites(network: nn.Module) -> dict[str, Spikes]:
    """Returns the neurons of a spiking network by name, in the order of the forward pass.

    >>> from adderops.spiking import IntegrateAndFire
    >>> cnn = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> {name: site.constant for name, site in sites(spiking(cnn, 4, IntegrateAndFire)).items()}
    {'spikes.0': True, 'spikes.1': False}
    """
    return {name: module for name, module in network.named_modules() if isinstance(module, Spikes)}


@contextmanager
def as_cnn(network: nn.Module) -> Iterator[None]:
    """A context in which a spiking network runs as its CNN: ReLU for neurons, no steps; same weights, same BatchNorm.

    >>> from adderops.models import lenet5
    >>> from adderops.spiking import IntegrateAndFire
    >>> cnn, x = lenet5("cnn").eval(), torch.randn(2, 1, 32, 32)
    >>> network = spiking(cnn, 4, IntegrateAndFire)
    >>> with as_cnn(network):
    ...     torch.equal(network(x), cnn(x))
    True
    """
    parts = [module for module in network.modules() if isinstance(module, _OverSteps)]
    steps = [part.steps for part in parts]
    try:
        for part in parts:
            part.steps = 0
        yield
    finally:
        for part, count in zip(parts, steps, strict=True):
            part.steps = count


def set_steps(network: nn.Module, steps: int) -> None:
    """Sets T of a spiking network."""
    if steps < 1:
        raise ValueError(f"set_steps: steps: expected at least 1, got {steps}")
    for module in network.modules():
        if isinstance(module, _OverSteps):
            module.steps = steps


def name_of(node: fx.Node, modules: dict[str, nn.Module]) -> str:
    """Returns what a node calls, in small letters: 'relu' for each way to call a ReLU; '' for a node without a call."""
    if node.op == "call_module":
        return type(modules[str(node.target)]).__name__.lower()
    called = node.op in ("call_function", "call_method")
    return (node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")).rstrip("_") * called


def _input_of(node: fx.Node) -> fx.Node:
    [source] = node.all_input_nodes
    return source


def _users(nodes: list[fx.Node], forward: bool) -> set[fx.Node]:
    """Returns the nodes that depend on some nodes or, backward, those on which they depend."""
    found: set[fx.Node] = set()
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        for neighbour in node.users if forward else node.all_input_nodes:
            if neighbour not in found:
                found.add(neighbour)
                waiting.append(neighbour)
    return found


def _fit_batches(
    traced: fx.GraphModule,
    neurons: set[fx.Node],
    before: set[fx.Node],
    after: set[fx.Node],
    steps: int,
    exact_max_pools: bool,
) -> None:
    """Inserts means over the steps where the head begins, and repetitions where a constant current meets spikes.

    Args:
        neurons: the neurons.
        before, after: the nodes on which neurons depend, and those that depend on neurons.
        exact_max_pools: also insert sums before max pools over steps, and increments after them.
    """
    modules = dict(traced.named_modules())
    graph, fitted = traced.graph, dict[tuple[type, fx.Node], fx.Node]()

    read = _users(list(graph.find_nodes(op="output")), forward=False)

    def over_steps(node: fx.Node) -> bool:  # (T·N, ...)
        return node in neurons or (node in after and node in before)

    def fit(kind: type[_OverSteps], source: fx.Node) -> fx.Node:
        if (kind, source) not in fitted:
            name = f"{kind.__name__.lower().strip('_')}.{len(fitted)}"
            traced.add_submodule(name, kind(steps))
            with graph.inserting_after(source):
                fitted[kind, source] = graph.call_module(name, (source,))
        return fitted[kind, source]

    for node in list(graph.nodes):
        if node.op == "call_module" and isinstance(traced.get_submodule(str(node.target)), _OverSteps):
            continue
        if exact_max_pools and over_steps(node) and name_of(node, modules) in ("max_pool2d", "maxpool2d"):
            [source] = node.all_input_nodes
            node.replace_input_with(source, fit(_SumsOverSteps, source))
            increments = fit(_IncrementsOverSteps, node)
            node.replace_all_uses_with(increments, lambda user, own=increments: user is not own)
            neurons.add(increments)
            continue
        kind = (
            _Repeat
            if over_steps(node)
            else _MeanOverSteps
            if node in after and (node in read or node.op == "output")
            else None
        )
        if kind is None:
            continue
        for source in node.all_input_nodes:
            needs = not over_steps(source) if kind is _Repeat else over_steps(source)
            if needs and _is_batch(source):
                node.replace_input_with(source, fit(kind, source))


def _is_batch(node: fx.Node) -> bool:
    """Whether a node is a batch of images, and not a parameter or a size."""
    return node.op != "get_attr" and node.target not in (getattr, operator.getitem, "size", "dim")
