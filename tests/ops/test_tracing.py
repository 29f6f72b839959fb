"""Graphs of adder networks by torch.fx and torch.jit compute what the network computes; so do modes and subclasses."""

import copy
import io
import pickle
import subprocess
import sys

import pytest
import torch
from cases import assert_same, one_thread
from torch import fx, nn
from torch.fx.passes.shape_prop import ShapeProp
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from adderops import AdderConv2d, AdderLinear, convert
from adderops.functional import adder_conv2d, adder_conv2d_int8, adder_linear, quantize
from adderops.models import create_model


@pytest.fixture(autouse=True, scope="module")
def single_thread():
    with one_thread():
        yield


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        AdderConv2d(4, 8, 3, padding=1, bias=True),
        nn.BatchNorm2d(8),
        AdderConv2d(8, 6, (3, 2), padding=2, groups=2, padding_mode="circular"),
        AdderConv2d(6, 6, 2, padding="same"),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        AdderLinear(6, 5, bias=True),
    ).eval()


# --- torch.fx ---


@pytest.mark.parametrize("training", (False, True))
def test_symbolic_trace(training):
    """The graph, its copies and a pickle of it; the forward of a graph in training, and gradients of all parameters."""
    net = network().train(training)
    graph = fx.symbolic_trace(net)
    for traced in (graph, copy.deepcopy(graph), pickle.loads(pickle.dumps(graph)), fx.symbolic_trace(graph)):
        for shape in ((2, 3, 10, 10), (1, 3, 13, 9)):
            x = torch.randn(shape)
            traced.load_state_dict({**dict(net.named_parameters()), **dict(net.named_buffers())})
            assert_same(traced(x).detach(), copy.deepcopy(net)(x).detach(), f"{shape}")
        traced(torch.randn(2, 3, 10, 10)).sum().backward()
        assert all(p.grad is not None for p in traced.parameters())


@pytest.mark.parametrize("layer", (AdderConv2d(3, 4, 3), AdderLinear(8, 4)), ids=lambda layer: type(layer).__name__)
def test_one_graph_for_any_number_of_dimensions(layer):
    graph = fx.symbolic_trace(layer)
    shapes = [(3, 8, 8), (2, 3, 8, 8)] + [(8,), (2, 8)] * isinstance(layer, AdderLinear)
    for shape in shapes:
        x = torch.randn(shape)
        assert torch.equal(graph(x), layer(x))


def test_functions_in_a_graph():
    def bytes(x, w, scale):
        return adder_conv2d_int8(quantize(x, 0.1, 3), w, scale, scale, relu=True, stride=2, dtype=torch.uint8)

    graph = fx.symbolic_trace(bytes)
    x, w, scale = torch.randn(2, 3, 8, 8), torch.randint(256, (4, 3, 3, 3)).byte(), torch.rand(4)
    assert torch.equal(graph(x, w, scale), bytes(x, w, scale))
    targets = [node.target for node in graph.graph.nodes if node.op == "call_function"]
    assert targets == [quantize, adder_conv2d_int8]


def test_passes_over_a_graph():
    """Shapes, and the replacement of a function by another."""
    x, net = torch.randn(2, 3, 10, 10), network()
    graph = fx.symbolic_trace(net)
    ShapeProp(graph).propagate(x)
    shape_of = {node.target: node.meta["tensor_meta"].shape for node in graph.graph.nodes if node.op == "call_function"}
    assert shape_of[adder_linear] == (2, 5)
    for node in graph.graph.nodes:
        if node.target is adder_linear:
            node.target = nn.functional.linear
    graph.recompile()
    want = nn.functional.linear(net[:-1](x), net[-1].weight, net[-1].bias)
    torch.testing.assert_close(graph(x), want)


def test_features_by_torchvision():
    extraction = pytest.importorskip("torchvision.models.feature_extraction")
    models = pytest.importorskip("torchvision.models")
    net = convert(models.resnet18(), verbose=False).eval()
    extractor = extraction.create_feature_extractor(net, {"layer2.0.conv1": "adder", "layer3": "features"})
    x = torch.randn(1, 3, 64, 64)
    seen = {}
    net.layer2[0].conv1.register_forward_hook(lambda module, inputs, y: seen.update(adder=y))
    net.layer3.register_forward_hook(lambda module, inputs, y: seen.update(features=y))
    net(x)
    got = extractor(x)
    assert got.keys() == seen.keys()
    for name, value in got.items():
        assert_same(value.detach(), seen[name].detach(), name)


# --- torch.jit ---


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # pytest lifts the package's own filter
@pytest.mark.parametrize("make", (network, lambda: create_model("resnet20", "adder", in_channels=3, num_classes=10)))
def test_jit_trace_saves(make):
    """In evaluation, for other batches and image sizes than the example's."""
    net, file = make().eval(), io.BytesIO()
    torch.jit.save(torch.jit.trace(net, torch.randn(2, 3, 12, 12)), file)
    loaded = torch.jit.load(io.BytesIO(file.getvalue()))
    for shape in ((2, 3, 12, 12), (5, 3, 17, 9)):
        x = torch.randn(shape)
        assert_same(loaded(x).detach(), net(x).detach(), f"{shape}")


TRACE = """
import torch, warnings
from adderops import AdderConv2d, AdderLinear
warnings.filterwarnings("error", category=torch.jit.TracerWarning, append=True)
torch.jit.trace(AdderConv2d(3, 4, 3, bias=True).eval(), torch.randn(2, 3, 8, 8))
torch.jit.trace(AdderLinear(3, 4).eval(), torch.randn(2, 3))
"""


@pytest.mark.slow
def test_jit_trace_is_silent():
    """The argument rules do not warn of "a tensor as a Python boolean"; in a process without pytest's own filters."""
    done = subprocess.run([sys.executable, "-c", TRACE], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]


def test_jit_script_is_refused():
    for model in (AdderConv2d(3, 4, 3), nn.Sequential(AdderLinear(3, 4))):
        with pytest.raises(TypeError, match="Adder.*: expected torch.export or torch.jit.trace, got torch.jit.script"):
            torch.jit.script(model)
        assert model(torch.randn(1, 3, 3, 3)).isfinite().all()  # the model is unchanged


# --- modes, subclasses, layouts ---


class Subclass(torch.Tensor):
    calls: list = []

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        cls.calls.append(function)
        return super().__torch_function__(function, types, args, kwargs or {})


class Functions(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.calls.append(function)
        return function(*args, **(kwargs or {}))


class Operators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls.append(str(function))
        return function(*args, **(kwargs or {}))


X, W = torch.randn(1, 3, 6, 6), torch.randn(4, 3, 3, 3)
BYTES = torch.randint(256, (1, 3, 6, 6)).byte()
CALLS = {
    adder_conv2d: lambda x: adder_conv2d(x, W.to(x.device), stride=2, padding=1),
    adder_linear: lambda x: adder_linear(x, torch.ones(4, 6, device=x.device)),
    quantize: lambda x: quantize(x, 0.1, 3),
    adder_conv2d_int8: lambda x: adder_conv2d_int8(x, W.byte().to(x.device), dtype=torch.int32),
}


def argument(function) -> torch.Tensor:
    return BYTES if function is adder_conv2d_int8 else X


@pytest.mark.parametrize("function", CALLS, ids=lambda function: function.__name__)
def test_subclasses_and_function_modes_see_the_call(function):
    call, x = CALLS[function], argument(function)
    want = call(x)
    Subclass.calls.clear()
    y = call(x.as_subclass(Subclass))
    assert type(y) is Subclass and function in Subclass.calls
    assert torch.equal(y.as_subclass(torch.Tensor), want)
    with Functions() as mode:
        assert torch.equal(call(x), want)
    assert function in mode.calls


def test_dispatch_modes_see_the_operators():
    layer = AdderConv2d(3, 4, 3)
    x = X.clone().requires_grad_()
    with Operators() as mode:
        layer(x).sum().backward()
    names = [name.split(".")[1] for name in mode.calls if name.startswith("adderops.")]
    assert names == ["adder_conv2d", "adder_conv2d_grad_x", "adder_conv2d_grad_w"]


@pytest.mark.parametrize("function", CALLS, ids=lambda function: function.__name__)
def test_only_dense_tensors(function):
    x = argument(function)
    for other, layout in ((x.to_sparse(), "torch.sparse_coo"), (torch.nested.nested_tensor([x[0], x[0]]), "nested, ")):
        with pytest.raises(TypeError, match=f"{function.__name__}: input: expected a dense tensor, got {layout}"):
            CALLS[function](other)


def test_settings_of_pytorch():
    """Deterministic algorithms, inference mode, checkpointing: all of them change nothing."""
    layer = AdderConv2d(3, 4, 3)
    want = layer(X)
    torch.use_deterministic_algorithms(True)
    try:
        layer(X).sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
    wanted = layer.weight.grad.clone()
    layer.weight.grad = None
    y = torch.utils.checkpoint.checkpoint(layer, X, use_reentrant=False)
    y.sum().backward()
    assert torch.equal(y, want) and torch.equal(layer.weight.grad, wanted)
    with torch.inference_mode():
        y = layer(X)
        assert y.is_inference() and torch.equal(y, want)


SPAWN = """
import torch, torch.multiprocessing as mp
from adderops import AdderConv2d, AdderLinear

def work(layers, x, queue):
    queue.put([layer(x).detach().numpy() for layer in layers])

if __name__ == "__main__":
    context = mp.get_context("spawn")
    layers, x, queue = [AdderConv2d(3, 4, 3), AdderLinear(6, 2)], torch.randn(1, 3, 6, 6), context.Queue()
    process = context.Process(target=work, args=(layers, x, queue))
    process.start()
    for layer, y in zip(layers, queue.get(timeout=90)):
        assert torch.equal(torch.from_numpy(y), layer(x).detach())
    process.join()
"""


@pytest.mark.slow
def test_layers_go_to_other_processes(tmp_path):
    (tmp_path / "spawn.py").write_text(SPAWN)
    done = subprocess.run([sys.executable, tmp_path / "spawn.py"], capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr[-2000:]
