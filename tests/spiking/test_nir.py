"""The NIR graph of a spiking network: run by an interpreter of NIR's definitions, it gives the network's spikes."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from adderops.models import lenet5, resnet20
from adderops.spiking import IntegrateAndFire, sites, spiking
from adderops.spiking.nir import DT, to_nir

nir = pytest.importorskip("nir")


class Interpreter:
    """A NIR graph, step by step, in forward Euler; an edge that closes a cycle has its value of the step before."""

    def __init__(self, graph):
        self.graph, self.last, self.membranes = graph, {}, {}

    def step(self, x):
        """Returns the values of all nodes for an input (N, ...)."""
        values, open_nodes = {}, set()

        def value(name):
            if name in open_nodes:
                return self.last.get(name, torch.zeros(()))
            if name not in values:
                open_nodes.add(name)
                sources = [a for a, b in self.graph.edges if b == name]
                total = sum((value(source) for source in sources), torch.zeros((), dtype=x.dtype))
                node = self.graph.nodes[name]
                values[name] = x if isinstance(node, nir.Input) else self.apply(name, node, total)
                open_nodes.remove(name)
            return values[name]

        value("output")
        self.last = values
        return values

    def apply(self, name, node, x):
        p = {key: torch.as_tensor(array) for key, array in vars(node).items() if isinstance(array, np.ndarray)}
        if isinstance(node, nir.Output):
            return x
        if isinstance(node, nir.Conv2d):
            return F.conv2d(x, p["weight"], p["bias"], tuple(node.stride), tuple(node.padding), tuple(node.dilation))
        if isinstance(node, nir.Affine):
            return x @ p["weight"].T + p["bias"]
        if isinstance(node, nir.Scale):
            return x * p["scale"]
        if isinstance(node, nir.Threshold):
            return (x > p["threshold"]).to(x.dtype)
        if isinstance(node, nir.Flatten):
            return x.flatten(node.start_dim + 1, node.end_dim)
        if isinstance(node, (nir.AvgPool2d, nir.SumPool2d)):
            mean = F.avg_pool2d(x, tuple(node.kernel_size), tuple(node.stride), tuple(node.padding))
            return mean * (np.prod(node.kernel_size) if isinstance(node, nir.SumPool2d) else 1)
        v = self.membranes.get(name, torch.zeros((), dtype=x.dtype))
        if isinstance(node, (nir.IF, nir.I)):
            v = v + DT * (p["r"] * x)
        elif isinstance(node, (nir.LIF, nir.LI)):
            v = v + DT / p["tau"] * (p["v_leak"] - v + p["r"] * x)
        else:
            raise AssertionError(f"no definition of {type(node).__name__}")
        if isinstance(node, (nir.I, nir.LI)):
            self.membranes[name] = v
            return v
        z = v > p["v_threshold"]
        self.membranes[name] = torch.where(z, p["v_reset"], v)
        return z.to(x.dtype)


def through_file(network, shape, tmp_path):
    nir.write(tmp_path / "network.nir", to_nir(network, shape))
    return nir.read(tmp_path / "network.nir")


def assert_same(network, images, tmp_path, exact=False):
    """The interpreted file has the network's spikes in each step, and its logits."""
    spikes = {}
    hooks = [
        site.register_forward_hook(
            lambda site, _, y, name=name: spikes.update({name: y.unflatten(0, (site.steps, -1))})
        )
        for name, site in sites(network).items()
    ]
    with torch.no_grad():
        logits = network(images)
    for hook in hooks:
        hook.remove()
    graph = through_file(network, images.shape[1:], tmp_path)
    interpreter, outputs = Interpreter(graph), []
    steps = int(graph.metadata["steps"])
    for t in range(steps):
        values = interpreter.step(images)
        outputs.append(values["output"])
        for name, found in spikes.items():
            own = values[name if name in values else f"{name}.spike"]
            assert torch.equal(own, (found[t] != 0).to(found.dtype)), f"{name}, step {t}"
    rates = [found.ne(0).double().mean().item() for found in spikes.values()]
    assert all(0.02 < rate < 0.98 for rate in rates), rates  # otherwise the comparison says nothing
    got = torch.stack(outputs).mean(0)
    assert torch.equal(got, logits) if exact else torch.allclose(got, logits, rtol=1e-9, atol=1e-9)


def trained_like(model):
    """Random statistics and scales for BatchNorms, so that folding them wrongly shows."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low, high in (
                (module.running_mean, -0.2, 0.2),
                (module.running_var, 0.5, 2.0),
                (module.weight.data, 0.8, 1.6),
                (module.bias.data, -0.1, 0.4),
            ):
                tensor.uniform_(low, high, generator=generator)
    return model.double().eval()


NEURONS = {
    "IF, subtract": {},
    "IF, zero": {"reset": "zero"},
    "IF, of DSR": {"threshold": 1.5, "fire": 0.5, "scaled": True},
    "IF, initial": {"initial": 0.25, "threshold": 0.75},
    "LIF, subtract": {"decay": 0.75, "gain": 1.25, "scaled": True, "threshold": 0.7},
    "LIF, zero": {"decay": 0.75, "gain": 1.25, "reset": "zero", "threshold": 0.5},
}


MODELS = {"lenet5": (lenet5, (1, 32, 32)), "resnet20": (resnet20, (3, 16, 16))}


@pytest.mark.parametrize("options", NEURONS.values(), ids=NEURONS)
@pytest.mark.parametrize("model", ["lenet5", pytest.param("resnet20", marks=pytest.mark.slow)])
def test_graph_has_the_spikes_of_the_network(model, options, tmp_path):
    torch.manual_seed(0)
    build, size = MODELS[model]
    network = spiking(trained_like(build("cnn")), 4, lambda: IntegrateAndFire(**options).double())
    assert_same(network, torch.randn(2, *size, dtype=torch.float64), tmp_path)


class Shortcut(nn.Module):
    """Grouped convolutions, average and maximum pooling, and a shortcut, of spikes of another size in each channel."""

    def __init__(self):
        super().__init__()
        self.first, self.fc = nn.Conv2d(2, 4, 3, padding=1), nn.Linear(16, 3)
        self.second, self.third = (nn.Conv2d(4, 4, 3, padding=1, groups=2) for _ in range(2))
        self.pool = nn.MaxPool2d(2)

    def forward(self, x):
        x = F.relu(self.first(x))
        x = F.max_pool2d(F.relu(self.second(self.pool(x)) + self.pool(x)), 3, stride=1, padding=1)
        return self.fc(F.relu(self.third(F.avg_pool2d(x, 2))).flatten(1))


@pytest.mark.parametrize("of", ["channels", "neurons"])
@pytest.mark.parametrize("reset", ["subtract", "zero"])
def test_thresholds_of_channels_and_neurons(of, reset, tmp_path):
    torch.manual_seed(0)
    sizes = iter([(4,), (4,), (4, 2, 2)] if of == "neurons" else [(4,)] * 3)

    def neuron():
        return IntegrateAndFire(torch.rand(next(sizes)) * 0.4 + 0.1, scaled=True, reset=reset).double()

    network = spiking(Shortcut().double().eval(), 6, neuron)
    assert_same(network, torch.randn(2, 2, 8, 8, dtype=torch.float64), tmp_path)


@pytest.mark.parametrize("options", [{}, {"reset": "zero"}, {"scaled": True, "fire": 0.5}, {"initial": 0.25}], ids=str)
def test_neurons_at_their_threshold_fire(options, tmp_path):
    """Multiples of 1/8 in float32: every sum is exact, and many membranes meet the threshold."""
    generator = torch.Generator().manual_seed(0)
    layers = nn.Linear(4, 6), nn.Linear(6, 5), nn.Linear(5, 3)
    for layer in layers:
        for tensor in (layer.weight.data, layer.bias.data):
            tensor.copy_(torch.randint(-2, 5, tensor.shape, generator=generator) / 8)
    model = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])
    network = spiking(model, 8, lambda: IntegrateAndFire(0.5, **options))
    assert_same(network, torch.randint(-4, 5, (16, 4), generator=generator) / 8, tmp_path, exact=True)


def convolutions(pool=None, norm=None):
    first = nn.Conv2d(1, 4, 3, padding=1), norm or nn.BatchNorm2d(4), nn.ReLU()
    parts = *first, pool or nn.AvgPool2d(2), nn.Conv2d(4, 6, 3), nn.ReLU()
    return nn.Sequential(*parts, nn.Flatten(), nn.Linear(24, 5)).eval()


REFUSED = {
    "3: expected a maximum of spikes": lambda: spiking(
        nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AvgPool2d(2), nn.MaxPool2d(2), nn.ReLU()), 2, IntegrateAndFire
    ),
    "2: expected a maximum of spikes": lambda: spiking(  # of their means, in the head
        nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2)), 2, IntegrateAndFire
    ),
    "pool: expected a maximum of spikes": lambda: spiking(
        Shortcut(), 2, lambda: IntegrateAndFire(scaled=True), exact_max_pools=True
    ),
    "1: expected a layer that NIR has, got instancenorm2d": lambda: spiking(
        convolutions(norm=nn.InstanceNorm2d(4)), 2, IntegrateAndFire
    ),
    "pooling with default options": lambda: spiking(convolutions(nn.AvgPool2d(2, ceil_mode=True)), 2, IntegrateAndFire),
    "windows of one size in 8x8, got 3x3 of them": lambda: spiking(
        nn.Sequential(nn.Conv2d(1, 4, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(3)), 2, IntegrateAndFire
    ),
    "spikes.0: initial: expected 0": lambda: spiking(
        convolutions(), 2, lambda: IntegrateAndFire(initial=0.5, reset="zero")
    ),
    "got spikes": lambda: spiking(convolutions(), 2, Other),
    "expected a spiking network, got Sequential": convolutions,
}


class Other(nn.Module):
    def forward(self, x):
        return x

    def reset(self):
        pass


@pytest.mark.parametrize("text", REFUSED)
def test_parts_without_a_counterpart_are_named(text):
    with pytest.raises(ValueError, match="^to_nir: ") as error:
        to_nir(REFUSED[text](), (2 if text.startswith("pool: ") else 1, 8, 8))
    assert text in str(error.value)


class Membrane(nn.Module):
    """The node I in forward Euler, for nirtorch."""

    def __init__(self, node):
        super().__init__()
        self.r = torch.from_numpy(node.r)

    def forward(self, x, state=None):
        v = DT * self.r * x + (0 if state is None else state)
        return v, v


class Apply(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def by_nirtorch(graph):
    nirtorch = pytest.importorskip("nirtorch")
    own = Interpreter(graph)
    stateless = (nir.Threshold, nir.Scale, nir.Flatten, nir.AvgPool2d, nir.Conv2d, nir.Affine)
    nodes = {kind: lambda node: Apply(lambda x: own.apply("", node, x)) for kind in stateless}
    return nirtorch.nir_to_torch(graph, {nir.I: Membrane, **nodes})


def by_spikingjelly(graph):
    return pytest.importorskip("spikingjelly.activation_based.nir_exchange").import_from_nir(graph)


def by_snntorch(graph):
    network = pytest.importorskip("snntorch.import_nir").import_from_nir(graph)
    return lambda x, state: network(x[0])  # its Flatten also flattens a batch; its neurons have their state


@pytest.mark.parametrize(
    ("reader", "options"),
    [
        (by_nirtorch, {}),
        (by_spikingjelly, {"reset": "zero"}),
        (by_spikingjelly, {"reset": "zero", "decay": 0.75}),
        (by_snntorch, {"reset": "zero", "decay": 0.75}),
    ],
)
def test_other_libraries_read_the_file(reader, options, tmp_path):
    torch.manual_seed(0)
    network, image = spiking(convolutions(), 6, lambda: IntegrateAndFire(0.5, **options)), torch.rand(1, 1, 8, 8) * 2
    theirs, state, outputs = reader(through_file(network, (1, 8, 8), tmp_path)), None, []
    with torch.no_grad():
        for _ in range(6):
            output, state = theirs(image, state)
            outputs.append(output)
        assert torch.allclose(torch.stack(outputs).mean(0), network(image), atol=1e-6)
