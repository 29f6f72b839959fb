"""Quantized networks: clipping is exact, and the integer network computes what the fake-quantized layers do."""

import copy

import pytest
import torch
import torch.nn.functional as F
from slow import slow_except
from torch import nn

from adderops import AdderConv2d, reference
from adderops import convert as convert_to_adder
from adderops.models import create_model, lenet5, resnet20
from adderops.quant import Grid, Scheme, calibrate, convert, insert, reestimate_batchnorm
from adderops.quant.calibration import quantized_layers
from adderops.quant.grid import cluster, excess

SCHEMES = [
    Scheme(),
    Scheme(bits=4),
    Scheme(method="shared"),
    Scheme(bits=6, ends="int8"),
    Scheme(bits=5, filter_groups=3, rank=1.0),
]


def trained(network: nn.Module, images: torch.Tensor) -> nn.Module:
    """BatchNorm statistics as after training, and many weights outside the range of the inputs."""
    torch.manual_seed(0)
    for module in network.modules():
        if isinstance(module, AdderConv2d):
            nn.init.normal_(module.weight, std=1.5)
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
    return reestimate_batchnorm(network, [images]).eval()


@pytest.fixture(scope="module")
def images():
    return torch.randn(32, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def network(images):
    return trained(resnet20(), images)


class Everything(nn.Module):
    """What occurs between adder layers: no BatchNorm, a bias, pooling, two readers of a value, concatenation."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.first = AdderConv2d(8, 12, 3, padding=1, bias=True)
        self.pooled = AdderConv2d(12, 12, 3, padding=1, groups=4)
        self.norm = nn.BatchNorm2d(12)
        self.depthwise = AdderConv2d(12, 12, 3, padding="same", groups=12)
        self.reflected = AdderConv2d(12, 12, (3, 1), padding=(1, 0), padding_mode="reflect")
        self.norms = nn.ModuleList(nn.BatchNorm2d(12) for _ in range(2))
        self.head = nn.Linear(24, 5)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.first(torch.tanh(self.stem(x))) + 110), 2)
        x = F.relu(self.norm(self.pooled(x)))
        left = self.norms[0](self.depthwise(x)) + x
        right = F.relu(self.norms[1](self.reflected(x)))
        return self.head(torch.cat((left, right), 1).mean((2, 3)))


# --- grids ---


@pytest.mark.parametrize("bits", (2, 4, 8))
@pytest.mark.parametrize("low, high", ((0.0, 3.7), (-1.3, 2.4), (-0.01, 5.0)))
def test_grid(low, high, bits):
    grid = Grid.over(low, high, bits)
    bytes_ = torch.arange(grid.quant_max + 1)
    assert torch.equal(grid.bytes(grid.floats(bytes_)), bytes_.byte())
    assert grid.floats(torch.tensor(grid.zero_point)) == 0
    x = torch.linspace(low - 1, high + 1, 1001)
    error = (grid.round(x) - x.clamp(grid.low, grid.high)).abs().max()
    assert error <= grid.scale * 0.501
    assert torch.allclose(grid.round(x), grid.floats(grid.bytes(x)), atol=1e-6)


@pytest.mark.parametrize("padding", (0, 2))
def test_clipped_weights_lose_nothing(padding):
    """-sum |x - w| = -sum |x - clip(w)| - excess for every x within the range, zero padding included."""
    grid = Grid(0.25, 0, 4)
    x = torch.randint(0, 16, (2, 6, 5, 5)).double() * grid.scale
    w = torch.randn(4, 6, 3, 3, dtype=torch.float64) * 5
    geometry = ([1, 1], [padding] * 4, [1, 1], 1)
    clipped = reference.adder_conv2d(x, w.clamp(grid.low, grid.high), -excess(w, grid), *geometry)
    assert (clipped - reference.adder_conv2d(x, w, None, *geometry)).abs().max() < 1e-12
    assert excess(w, grid).min() > 1


def test_clusters():
    values = torch.tensor([5.0, 1.0, 1.1, 9.0, 5.2, 0.9, 9.1])
    assert cluster(values, 3).tolist() == [1, 0, 0, 2, 1, 0, 2]
    assert cluster(torch.ones(4), 3).tolist() == [0] * 4


# --- calibration ---


def test_calibration_covers_the_rank_of_the_largest_batch():
    model = nn.Sequential(AdderConv2d(1, 1, 1))
    batches = [torch.linspace(0, top, 10001).view(1, 1, 1, -1) for top in (1.0, 4.0, 2.0)]
    calibrate(model, batches, Scheme(rank=0.99))
    assert model[0].input_high == pytest.approx(3.96, abs=1e-3) and model[0].input_low == 0
    model = calibrate(nn.Sequential(AdderConv2d(1, 1, 1)), [-b for b in batches], Scheme(rank=0.99))
    assert model[0].input_low == pytest.approx(-3.96, abs=1e-3) and model[0].input_high == 0
    assert model[0].input_grid().zero_point == 255  # no step is wasted on a sign that inputs do not have


def test_calibration_leaves_the_model_as_it_was(network, images):
    model = copy.deepcopy(network).train()
    statistics = model.bn1.running_mean.clone()
    parameters, modules = dict(model.named_parameters()), dict(model.named_modules())
    calls = []
    model.layer1[0].conv1.register_forward_hook(lambda *_: calls.append(1))
    calibrate(model, [images])
    assert dict(model.named_modules()) == modules and calls
    assert model.training and torch.equal(model.bn1.running_mean, statistics)
    assert all(parameters[name] is p for name, p in model.named_parameters())
    assert list(model.state_dict()) != list(network.state_dict())
    assert len(quantized_layers(model)) == 20
    assert not any("forward" in vars(module) for module in model.modules())


def test_eight_bits_are_close_to_floats(network, images):
    model = calibrate(copy.deepcopy(network), [images])
    floats = network(images)
    assert (model(images) - floats).std() < 0.1 * floats.std()
    rough = calibrate(copy.deepcopy(network), [images], Scheme(bits=3))
    assert (rough(images) - floats).std() > 3 * (model(images) - floats).std()


def test_state_dict_carries_the_grids(network, images):
    model = calibrate(copy.deepcopy(network), [images])
    other = insert(resnet20().eval())
    with pytest.raises(RuntimeError, match="QuantAdderConv2d: expected a layer that has seen inputs"):
        other(images)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(images), model(images))
    with pytest.raises(RuntimeError, match="layer1.0.conv1.bits: expected 4, got 8"):
        insert(resnet20(), Scheme(bits=4)).load_state_dict(model.state_dict())


def test_reestimated_statistics_are_those_behind_the_rounded_layers(network, images):
    model = reestimate_batchnorm(calibrate(copy.deepcopy(network), [images], Scheme(bits=4)), [images])
    seen = []
    model.layer1[0].conv1.register_forward_hook(lambda layer, x, y: seen.append(y))
    model.train()(images)
    assert torch.allclose(model.layer1[0].bn1.running_mean, seen[0].mean((0, 2, 3)), rtol=1e-3)


# --- gradients ---


def test_gradients_go_straight_through(images):
    """At the rounded numbers AdderNet's own gradients (not the derivative), and none for inputs beyond the grid."""
    layer = AdderConv2d(3, 5, 3, padding=1, eta=None)
    model = calibrate(nn.Sequential(layer), [images], Scheme(bits=4, rank=0.95))
    x = images.clone().requires_grad_()
    y = model(x)
    grad_y = torch.randn(y.shape)
    y.backward(grad_y)
    grid = model[0].input_grid()
    rounded = [grid.round(t.detach()).double() for t in (images, layer.weight)]
    geometry = ([1, 1], [1] * 4, [1, 1], 1)
    want = reference.adder_conv2d_grad_w(grad_y.double(), *rounded, *geometry)
    assert torch.allclose(layer.weight.grad.double(), want, rtol=1e-3, atol=1e-2)
    want = reference.adder_conv2d_grad_x(grad_y.double(), *rounded, *geometry)
    reach = grid.scale / 2  # beyond the outermost numbers of the grid
    inside = (images > grid.low - reach + 1e-3) & (images < grid.high + reach - 1e-3)
    outside = (images < grid.low - reach - 1e-3) | (images > grid.high + reach + 1e-3)
    assert 0.9 < inside.float().mean() < 0.999
    assert torch.allclose(x.grad.double()[inside], want[inside], rtol=1e-3, atol=1e-3)
    assert x.grad[outside].abs().max() == 0


@pytest.mark.slow
def test_fine_tuning_takes_back_what_few_bits_cost(images):
    labels = torch.arange(len(images)) % 4  # which quarter is bright
    images = 0.3 * images
    for image, label in zip(images, labels.tolist(), strict=True):
        image[:, 16 * (label // 2) :, 16 * (label % 2) :][:, :16, :16] += 2
    model = trained(convert_to_adder(Everything(), verbose=False), images)
    model = calibrate(model, [images], Scheme(bits=4)).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    losses = []
    for _ in range(60):
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


# --- the integer network ---


def operators(integer) -> list[str]:
    return [str(node.target) for node in integer.graph.nodes if node.op == "call_function"]


def assert_close(integer, model, images):
    """Equal except where float32 rounding moves a few numbers to the next step of the grid."""
    got, want = integer(images), model(images)
    difference = ((got - want).abs().mean() / want.std()).item()
    assert difference < 0.03


@pytest.mark.parametrize("scheme", slow_except(SCHEMES[:1], SCHEMES), ids=str)
def test_the_integer_network_equals_the_fake_quantized_one(network, images, scheme, backend):
    model = calibrate(copy.deepcopy(network), [images], scheme)
    integer = convert(model, images)
    if scheme.bits == 8 and scheme.method == "redistribution":
        assert_close(integer, model, images)
    else:  # the integer network also rounds shortcuts, which fake-quantized layers do not
        got, want = integer(images), model(images)
        assert torch.corrcoef(torch.stack((got.flatten(), want.flatten())))[0, 1] > 0.9
    assert integer(images[:5]).shape == (5, 10)
    assert not any("adder_conv2d.default" in op or "batch_norm" in op for op in operators(integer))


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_everything_a_network_has_between_its_layers(images, scheme):
    model = calibrate(trained(Everything(), images), [images], scheme)
    assert_close(convert(model, images), model, images)


def test_lenet(images):
    grey = images[:, :1]
    model = calibrate(trained(lenet5(), grey), [grey])
    assert_close(convert(model, grey), model, grey)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ("vgg_small", "mobilenet", "resnet8", "ds_cnn", "torchvision/resnet18"))
def test_other_networks(images, arch):
    model = calibrate(trained(create_model(arch, "adder", 3, 10), images), [images])
    got, want = (
        convert(model, images)(images),
        model(images),
    )  # deep and random: one step early on becomes a large difference
    assert torch.corrcoef(torch.stack((got.flatten(), want.flatten())))[0, 1] > 0.8


@pytest.mark.slow
def test_activations_stay_uint8_from_layer_to_layer(network, images):
    """Of ResNet-20's 20 adder layers two are shortcuts and one is the last: only these output floats."""
    integer = convert(calibrate(copy.deepcopy(network), [images]), images)
    calls = [node for node in integer.graph.nodes if "adder_conv2d_int8" in str(node.target)]
    assert len(calls) == 20
    assert sum(not node.args[7] for node in calls) == 3
    assert sum("quantize" in op for op in operators(integer)) == 1
    assert not any(op.startswith(("aten.relu", "aten.add", "aten.max_pool")) for op in operators(integer))


@pytest.mark.slow
def test_bits_are_the_grid(network, images):
    integer = convert(calibrate(copy.deepcopy(network), [images], Scheme(bits=4)), images)
    weights = {name: w for name, w in integer.state_dict().items() if w.dtype == torch.uint8}
    assert len(weights) == 20 and max(int(w.max()) for w in weights.values()) == 15


def test_the_model_itself_may_be_a_layer(images):
    layer = calibrate(AdderConv2d(3, 4, 3), [images])
    assert torch.allclose(convert(layer, images)(images), layer(images), atol=1e-3)


@pytest.mark.slow
def test_converting_leaves_the_model_as_it_is(network, images):
    model = calibrate(copy.deepcopy(network), [images])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    convert(model, images)
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_wrong_models(network, images):
    with pytest.raises(ValueError, match="model: expected a calibrated one"):
        convert(network, images)
    with pytest.raises(ValueError, match="model: expected a network with AdderConv2d, got one without"):
        calibrate(nn.Sequential(nn.Conv2d(3, 4, 3)), [images])
    with pytest.raises(ValueError, match="batches: expected at least one, got none"):
        calibrate(copy.deepcopy(network), [])
    with pytest.raises(ValueError, match="batches: expected inputs that reach layer '0', got only zeros"):
        calibrate(nn.Sequential(AdderConv2d(3, 4, 3)), [images * 0])
    with pytest.raises(ValueError, match="model: expected a floating-point network, got one that is quantized already"):
        calibrate(calibrate(copy.deepcopy(network), [images]), [images])


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(bits=9), "bits: expected an integer from 2 to 8, got 9"),
        (dict(bits=1), "bits: expected an integer from 2 to 8, got 1"),
        (dict(method="best"), "method: expected one of redistribution, shared, got 'best'"),
        (dict(rank=0.0), "rank: expected a number above 0, at most 1, got 0.0"),
        (dict(ends="none"), "ends: expected one of float, int8, got 'none'"),
        (dict(filter_groups=0), "filter_groups: expected an integer from 1 to 256, got 0"),
        (dict(filter_groups=2, method="shared"), "filter_groups: expected 1 with method 'shared', got 2"),
    ],
    ids=str,
)
def test_wrong_schemes(options, message):
    with pytest.raises(ValueError, match=f"Scheme: {message}"):
        Scheme(**options)
