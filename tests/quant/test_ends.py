"""With ends='int8' every sum of the network is exact: its logits have the same bits in any order of additions."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from slow import slow_except
from torch import nn
from torch.fx import Interpreter

from adderops import AdderConv2d
from adderops.models import create_model
from adderops.quant import Scheme, calibrate, convert, load, save

from .test_networks import operators, trained

aten = torch.ops.aten
SCHEME = Scheme(ends="int8")
SUMS = (aten.conv2d.default, aten.linear.default, aten.sum.dim_IntList, aten.avg_pool2d.default)
EXACT_BY_THEMSELVES = {  # integers, one operation for each value, or no arithmetic at all
    *(aten.mul.Tensor, aten.add.Tensor, aten.sub.Tensor, aten.round.default, aten.clamp.default, aten.relu.default),
    *(aten.max_pool2d.default, aten.reshape.default, aten.contiguous.default, aten.to.dtype),
    *(torch.ops.adderops.adder_conv2d_int8.default, torch.ops.adderops.quantize.default),
}


class InInt64(Interpreter):
    """Evaluates a network with its multiplying layers and pools in NumPy's int64, from the definitions."""

    def call_function(self, target, args, kwargs):
        if target not in SUMS:
            assert target in EXACT_BY_THEMSELVES
            return super().call_function(target, args, kwargs)
        like, x = args[0], integers(args[0])
        if target == aten.sum.dim_IntList:
            y = x.sum(tuple(args[1]), keepdims=args[2])
        elif target == aten.avg_pool2d.default:
            kernel, stride, padding, _, _, divisor = args[1:]
            assert divisor == 1
            y = windows(x, kernel, stride or kernel, padding).sum((-2, -1))
        elif target == aten.linear.default:
            assert args[2] is None
            y = x @ integers(args[1]).T
        else:
            w, bias, stride, padding = (*args[1:], *([1, 1], [0, 0])[len(args) - 3 :])
            assert bias is None
            y = np.einsum("nchwij,ocij->nohw", windows(x, w.shape[2:], stride, padding), integers(w))
        assert np.abs(y).max() < 2 ** (53 if like.dtype == torch.float64 else 24)
        return torch.from_numpy(y).to(like.dtype)


class InOtherOrders(Interpreter):
    """Evaluates a network with the terms of its sums in another order: channels, or the pixels of a mean, permuted."""

    def call_function(self, target, args, kwargs):
        if target in (aten.conv2d.default, aten.linear.default):
            order = torch.randperm(args[0].size(1))
            args = (args[0][:, order], args[1][:, order], *args[2:])
        elif target == aten.sum.dim_IntList:
            args = (args[0].flatten(2)[..., torch.randperm(args[0][0, 0].numel())].view_as(args[0]), *args[1:])
        return super().call_function(target, args, kwargs)


def integers(x: torch.Tensor) -> np.ndarray:
    assert torch.equal(x, x.round())
    return x.numpy().astype(np.int64)


def windows(x: np.ndarray, kernel, stride, padding) -> np.ndarray:
    x = np.pad(x, ((0, 0), (0, 0), (padding[0],) * 2, (padding[1],) * 2))
    views = np.lib.stride_tricks.sliding_window_view(x, tuple(kernel), (2, 3))
    return views[:, :, :: stride[0], :: stride[1]]


def integer_of(network: nn.Module, images: torch.Tensor, scheme: Scheme = SCHEME):
    return converted(trained(network, images), images, scheme)


def converted(network: nn.Module, images: torch.Tensor, scheme: Scheme):
    model = calibrate(network, [images], scheme)
    return convert(model, images), model


def images_of(channels: int = 3, count: int = 18) -> torch.Tensor:
    return torch.randn(count, channels, 32, 32, generator=torch.Generator().manual_seed(1))


class Pools(nn.Module):
    """A pool of each kind, and readers of each kind: an adder layer, a convolution, a classifier."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.first = AdderConv2d(8, 12, 3, padding=1)
        self.norm = nn.BatchNorm2d(12)
        self.second = AdderConv2d(12, 12, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(12)
        self.middle = nn.Conv2d(12, 16, 3, stride=2, bias=False)
        self.head = nn.Linear(16, 5, bias=False)

    def forward(self, x):
        x = F.avg_pool2d(F.relu(self.stem(x)), 2)
        x = F.avg_pool2d(self.norm(self.first(x)), (3, 2), stride=(2, 2), count_include_pad=False)
        x = F.avg_pool2d(F.relu(self.norm2(self.second(F.relu(x)))), 2, padding=1)
        x = F.relu(self.middle(F.dropout(x, 0.1, self.training)))
        return self.head(x.mean((3, -2)))


@pytest.mark.parametrize("arch", slow_except(("resnet20",), ("resnet20", "lenet5", "mobilenet", "vgg_small")))
def test_networks_of_the_zoo_have_one_result(arch):
    channels = 1 if arch == "lenet5" else 3
    images = images_of(channels)
    integer, model = integer_of(create_model(arch, "adder", channels, 10), images)
    logits = integer(images)
    assert torch.equal(InInt64(integer).run(images), logits)
    assert torch.equal(InOtherOrders(integer).run(images), logits)
    assert torch.equal(torch.cat([integer(image[None]) for image in images[:3]]), logits[:3])
    assert torch.equal(integer(images.to(memory_format=torch.channels_last)), logits)
    assert torch.corrcoef(torch.stack((logits.flatten(), model(images).flatten())))[0, 1] > 0.9


def test_any_number_of_threads():
    images, threads = images_of(), torch.get_num_threads()
    integer, _ = integer_of(Pools(), images)
    results = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results += [integer(images), integer(images[:1])]
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(y, results[0][: len(y)]) for y in results)


def test_pools_of_every_kind():
    images = images_of()
    integer, model = integer_of(Pools(), images)
    called = operators(integer)
    assert called.count("aten.avg_pool2d.default") == 3 and called.count("aten.sum.dim_IntList") == 1
    assert torch.equal(InInt64(integer).run(images), integer(images))
    assert torch.equal(InOtherOrders(integer).run(images), integer(images))
    assert (integer(images) - model(images)).std() < 0.1 * model(images).std()


def test_a_pool_costs_a_sixteenth_of_a_step():
    """Against the mean in float64: half of 1/16 of a step, then rounded to a whole step."""
    torch.manual_seed(0)
    x = torch.rand(64, 6, 9, 7)
    network = nn.Sequential(AdderConv2d(6, 6, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)).eval()
    integer, model = integer_of(network, x)
    nodes = {str(node.target): node for node in integer.graph.nodes}
    seen = {}

    class Watching(Interpreter):
        def run_node(self, node):
            seen[node] = super().run_node(node)
            return seen[node]

    Watching(integer).run(x)
    pooled = seen[nodes["adderops.adder_conv2d_int8.default"]].double().mean((2, 3))
    exact = pooled / model[3].input_grid().scale
    total = seen[nodes["aten.sum.dim_IntList"]].double().flatten(1) / (63 * 16)
    error = (total - exact).abs().max()
    assert 1e-4 < error <= 1 / 32 + 1e-3


@pytest.mark.parametrize("size, finer", ((8, 16), (32, 16), (33, 8), (128, 1), (129, None)))
def test_the_finer_grid_of_large_pools(size, finer):
    """n B < 2^24, and B reaches over 1020 steps; where that is impossible the mean stays one of floats."""
    x = torch.rand(2, 1, size, size)
    network = nn.Sequential(AdderConv2d(1, 2, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 2)).eval()
    integer, model = integer_of(network, x)
    if finer is None:
        assert "aten.adaptive_avg_pool2d.default" in operators(integer)
        return
    [total] = [node for node in integer.graph.nodes if node.target == aten.sum.dim_IntList]
    clamp = total.args[0]
    most = clamp.args[2]
    assert size**2 * most < 2**24 and most >= 1020 * finer
    assert clamp.args[0].args[0].args[1] == finer / model[3].input_grid().scale
    assert torch.equal(InInt64(integer).run(x), integer(x))


class TwoReaders(nn.Module):
    """A pool that the classifier reads, and the result."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = AdderConv2d(3, 6, 3), nn.Linear(6, 4)

    def forward(self, x):
        pooled = self.layer(x).mean((2, 3))
        return self.head(pooled), pooled


def windows_of_different_sizes() -> nn.Module:
    pool = nn.AvgPool2d(2, padding=1, count_include_pad=False)
    return nn.Sequential(AdderConv2d(3, 6, 3), pool, AdderConv2d(6, 6, 3), nn.Flatten(), nn.Linear(6 * 14 * 14, 4))


@pytest.mark.parametrize("network", (TwoReaders, windows_of_different_sizes))
def test_other_pools_are_left_as_they_are(network):
    images = images_of()
    integer, model = integer_of(network(), images)
    assert {"aten.mean.dim", "aten.avg_pool2d.default"} & set(operators(integer))
    assert "aten.sum.dim_IntList" not in operators(integer)
    got, want = (result[0] if isinstance(result, tuple) else result for result in (integer(images), model(images)))
    assert (got - want).std() < 0.1 * want.std()


def test_ends_in_floats_are_left_as_they_are():
    integer, _ = integer_of(Pools(), images_of(), Scheme())
    assert {"aten.mean.dim", "aten.conv2d.default", "aten.linear.default"} <= set(operators(integer))
    assert not {"aten.round.default", "aten.sum.dim_IntList"} & set(operators(integer))


@pytest.mark.parametrize("features", (512, 2048))
def test_sums_beyond_float32_are_exact(features):
    """All weights and inputs at their bounds, so that 2048 terms reach 6.6e7 and odd sums are no float32."""
    images = torch.full((2, 1, 1, features), 1.0)
    images[1, ..., ::3] = 2 / 255
    head = nn.Linear(features, 3, bias=False)
    nn.init.ones_(head.weight)
    head.weight.data[1, ::5] = 3 / 127
    network = nn.Sequential(AdderConv2d(1, 1, 1), nn.Flatten(), head).eval()
    nn.init.zeros_(network[0].weight)
    integer, _ = converted(network, images, Scheme(ends="int8", rank=1.0))
    doubles = [node for node in integer.graph.nodes if node.args[1:2] == (torch.float64,)]
    assert len(doubles) == (2 if features == 2048 else 0)
    assert torch.equal(InInt64(integer).run(images), integer(images))
    assert torch.equal(InOtherOrders(integer).run(images), integer(images))


def test_saved_and_loaded(tmp_path):
    images = images_of()
    integer, _ = integer_of(Pools(), images)
    save(integer, images, tmp_path / "int8.safetensors")
    loaded, _ = load(tmp_path / "int8.safetensors")
    assert torch.equal(loaded(images), integer(images))
    layers = [node.meta["layer"] for node in loaded.graph.nodes if node.target in SUMS[:2]]
    assert layers == ["stem", "middle", "head"]


def test_a_file_from_before_the_sums_were_exact():
    """From the converter of 2026-11-29: rounded values multiplied as floats, a mean of floats."""
    integer, known = load(Path(__file__).with_name("multiplied_as_floats.safetensors"))
    assert "aten.adaptive_avg_pool2d.default" in operators(integer)
    facts = known["facts"]
    assert torch.allclose(integer(torch.tensor(facts["images"])), torch.tensor(facts["logits"]), atol=1e-6)
    assert known["scheme"]["ends"] == "int8"
