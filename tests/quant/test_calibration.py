"""`calibrate` and `convert` on models as they occur in practice: correct, or refused by name."""

import copy
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from adderops import AdderConv2d
from adderops.models import lenet5
from adderops.quant import Scheme, calibrate, convert, insert, reestimate_batchnorm
from adderops.quant.calibration import calibrate_ends, quantized_layers


@pytest.fixture(scope="module")
def batches():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(8, 1, 32, 32, generator=generator) for _ in range(2)]


@pytest.fixture
def network(batches):
    torch.manual_seed(0)
    return reestimate_batchnorm(lenet5(), batches).eval()


@pytest.fixture
def logits(network, batches):
    """Logits of the integer network, calibrated on plain batches."""
    return convert(calibrate(copy.deepcopy(network), batches), batches[0])(batches[0])


def relative(got, want):
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


# --- batches of every kind ---


@pytest.mark.slow
def test_batches_as_loaders_give_them(network, batches, logits):
    pairs = torch.utils.data.TensorDataset(torch.cat(batches), torch.zeros(16))
    for form in (
        torch.utils.data.DataLoader(pairs, batch_size=8),
        (batch for batch in batches),
        [[batch, None] for batch in batches],
    ):
        model = calibrate(copy.deepcopy(network), form)
        assert torch.equal(convert(model, batches[0])(batches[0]), logits)


def unchanged(model, before):
    return (
        not quantized_layers(model)
        and list(model.state_dict()) == list(before.state_dict())
        and all(
            torch.equal(a, b) for a, b in zip(model.state_dict().values(), before.state_dict().values(), strict=True)
        )
        and [m.training for m in model.modules()] == [m.training for m in before.modules()]
        and all(vars(a).keys() == vars(b).keys() for a, b in zip(model.modules(), before.modules(), strict=True))
    )


def with_value(x, value):
    x = x.clone()
    x[3, 0, 5, 5] = value
    return x


@pytest.mark.parametrize("scheme", (Scheme(), Scheme(ends="int8")), ids=str)
def test_a_failure_leaves_the_model_as_it_was(network, batches, scheme):
    network.train()
    network.bn2.eval()  # frozen
    before = copy.deepcopy(network)

    def stopping():
        yield batches[0]
        raise KeyboardInterrupt

    wrong = (
        (lambda: [], ValueError, "batches: expected at least one, got none"),
        (lambda: [{"image": batches[0]}], TypeError, r"expected tensors or \(images, labels\), got dict"),
        (lambda: batches[0], TypeError, "batches: expected an iterable of batches, got one tensor"),
        (
            lambda: [batches[0], with_value(batches[1], float("nan"))],
            ValueError,
            "NaN or infinity in image 4 of batch 2",
        ),
        (lambda: [with_value(batches[0], -float("inf"))], ValueError, "NaN or infinity in image 4 of batch 1"),
        (lambda: [torch.zeros(2, 3, 32, 32)], RuntimeError, "channels"),
        (stopping, KeyboardInterrupt, ""),
    )
    for make, error, message in wrong:
        with pytest.raises(error, match=message):
            calibrate(network, make(), scheme)
        assert unchanged(network, before)
    calibrate(network, batches, scheme)
    assert network.training and not network.bn2.training and network.bn3.training


def test_infinity_that_arises_inside_names_layer_and_batch(network, batches):
    network.bn2.weight.data.fill_(3e38)
    with pytest.raises(ValueError, match="expected finite inputs of 'conv3', got NaN or infinity in batch 1"):
        calibrate(network, batches)


# --- models of every kind ---


@pytest.mark.slow
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float64), ids=str)
def test_models_of_other_dtypes(network, batches, dtype):
    model = calibrate(network.to(dtype), [batch.to(dtype) for batch in batches])
    x = batches[0].to(dtype)
    assert relative(convert(model, x)(x), model(x)) < (0.05 if dtype == torch.bfloat16 else 0.01)


@pytest.mark.slow
def test_under_autocast(network, batches, logits):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        integer = convert(calibrate(network, batches), batches[0])
    assert "bfloat16" not in integer.code
    assert relative(integer(batches[0]), logits) < 0.05


@pytest.mark.slow
@pytest.mark.parametrize("wrap", (torch.compile, nn.DataParallel, lambda m: nn.DataParallel(torch.compile(m))))
def test_wrapped_models(network, batches, logits, wrap):
    wrapped = wrap(network)
    assert calibrate(wrapped, batches) is network
    assert torch.equal(convert(wrapped, batches[0])(batches[0]), logits)


@pytest.mark.slow
def test_compiled_parts(network, batches, logits):
    network.conv3 = torch.compile(network.conv3, backend="eager")
    network.compile(backend="eager")
    network(batches[0])
    assert torch.equal(convert(calibrate(network, batches), batches[0])(batches[0]), logits)


class Auxiliary(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.a, self.bn = nn.Conv2d(1, 8, 3), AdderConv2d(8, 8, 3), nn.BatchNorm2d(8)
        self.aux, self.fc = AdderConv2d(8, 8, 3), nn.Linear(8, 2)

    def forward(self, x):
        x = self.stem(x).relu()
        y = self.fc(self.bn(self.a(x)).relu().mean((2, 3)))
        return (y, self.aux(x)) if self.training else y


def test_heads_that_run_in_training_only(batches):
    model = reestimate_batchnorm(Auxiliary(), batches).eval()
    with pytest.warns(UserWarning, match="calibrate: no batch reaches 'aux' in evaluation"):
        calibrate(model, batches)
    integer = convert(model, batches[0])
    assert relative(integer(batches[0]), model(batches[0])) < 1e-3
    assert not any("aux" in name for name in integer.state_dict())
    logits, aux = model.train()(batches[0])  # fine-tuning: the head is not quantized
    assert torch.equal(aux, AdderConv2d.forward(model.aux, model.stem(batches[0]).relu()))
    other = insert(Auxiliary())
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.eval()(batches[0]), model.eval()(batches[0])) and other.aux.in_floats


def test_a_dead_layer(batches):
    model = nn.Sequential(AdderConv2d(1, 4, 3), nn.ReLU(), AdderConv2d(4, 4, 3))  # sums of distances are negative
    with pytest.warns(UserWarning, match="only zeros reach '2'"):
        calibrate(model, batches)
    assert torch.allclose(convert(model, batches[0])(batches[0]), model(batches[0]), atol=1e-3)
    with pytest.raises(ValueError, match="expected inputs that reach layer '0', got only zeros there"):
        calibrate(nn.Sequential(AdderConv2d(1, 4, 3)), [batches[0] * 0])


class Tied(nn.Module):
    """One adder layer, twice; with one BatchNorm or two, one module, two names or one weight."""

    def __init__(self, kind):
        super().__init__()
        self.stem, self.bn0 = nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.body, self.bn1 = AdderConv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.again, self.bn2 = self.body, self.bn1
        if kind in ("two norms", "weight"):
            self.bn2 = nn.BatchNorm2d(16)
        if kind == "weight":
            self.again = AdderConv2d(16, 16, 3, padding=1)
            self.again.weight = self.body.weight
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        x = 3 * self.bn0(self.stem(x)).relu()
        x = self.bn1(self.body(x)).relu()
        return self.head(self.bn2(self.again(x)).relu().mean((2, 3)))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ("one norm", "two norms", "weight"))
@pytest.mark.parametrize(
    "scheme", (Scheme(), pytest.param(Scheme(bits=5, filter_groups=2, rank=1.0), marks=pytest.mark.slow)), ids=str
)
def test_layers_that_run_twice_and_shared_weights(batches, kind, scheme):
    torch.manual_seed(0)
    model = calibrate(reestimate_batchnorm(Tied(kind), batches).eval(), batches, scheme)
    assert relative(convert(model, batches[0])(batches[0]), model(batches[0])) < 0.02
    weights = [
        w for w in convert(model, batches[0]).state_dict().values() if w.dtype == torch.uint8 and w.numel() > 1e3
    ]
    assert kind == "weight" or scheme.filter_groups > 1 or len(weights) == 1  # stored once


def small_weights(batches):
    """Inputs reach about 4, weights 0.4."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(1, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), AdderConv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32)),
        *(nn.ReLU(), AdderConv2d(32, 32, 3), nn.BatchNorm2d(32), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    )
    with torch.no_grad():
        for i in (3, 6):
            model[i].weight.mul_(0.1 * torch.linspace(0.2, 1, 32)[:, None, None, None])
    return reestimate_batchnorm(model, batches).eval()


@pytest.mark.slow
@pytest.mark.parametrize("groups", (2, 4))
def test_filter_groups_lose_nothing_of_inputs_beyond_their_grids(batches, groups):
    model = small_weights(batches)
    want = model(batches[0])
    scheme = Scheme(filter_groups=groups)
    rounded = reestimate_batchnorm(calibrate(copy.deepcopy(model), batches, scheme), batches).eval()
    for network in (rounded, convert(rounded, batches[0])):
        assert (network(batches[0]) - want).norm() < 0.05 * (want - want.mean(0)).norm()


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.layer, self.norm = nn.Conv2d(1, 8, 3), AdderConv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.last = AdderConv2d(8, 4, 3)

    def forward(self, x):
        x = self.stem(x).relu()
        return self.last((self.norm(self.layer(x)) + x).relu())


def test_filter_groups_with_a_residual(batches):
    torch.manual_seed(0)
    model = Residual()
    model.layer.weight.data.mul_(0.05 * torch.linspace(0.3, 1, 8)[:, None, None, None])
    model = calibrate(reestimate_batchnorm(model, batches).eval(), batches, Scheme(filter_groups=2))
    assert relative(convert(model, batches[0])(batches[0]), model(batches[0])) < 0.01


def test_without_batchnorm_behind_six_bits_do(batches):
    """Sums of distances are all negative: a grid of both signs would waste half of its steps."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(1, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), AdderConv2d(16, 16, 3, padding=1)),
        *(AdderConv2d(16, 16, 3), nn.BatchNorm2d(16), nn.Flatten()),
    )
    model = reestimate_batchnorm(model, batches).eval()
    want = model(batches[0])
    rounded = reestimate_batchnorm(calibrate(copy.deepcopy(model), batches, Scheme(bits=6)), batches).eval()
    grid = rounded[4].input_grid()
    assert (grid.low, grid.zero_point) == (pytest.approx(-grid.scale * 63), 63)
    got = convert(rounded, batches[0])(batches[0])
    assert torch.corrcoef(torch.stack((got.flatten(), want.flatten())))[0, 1] > 0.95


@pytest.mark.slow
def test_hooks_that_watch_see_numbers(network, batches, logits):
    seen = []
    network.conv2.register_forward_hook(lambda layer, x, y: seen.append(y.mean().item()))
    network.conv3.register_forward_hook(lambda layer, x, y: setattr(layer, "kept", y))
    network(batches[0])  # under autograd: `kept` is not a leaf
    calibrate(network, batches)
    assert torch.equal(convert(network, batches[0])(batches[0]), logits)
    assert all(isinstance(value, float) for value in seen)
    assert len(network.conv2._forward_hooks) == 1


def test_hooks_that_change_the_result_are_kept(network, batches, logits):
    network.conv2.register_forward_hook(lambda layer, x, y: 0.5 * y)
    model = calibrate(network, batches)
    integer = convert(model, batches[0])
    assert relative(integer(batches[0]), model(batches[0])) < 0.01 and relative(integer(batches[0]), logits) > 0.05


class Subclass(AdderConv2d):
    pass


def test_layers_that_are_refused_by_name(network, batches):
    def replaced(name, module):
        model = copy.deepcopy(network)
        model.set_submodule(name, module)
        return model

    pruned, patched, normed = (copy.deepcopy(network) for _ in range(3))
    prune.l1_unstructured(pruned.conv2, "weight", 0.5)
    patched.conv2.forward = patched.conv2.forward
    nn.utils.parametrizations.weight_norm(normed.conv2)
    for model, message in (
        (
            replaced("bn3", nn.BatchNorm2d(16, track_running_stats=False)),
            "model: bn3: expected a BatchNorm with running",
        ),
        (replaced("conv2", Subclass(6, 16, 5)), "model: conv2: expected AdderConv2d itself, got Subclass"),
        (normed, "model: conv2: expected AdderConv2d itself, got ParametrizedAdderConv2d"),
        (pruned, "model: conv2: expected a weight that is a parameter, got one that is computed"),
        (patched, "model: conv2: expected its class's forward, got another one"),
    ):
        with pytest.raises(ValueError, match=message):
            calibrate(model, batches)
        assert not quantized_layers(model)


# --- schemes and examples ---


def test_numbers_of_numpy():
    scheme = Scheme(np.int64(6), rank=np.float32(0.5), filter_groups=np.uint8(2))
    assert scheme == Scheme(6, rank=0.5, filter_groups=2)
    assert [type(value) for value in (scheme.bits, scheme.rank, scheme.filter_groups)] == [int, float, int]


@pytest.mark.parametrize(
    "options", ({"bits": 8.0}, {"bits": True}, {"bits": "8"}, {"rank": "1"}, {"filter_groups": 2.5})
)
def test_numbers_of_other_types(options):
    with pytest.raises(ValueError, match=f"Scheme: {next(iter(options))}: expected"):
        Scheme(**options)


def test_examples(network, batches, logits):
    model = calibrate(network, batches).train()
    assert torch.equal(convert(model, batches[0][:1])(batches[0]), logits) and model.training
    for example, error, message in (
        (torch.zeros(2, 3, 32, 32), ValueError, r"example: expected an input of the model, got shape \(2, 3, 32, 32\)"),
        (torch.zeros(2, 1, 9, 9), ValueError, "example: expected an input of the model"),
        (
            torch.zeros(2, 1, 32, 32, dtype=torch.uint8),
            TypeError,
            "example: expected a tensor of floats, got torch.uint8",
        ),
        (batches, TypeError, "example: expected a tensor of floats, got list"),
        (batches[0][:0], ValueError, r"example: expected \(N, ...\) with N >= 1"),
    ):
        with pytest.raises(error, match=message):
            convert(model, example)


def test_the_plain_way_warns_of_nothing(network, batches):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        calibrate(network, batches)


# --- ends of a fine-tuned model ---


def test_ends_can_follow_later(network, batches):
    """The adder layers keep their grids; the ends get those of their inputs behind the rounded layers."""
    both = calibrate(copy.deepcopy(network), batches, Scheme(bits=5, ends="int8"))
    model = calibrate(network, batches, Scheme(bits=5))
    before = {name: layer.grids() for name, layer in quantized_layers(model).items()}
    logits = model(batches[0])
    assert calibrate_ends(model, batches) is model
    layers = quantized_layers(model)
    assert list(layers) == ["conv1", "conv2", "conv3", "conv4", "fc"]
    assert all(layer.scheme == Scheme(bits=5, ends="int8") for layer in layers.values())
    assert all(str(layers[name].grids()) == str(grids) for name, grids in before.items())
    assert layers["conv1"].input_grid() == both.conv1.input_grid()
    assert layers["fc"].input_grid().scale == pytest.approx(both.fc.input_grid().scale, rel=0.2)
    assert 0 < relative(model(batches[0]), logits) < 0.2
    assert convert(model, batches[0]).conv1.weight.dtype == torch.int8


def test_ends_of_a_wrong_model(network, batches):
    with pytest.raises(ValueError, match="model: expected a calibrated one with its ends in floating point, got none"):
        calibrate_ends(network, batches)
    model = calibrate(copy.deepcopy(network), batches)
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match="batches: expected at least one, got none"):
        calibrate_ends(model, [])
    assert list(quantized_layers(model)) == list(quantized_layers(before)) and type(model.conv1) is nn.Conv2d
    assert model.conv2.scheme == Scheme() and list(model.state_dict()) == list(before.state_dict())
    calibrate_ends(model, batches)
    with pytest.raises(ValueError, match="with its ends in floating point, got one with its ends"):
        calibrate_ends(model, batches)
