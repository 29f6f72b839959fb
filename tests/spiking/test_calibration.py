"""Calibration: counts, thresholds and corrections against their definitions, and the order of the calibrations."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from adderops.models import lenet5, resnet8
from adderops.models.resnet import BasicBlock
from adderops.spiking import IntegrateAndFire, as_cnn, sites, spiking
from adderops.spiking.calibration import add_least_squares, best_threshold, calibrate, converted


def test_count_of_a_constant_input():
    steps, v = 8, 1.5
    rates = torch.arange(-32, 64).view(1, -1, 1) / 16
    neuron = IntegrateAndFire(v, initial=v / 2, scaled=True)
    counts = [min(max(math.floor(steps * r / v + 0.5), 0), steps) for r in rates.flatten().tolist()]
    assert (neuron(rates.expand(steps, *rates.shape)).sum(0).flatten() / v).tolist() == counts


@pytest.mark.parametrize("steps", [1, 4, 32])
def test_best_threshold_by_brute_force(steps):
    activations = torch.randn(100, 3, 2, generator=torch.Generator().manual_seed(steps), dtype=torch.float64).relu_()
    activations[:, 1] *= 0.1
    activations[0, :2, 0] = torch.tensor([9.0, 0.9])  # outliers, which the best thresholds give up
    found = best_threshold(activations, steps)
    assert found.dtype == torch.float64 and found.shape == (3,)
    for channel, threshold in zip(activations.unbind(1), found.tolist(), strict=True):
        numbers, largest = channel.flatten().tolist(), channel.max().item()
        grid = [torch.tensor(largest * (100 - percent) / 100).bfloat16().item() for percent in range(95)]
        nearest = [[min(math.floor(a * steps / v + 0.5), steps) * v / steps for a in numbers] for v in grid]
        errors = [sum((a - r) ** 2 for a, r in zip(numbers, rates, strict=True)) for rates in nearest]
        assert threshold == grid[errors.index(min(errors))] < largest


def test_without_activations_the_threshold_is_one():
    assert best_threshold(torch.tensor([[0.0, 0.5], [0.0, 0.0]]), 1).tolist() == [1, 0.5]


def spikes_of(currents: torch.Tensor, v: torch.Tensor, initial: torch.Tensor) -> torch.Tensor:
    u, spikes = initial.expand_as(currents[0]), []
    for current in currents:
        u = u + current
        spikes.append((u >= v) * v)
        u = u - spikes[-1]
    return torch.stack(spikes)


def two_layers() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU(), nn.Conv2d(2, 2, 2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2))
    for parameter in model.parameters():  # multiples of 1/8: no sum below is rounded
        parameter.data = torch.randint(-8, 9, parameter.shape) / 8
    model[0].bias.data = model[2].bias.data = torch.tensor([0.5, 1.0])  # no channel without spikes
    return model.double()


@torch.no_grad()
def test_corrections_against_their_definitions():
    steps, model = 4, two_layers()
    images = (torch.randint(-32, 33, (8, 1, 3, 3)) / 16).double()
    wanted = [F.relu(model[0](images))]
    wanted.append(F.relu(model[2](wanted[0])))
    for calibration in ("none", "light", "advanced"):
        network = calibrate(model, images, steps, calibration)
        inputs = images.expand(steps, *images.shape)
        for layer, site, a in zip((0, 2), sites(network).values(), wanted, strict=True):
            conv, v = copy.deepcopy(model[layer]), best_threshold(a, steps)
            v = v[:, None, None]
            currents, initial = torch.stack([conv(x) for x in inputs]), v / 2
            if calibration == "light":
                shift = (a - spikes_of(currents, v, initial).mean(0)).mean((0, 2, 3))
                conv.bias += shift
                currents = torch.stack([conv(x) for x in inputs])
                assert shift.abs().max() > 1e-4
            if calibration == "advanced":
                add_least_squares(conv, [(inputs.mean(0), a - spikes_of(currents, v, initial).mean(0))])
                currents = torch.stack([conv(x) for x in inputs])
                initial = initial + steps * (a - spikes_of(currents, v, initial).mean(0)).mean(0)
                assert (conv.weight - model[layer].weight).abs().max() > 1e-4
            assert torch.equal(site.neuron.threshold, v.flatten()) and v[0] != v[1]
            for name, parameter in conv.named_parameters():
                found = network.get_parameter(f"{layer}.{name}")
                torch.testing.assert_close(found, parameter, rtol=0, atol=1e-12, check_stride=False)
            found = site.neuron.initial if calibration == "advanced" else site.neuron.initial[:, None, None]
            torch.testing.assert_close(found, initial, rtol=0, atol=1e-12)
            inputs = spikes_of(currents, v, initial)
        expected = model[5](inputs.mean(0).flatten(1))
        torch.testing.assert_close(network(images), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Linear(5, 3),
        nn.Conv2d(2, 3, 3, padding=1),
        nn.Conv2d(4, 6, (2, 3), stride=(2, 1), padding=(0, 2), dilation=(1, 2), groups=2),
        nn.Conv2d(4, 4, 2, padding="same", groups=4),
        nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:Using padding=.same. with even kernel")
def test_least_squares_of_the_layer_as_it_runs(layer, monkeypatch):
    layer = copy.deepcopy(layer).double()
    x = torch.randn(7, *([5] if isinstance(layer, nn.Linear) else [layer.in_channels, 6, 5]), dtype=torch.float64)
    y = torch.randn_like(layer(x))

    def output(weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(layer, {"weight": weight, "bias": bias}, x)

    parameters = tuple(parameter.detach().clone() for parameter in layer.parameters())
    jacobians = torch.func.jacrev(output, (0, 1))(*parameters)
    reads = jacobians[0].movedim(1, 0).flatten(1, -(layer.weight.dim() + 1)).flatten(2)  # (outputs, rows, weights)
    square = reads.square().sum((1, 2)) / layer.weight[0].numel()  # of what each output reads, summed over the rows
    ridge = (0.1 * square).sqrt().repeat_interleave(layer.weight[0].numel()).diag()
    a = torch.cat([jacobians[0].flatten(y.dim()), jacobians[1]], -1).flatten(0, -2)
    a = torch.cat([a, F.pad(ridge, (0, len(parameters[1])))])
    wanted = torch.linalg.lstsq(a, F.pad(y.flatten(), (0, len(ridge)))).solution
    monkeypatch.setattr("adderops.spiking.calibration.COLUMNS", 3 * x[0].numel() * layer.weight[0, 0].numel())
    with torch.no_grad():
        add_least_squares(layer, [(x[:5], y[:5]), (x[5:], y[5:])])
    found = torch.cat([(now - before).flatten() for now, before in zip(layer.parameters(), parameters, strict=True)])
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10)


def test_least_squares_of_what_is_never_active_moves_the_bias_alone():
    layer = nn.Conv2d(2, 2, 1, groups=2)
    before, x = copy.deepcopy(layer), torch.cat([torch.zeros(3, 1, 2, 2), torch.randn(3, 1, 2, 2)], 1)
    with torch.no_grad():
        add_least_squares(layer, [(x, torch.full_like(x, 0.25))])
    torch.testing.assert_close(layer.weight, before.weight, rtol=0, atol=1e-6)
    torch.testing.assert_close(layer.bias, before.bias + 0.25)


def test_before_a_pool_and_in_a_batchnorm_the_bias_alone_moves():
    layers = [nn.Conv2d(1, 2, 3), nn.MaxPool2d(2), nn.ReLU(), nn.Conv2d(2, 2, 1), nn.ReLU(), nn.AvgPool2d(2)]
    layers += [nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2)]
    torch.manual_seed(0)
    images, cnn = torch.randn(4, 1, 10, 10), nn.Sequential(*layers)
    none, light, advanced = (calibrate(cnn, images, 4, name) for name in ("none", "light", "advanced"))
    changed = [name for name, value in advanced.named_parameters() if not torch.equal(value, none.get_parameter(name))]
    assert changed == ["0.bias", "3.weight", "3.bias", "6.bias"]
    assert torch.equal(advanced.get_parameter("0.bias"), light.get_parameter("0.bias"))


def test_the_cnn_stays_as_it_is():
    model, images = lenet5("cnn"), torch.randn(4, 1, 32, 32)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    network = calibrate(model, images, 4)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(isinstance(module, nn.BatchNorm2d) for module in network.modules())
    assert model.training and not network.training
    network = converted(model.eval(), 4)
    with as_cnn(network):
        torch.testing.assert_close(network(images), model(images))


def test_a_max_pool_of_means():
    torch.manual_seed(0)
    model = nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(3, 1), nn.Conv2d(4, 2, 3))
    model.extend([nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8, 2)])
    x, seen = torch.randn(3, 1, 20, 20), {}
    for exact in (False, True):
        network = converted(model, 8) if exact else spiking(model, 8, lambda: IntegrateAndFire(scaled=True))
        for site in sites(network).values():
            site.neuron.threshold.fill_(0.75)
        network.get_submodule("spikes.0").register_forward_hook(lambda *call: seen.update(spikes=call[2]))
        network.get_submodule("4").register_forward_hook(lambda *call: seen.update(pooled=call[1][0]))
        network(x)
        spikes, pooled = (seen[name].unflatten(0, (8, 3)) for name in ("spikes", "pooled"))
        assert pooled.unique().tolist() == [0, 0.75]
        assert torch.equal(pooled.sum(0), F.max_pool2d(spikes.sum(0), 3, 1)) == exact
        with as_cnn(network):
            assert torch.equal(network(x), model(x))
    kinds = [type(module).__name__ for module in network.modules()]
    assert kinds.count("_SumsOverSteps") == kinds.count("_IncrementsOverSteps") == 1  # neither the first nor the last


def test_of_a_residual_sum_the_last_convolution_is_corrected():
    block = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU(), BasicBlock(nn.Conv2d, 2, 4, 1), nn.Flatten(), nn.Linear(64, 2))
    images = torch.randn(4, 1, 4, 4)
    none, light = (calibrate(block, images, 4, name) for name in ("none", "light"))
    changed = {name for name, bias in none.named_parameters() if not torch.equal(bias, light.get_parameter(name))}
    assert changed == {"0.bias", "2.conv1.bias", "2.conv2.bias"}


def test_a_deep_network_in_many_steps_is_the_cnn():
    torch.manual_seed(0)
    cnn, images = resnet8("cnn", in_channels=1).eval(), torch.randn(4, 1, 16, 16)
    wanted = cnn(images)
    error, shorter = ((calibrate(cnn, images, steps)(images) - wanted).square().mean() for steps in (128, 8))
    assert error < 0.01 * wanted.var() and error < 0.1 * shorter


def test_each_layer_runs_once_per_correction():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = resnet8("cnn", in_channels=1).eval()

        def forward(self, x: torch.Tensor, flag: bool = False) -> torch.Tensor:
            return self.network(x)

    images, runs = torch.randn(4, 1, 16, 16), []
    handle = nn.modules.module.register_module_forward_hook(lambda layer, *_: runs.append(type(layer)))
    try:
        for calibration, spiking_runs in (("none", 0), ("light", 2), ("advanced", 3)):
            runs.clear()
            calibrate(Model(), images, 8, calibration)
            assert runs.count(nn.Conv2d) == 9 * (1 + spiking_runs)  # and once as the CNN
    finally:
        handle.remove()


def test_refusals():
    images = torch.zeros(1, 1, 32, 32)
    with pytest.raises(ValueError, match="calibration: expected one of none, light, advanced, got 'best'"):
        calibrate(lenet5("cnn"), images, 4, "best")
    with pytest.raises(ValueError, match="images: expected at least one, got none"):
        calibrate(lenet5("cnn"), images[:0], 4)
    with pytest.raises(ValueError, match="steps: expected at least 1, got 0"):
        calibrate(lenet5("cnn"), images, 0)
    model = nn.Sequential(nn.Conv2d(1, 1, 3), nn.ReLU(), nn.MaxPool2d(2), nn.ReLU(), nn.Flatten())
    with pytest.raises(ValueError, match="a layer with a bias before each ReLU, got none before spikes.1"):
        calibrate(model, images, 4, "light")
