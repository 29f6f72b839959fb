"""Operations of spiking networks: those by hand, and those by loops over the spikes that layers get."""

import copy
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adderops.models import create_model
from adderops.operations import LayerOperations, Operations, count_operations, count_spiking_operations, energy
from adderops.spiking import IntegrateAndFire, Spikes, as_cnn, sites, spiking


def rows(network: nn.Module, images: Tensor) -> dict[str, tuple[int, int]]:
    """name -> multiplications, additions"""
    return {row.name: (row.multiplications, row.additions) for row in count_spiking_operations(network, images).layers}


def inputs_of(network: nn.Module, name: str, images: Tensor) -> Tensor:
    """What a layer gets."""
    found = []
    hook = network.get_submodule(name).register_forward_pre_hook(lambda module, args: found.append(args[0].clone()))
    with torch.no_grad():
        network(images)
    hook.remove()
    return torch.cat(found)


def identity(features: int, **options) -> nn.Linear:
    layer = nn.Linear(features, features, bias=False)
    nn.init.eye_(layer.weight)
    return layer


def by_hand(**options) -> tuple[nn.Module, Tensor]:
    """Neurons that get 0.5, 1, 0 and, for the second image, 1, 1, 0.25: 2 + 4 + 0 and 4 + 4 + 1 spikes in 4 steps.

    The layer behind them sums the spikes of a step, twice: 0.25 each for two neurons.
    """
    second = nn.Linear(3, 2, bias=False)
    nn.init.constant_(second.weight, 0.25)
    cnn = nn.Sequential(identity(3), nn.ReLU(), second, nn.ReLU(), nn.Linear(2, 5))
    return spiking(cnn.eval(), 4, lambda: IntegrateAndFire(**options)), torch.tensor([[0.5, 1, 0], [1, 1, 0.25]])


def test_layers_and_neurons_by_hand():
    """15 spikes of two images for 2 outputs: 15 additions per image. Of the six sums of 0.25 of the first image one
    neuron makes 1 spike, of nine of the second 2: 3 spikes per image for two neurons."""
    network, images = by_hand()
    counted = count_spiking_operations(network, images)
    assert counted.layers == (
        LayerOperations("0", "Linear", 9, 9),
        LayerOperations("spikes.0", "IntegrateAndFire", 0, 4 * 3 + 8),  # 7.5, to the even number
        LayerOperations("2", "Linear", 0, 15),
        LayerOperations("spikes.1", "IntegrateAndFire", 0, 4 * 2 + 3),
        LayerOperations("4", "Linear", 10, 10),
    )
    assert counted.rates == {"spikes.0": 15 / 24, "spikes.1": 6 / 16}
    assert energy(counted) == pytest.approx(19 * 3.7 + (9 + 20 + 15 + 11 + 10) * 0.9)
    assert isinstance(counted, Operations) and str(counted).splitlines()[-1].split() == ["total", "19", "65"]


def test_a_leak_is_a_multiplication():
    network, images = by_hand(decay=0.5)
    counted = rows(network, images)
    assert (counted["spikes.0"][0], counted["spikes.1"][0]) == (4 * 3, 4 * 2) and counted["2"][0] == 0
    for_training = by_hand(decay=0.5, scaled=True, gradient="rate")[0]  # computes more, for its gradient
    assert rows(for_training, images) == rows(by_hand(decay=0.5, scaled=True)[0], images)

    class Other(nn.Module):
        """A neuron of another library, with the name that SpikingJelly has for the leak."""

        def reset(self):
            pass

        def forward(self, x):
            return (x >= 1).to(x.dtype)

    cnn = nn.Sequential(identity(3), nn.ReLU(), nn.Linear(3, 2))
    for names, leaks in (({}, 0), ({"tau": 2.0}, 12)):
        network = spiking(cnn, 4, Other)
        vars(network.get_submodule("spikes.0.neuron")).update(names)
        assert count_spiking_operations(network, images).layers[1] == LayerOperations("spikes.0", "Other", leaks, 18)


# --- convolutions and pools by loops ---


def spikes_in_windows(x: Tensor, kernel, stride, padding, dilation) -> Tensor:
    """Sum over each channel's window at each place, (N, C, OH, OW), by loops; x is not padded further."""
    x = F.pad(x, (padding[1],) * 2 + (padding[0],) * 2)
    size = [(n - d * (k - 1) - 1) // s + 1 for n, k, s, d in zip(x.shape[2:], kernel, stride, dilation, strict=True)]
    sums = torch.zeros(*x.shape[:2], *size)
    for (row, column), i, j in product(product(*map(range, size)), range(kernel[0]), range(kernel[1])):
        sums[:, :, row, column] += x[:, :, row * stride[0] + i * dilation[0], column * stride[1] + j * dilation[1]]
    return sums


def behind(layers: list[nn.Module], channels: int = 4, **options) -> tuple[nn.Module, Tensor]:
    """Layers between neurons that spike in all patterns, and images for them."""
    torch.manual_seed(0)
    cnn = nn.Sequential(nn.Conv2d(1, channels, 3), nn.ReLU(), *layers, nn.ReLU(), nn.AdaptiveAvgPool2d(1))
    return spiking(cnn.eval(), 3, lambda: IntegrateAndFire(0.25, **options)), torch.randn(2, 1, 11, 9)


@pytest.mark.parametrize(
    "options",
    [
        dict(out_channels=5, kernel_size=3),
        dict(out_channels=6, kernel_size=(3, 2), stride=(2, 3), padding=(1, 2), groups=2),
        dict(out_channels=8, kernel_size=3, padding=2, dilation=2, groups=4, bias=False),
        dict(out_channels=3, kernel_size=3, padding="same"),
        dict(out_channels=3, kernel_size=3, padding=1, padding_mode="circular"),
    ],
)
@pytest.mark.parametrize("scaled", [False, True])
def test_a_spike_counts_for_each_output_that_it_reaches(options, scaled):
    conv = nn.Conv2d(4, **options)
    network, images = behind([conv], scaled=scaled)
    spikes = inputs_of(network, "2", images).ne(0).float()
    assert 0.1 < spikes.mean() < 0.9
    padding = (1, 1) if conv.padding == "same" else conv.padding
    if conv.padding_mode == "circular":
        spikes, padding = F.pad(spikes, (1, 1, 1, 1), mode="circular"), (0, 0)
    windows = spikes_in_windows(spikes, conv.kernel_size, conv.stride, padding, conv.dilation)
    additions = windows.sum().item() * conv.out_channels / conv.groups
    assert rows(network, images)["2"] == (0, round(additions / 2))


def test_a_transposed_convolution_spreads_each_spike():
    network, images = behind([nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2)])
    spikes = inputs_of(network, "2", images).ne(0).sum().item()
    assert rows(network, images)["2"] == (0, round(spikes * 3 * 4 / 2))


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("as_module", [False, True])
def test_an_average_counts_the_spikes_that_it_has(scaled, as_module):
    """Overlapping windows with padding, whose averages have up to nine values; then moved, for a linear layer."""

    class Pool(nn.Module):
        def forward(self, x):
            return F.avg_pool2d(x, 3, 2, 1, False, False)

    pool = nn.AvgPool2d(3, 2, 1, count_include_pad=False) if as_module else Pool()
    network, images = behind([pool, nn.Flatten(), nn.Linear(4 * 5 * 4, 7), nn.Unflatten(1, (7, 1, 1))], scaled=scaled)
    name = "2" if as_module else "spikes.0"
    if as_module:
        spikes = inputs_of(network, name, images).ne(0).float()
    else:
        found = []
        network.get_submodule(name).register_forward_hook(lambda module, args, output: found.append(output.clone()))
        network(images)
        spikes = found[0].ne(0).float()
    windows = spikes_in_windows(spikes, (3, 3), (2, 2), (1, 1), (1, 1))
    assert windows.unique().numel() > 4
    assert rows(network, images)["4"] == (0, round(7 * windows.sum().item() / 2))


def test_a_maximum_is_one_spike():
    network, images = behind([nn.MaxPool2d(2), nn.AvgPool2d(2, 1), nn.Conv2d(4, 6, 1)])
    spikes = inputs_of(network, "3", images).ne(0).float()
    windows = spikes_in_windows(spikes, (2, 2), (1, 1), (0, 0), (1, 1))
    assert rows(network, images)["4"] == (0, round(6 * windows.sum().item() / 2))


class Branches(nn.Module):
    """Sums and concatenations of spikes, of heights that differ."""

    def __init__(self, join) -> None:
        super().__init__()
        self.first, self.join = identity(3), join
        self.second = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.second(self.join(F.relu(self.first(x)), F.relu(x)))).sum(1, keepdim=True)


@pytest.mark.parametrize("height", [1.0, 3.0])
def test_a_sum_of_spikes_counts_both(height):
    """Image 1 of 4 steps: 2 + 4 + 0 spikes in one branch, as many in the other."""
    network = spiking(Branches(torch.add).eval(), 4, lambda: IntegrateAndFire(scaled=True))
    network.get_submodule("spikes.1.neuron").threshold.fill_(height)  # 0 + 1 + 0 spikes at height 3
    assert rows(network, torch.tensor([[0.5, 1, 0]]))["second"] == (0, 2 * (6 + (6 if height == 1 else 1)))


def test_what_is_no_spike_takes_products():
    """A current added in place to spikes: the layer behind takes a product per weight and step."""

    class Current(Branches):
        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.second(F.relu(self.first(x)).add_(x)))

    images = torch.tensor([[0.5, 1, 0.1], [0.2, 1, 0]])
    assert rows(spiking(Current(None).eval(), 4, IntegrateAndFire), images)["second"] == (4 * 6, 4 * 6)


class OneLayerOf(nn.Module):
    """Neurons without `spiking`, that a mask silences."""

    def __init__(self) -> None:
        super().__init__()
        self.spikes = Spikes(IntegrateAndFire(), 4, constant=True)
        self.fc = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.spikes(x) * torch.tensor([1.0, 0.0, 1.0])).unflatten(0, (4, -1)).sum(0)


def test_one_value_in_each_step_is_a_spike():
    """The second neuron is silenced; an image of one value, and rates of one value, take products like any other."""
    counted = rows(OneLayerOf(), torch.tensor([[0.5, 1, 0.25]]))
    assert counted == {"spikes": (0, 12 + 7), "fc": (0, 3 * 2)}
    network, _ = by_hand()
    for images in (torch.ones(1, 3), torch.zeros(30, 3)):  # thirty images run in two parts
        counted = rows(network, images)
        assert (counted["0"], counted["4"]) == ((9, 9), (10, 10))


@pytest.mark.parametrize("channels_differ", [True, False])
def test_one_value_per_channel_is_a_spike(channels_differ):
    """Squares of spikes, which the counter does not follow; noise within a channel is no spike."""

    class Squares(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.relu, self.conv = nn.Conv2d(1, 2, 1, bias=False), nn.ReLU(), nn.Conv2d(2, 5, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.relu(self.conv(self.relu(self.first(x)) ** 2)).sum((2, 3))

    network = spiking(Squares(), 4, lambda: IntegrateAndFire(scaled=True)).eval()
    network.first.weight.data.fill_(1)
    in_rows = torch.tensor([[0.5, 0.5], [2, 2]]).repeat(2, 1, 1)  # of neurons, in both channels
    network.get_submodule("spikes.0.neuron").threshold = torch.tensor([0.5, 2]) if channels_differ else in_rows
    counted = rows(network, torch.ones(1, 1, 2, 2))["conv"]
    fired = 4 * 4 + 4 * 2  # of 0.5 in each step, of 2 in every second one
    assert counted == ((0, 5 * fired) if channels_differ else (4 * 4 * 10, 4 * 4 * 10))


# --- networks of the zoo ---


@pytest.mark.parametrize("name, shape", [("lenet5", (1, 32, 32)), ("resnet8", (3, 32, 32))])
def test_layers_between_neurons_only_add(name, shape):
    """Against convolutions of the spikes with ones; the first layer and the classifier count as those of the CNN."""
    torch.manual_seed(0)
    network = spiking(create_model(name, "cnn", shape[0], 10).eval(), 2, lambda: IntegrateAndFire(0.1))
    images = torch.randn(2, *shape)
    counted = rows(network, images)
    with as_cnn(network):
        terms = {row.name: row.additions for row in count_operations(network, images).layers}
    assert counted.keys() == terms.keys() | sites(network).keys()
    assert counted["conv1"] == (terms["conv1"],) * 2 and counted["fc"] == (terms["fc"],) * 2
    for layer in terms.keys() - {"conv1", "fc"}:
        conv, spikes = network.get_submodule(layer), inputs_of(network, layer, images).ne(0).double()
        ones = torch.ones_like(conv.weight, dtype=torch.float64)
        additions = F.conv2d(spikes, ones, None, conv.stride, conv.padding).sum().item()
        assert counted[layer] == (0, round(additions / 2)) and additions > 0


def test_per_image_and_without_a_trace():
    """The mean over more images than run at once; state, mode and hooks stay as they are."""
    torch.manual_seed(0)
    network, images = by_hand()
    network.train()
    state = copy.deepcopy(network.state_dict())
    assert count_spiking_operations(network, images.repeat(20, 1)) == count_spiking_operations(network, images)
    assert all(module.training for module in network.modules())
    assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())


def test_refusals():
    network, images = by_hand()
    with pytest.raises(
        ValueError, match="count_operations: model: expected one whose .*: use count_spiking_operations"
    ):
        count_operations(network, images)
    with pytest.raises(ValueError, match="network: expected a spiking network, got Linear without neurons"):
        count_spiking_operations(nn.Linear(3, 2), images)
    with as_cnn(network), pytest.raises(ValueError, match="expected a spiking network, got"):
        count_spiking_operations(network, images)
    for none in (images[:0], images[0]):
        with pytest.raises(ValueError, match=r"images: expected \(N, ...\) with N >= 1, got"):
            count_spiking_operations(network, none)
