"""A CNN becomes a spiking network: where the neurons are, where steps begin and end, what is shared."""

import copy
import pickle
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from slow import slow_except
from torch import nn

from adderops.batchnorm import reestimate_batchnorm
from adderops.models import create_model
from adderops.spiking import IntegrateAndFire, Spikes, as_cnn, integrate_and_fire, set_steps, sites, spiking

STEPS = 4
NEURON = partial(IntegrateAndFire, threshold=1.0, fire=0.5, scaled=True)


def images(size: int = 8, channels: int = 2, count: int = 3) -> torch.Tensor:
    return torch.randn(count, channels, size, size, generator=torch.Generator().manual_seed(0))


def fire(current: torch.Tensor) -> torch.Tensor:
    return integrate_and_fire(current, 1.0, fire=0.5, scaled=True)


def constant(x: torch.Tensor) -> torch.Tensor:
    return x.expand(STEPS, *x.shape)


def each_step(layer, spikes: torch.Tensor) -> torch.Tensor:
    """Applies a layer step by step."""
    return torch.stack([layer(s) for s in spikes])


class Plain(nn.Module):
    """conv - relu - pool - conv - relu - mean - linear, each ReLU written in another way."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.relu, self.fc = nn.ReLU(inplace=True), nn.Linear(4, 5)

    def forward(self, x):
        x = F.max_pool2d(self.relu(self.a(x)), 2)
        x = self.b(x).relu()
        return self.fc(x.mean((2, 3)))


class PreActivation(nn.Module):
    """A residual block whose shortcut is the constant current of the first convolution, then one of spikes."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(i, 4, 3, padding=1) for i in (2, 4, 4))
        self.fc = nn.Linear(4, 5)

    def forward(self, x):
        x = self.a(x)
        x = x + self.b(torch.relu(x))
        x = x + self.c(F.relu(x))
        return self.fc(F.relu(x).mean((2, 3)))


class TwoHeads(nn.Module):
    """A head after the first ReLU, one after the second, and the size of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 3)
        self.early, self.late = nn.Linear(4, 5), nn.Linear(4 * 16, 5)

    def forward(self, x):
        x = F.relu6(self.a(x))
        early = self.early(x.mean((2, 3)))
        x = F.relu(self.b(x))
        return early, {"late": self.late(x.view(x.size(0), -1))}


# --- the network, step by step ---


def test_plain_network():
    model, x = Plain().eval(), images()
    network = spiking(model, STEPS, NEURON)
    spikes = fire(constant(model.a(x)))
    spikes = fire(each_step(lambda s: model.b(F.max_pool2d(s, 2)), spikes))
    torch.testing.assert_close(network(x), model.fc(spikes.mean(0).mean((2, 3))), rtol=0, atol=1e-6)
    assert [site.constant for site in sites(network).values()] == [True, False]
    assert spikes.count_nonzero() not in (0, spikes.numel())


def test_a_constant_current_at_a_shortcut_is_repeated():
    model, x = PreActivation().eval(), images()
    network = spiking(model, STEPS, NEURON)
    current = constant(model.a(x))
    current = current + each_step(model.b, fire(current))
    current = current + each_step(model.c, fire(current))
    expected = model.fc(fire(current).mean(0).mean((2, 3)))
    torch.testing.assert_close(network(x), expected, rtol=0, atol=1e-6)
    assert [site.constant for site in sites(network).values()] == [True, False, False]


def test_several_heads():
    model, x = TwoHeads().eval(), images()
    network = spiking(model, STEPS, NEURON)
    first = fire(constant(model.a(x)))
    second = fire(each_step(model.b, first))
    early, late = network(x)
    torch.testing.assert_close(early, model.early(first.mean(0).mean((2, 3))), rtol=0, atol=1e-6)
    torch.testing.assert_close(late["late"], model.late(second.mean(0).flatten(1)), rtol=0, atol=1e-6)
    assert [site.activation for site in sites(network).values()] == [F.relu6, F.relu]


def test_without_a_head_the_rates_are_the_output():
    network = spiking(nn.Sequential(nn.Linear(3, 4), nn.ReLU()), STEPS, NEURON)
    x = torch.randn(2, 3)
    assert torch.equal(network(x), fire(constant(network.get_submodule("0")(x))).mean(0))


def test_batchnorm_sees_the_batch_of_all_steps():
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.BatchNorm2d(4, momentum=1.0), nn.ReLU(), nn.Flatten())
    x = images()
    network = spiking(model, STEPS, NEURON).train()
    network(x)
    spikes = fire(constant(model[0](x)))
    torch.testing.assert_close(model[2].running_mean, spikes.mean((0, 1, 3, 4)))
    network.eval()
    reestimate_batchnorm(network, [x])
    torch.testing.assert_close(model[2].running_mean, spikes.mean((0, 1, 3, 4)))


# --- sites, steps, as_cnn ---


@pytest.mark.parametrize("model", [Plain, PreActivation, TwoHeads])
def test_as_cnn_is_the_cnn(model):
    model, x = model().eval(), images()
    network = spiking(model, STEPS, NEURON)
    before = network(x)
    with as_cnn(network):
        torch.testing.assert_close(network(x), model(x), rtol=0, atol=0)
        with pytest.raises(RuntimeError), as_cnn(network):
            raise RuntimeError
        torch.testing.assert_close(network(x), model(x), rtol=0, atol=0)
    torch.testing.assert_close(network(x), before, rtol=0, atol=0)
    assert {site.steps for site in sites(network).values()} == {STEPS}


def test_set_steps():
    model, x = PreActivation().eval(), images()
    network, other = spiking(model, STEPS, NEURON), spiking(model, 9, NEURON)
    assert not torch.equal(network(x), other(x))
    set_steps(network, 9)
    assert torch.equal(network(x), other(x))
    with as_cnn(network):
        assert torch.equal(network(x), model(x))


def test_sites_are_in_the_order_of_the_forward_pass():
    network, seen = spiking(PreActivation(), STEPS, NEURON), []
    for name, site in sites(network).items():
        site.register_forward_hook(lambda module, inputs, output, name=name: seen.append(name))
    network(images())
    assert seen == list(sites(network)) == ["spikes.0", "spikes.1", "spikes.2"]


def test_hooks_on_sites_replace_activations():
    model, x = Plain().eval(), images()
    network = spiking(model, STEPS, NEURON)
    sites(network)["spikes.1"].register_forward_hook(lambda module, inputs, output: torch.zeros_like(output))
    expected = model.fc.bias.expand(3, 5)
    assert torch.equal(network(x), expected)
    with as_cnn(network):
        assert torch.equal(network(x), expected)


def test_neurons_are_reset_before_and_after():
    network, x = spiking(Plain().eval(), STEPS, NEURON), images()
    first = network(x)
    neurons = [site.neuron for site in sites(network).values()]
    assert all(neuron.membrane is None for neuron in neurons)
    for neuron in neurons:
        neuron.membrane = torch.tensor(5.0)
    assert torch.equal(network(x), first)
    assert len(network(x[:1])) == 1  # also where the state is of other images


# --- what is shared ---


def test_modules_are_those_of_the_model():
    model = Plain()
    network = spiking(model, STEPS, NEURON)
    assert all(network.get_parameter(name) is p for name, p in model.named_parameters())
    names = {name.split(".neuron.")[0] for name in network.state_dict().keys() - model.state_dict().keys()}
    assert names == {"spikes.0", "spikes.1"}
    neurons = [site.neuron for site in sites(network).values()]
    assert neurons[0] is not neurons[1], "the ReLU module that two places share has neurons of each place"


@pytest.mark.parametrize("training", [False, True])
def test_modes_are_those_of_the_model(training):
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten()).train(training)
    model[1].train(not training)
    network = spiking(model, STEPS, NEURON)
    assert model[1].training is not training and model[0].training is training
    assert network.training is sites(network)["spikes.0"].training is training


@pytest.mark.parametrize("model", [PreActivation, TwoHeads])
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda network: pickle.loads(pickle.dumps(network))])
def test_copies_are_independent(model, duplicate):
    network, x = spiking(model().eval(), STEPS, NEURON), images()
    expected, other = network(x), duplicate(network)
    with as_cnn(network):
        torch.testing.assert_close(other(x), expected, rtol=0, atol=0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
    torch.testing.assert_close(other(x), expected, rtol=0, atol=0)
    with as_cnn(other):
        assert isinstance(sites(other)["spikes.0"], Spikes) and sites(other)["spikes.0"].steps == 0
    torch.testing.assert_close(other(x), expected, rtol=0, atol=0)


def test_gradients_reach_all_weights():
    """Also through spikes that are changed in place."""

    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.fc = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x):
            x = F.relu(self.a(x))
            x += 1
            return self.fc(F.relu(x))

    network = spiking(InPlace(), STEPS, partial(NEURON, threshold=4.0, gradient="rate", learn=True))
    network(torch.randn(8, 3)).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in network.parameters())
    assert network.get_parameter("a.weight").grad.any()


# --- networks of others ---

NETWORKS = slow_except(
    ["lenet5", "timm/test_resnet"],
    ["lenet5", "vgg_small", "resnet20", "mobilenet"]
    + [
        "torchvision/resnet18",
        "torchvision/mobilenet_v2",
        "torchvision/shufflenet_v2_x0_5",
        "torchvision/squeezenet1_1",
    ]
    + ["timm/test_resnet", "timm/resnet10t"],
)


@pytest.mark.parametrize("arch", NETWORKS)
def test_networks_of_the_zoo_torchvision_and_timm(arch):
    if arch.startswith("timm"):
        pytest.importorskip("timm")
    model, x = create_model(arch, "cnn", 3, 5).eval(), images(32, 3, 2)
    network = spiking(model, 2, NEURON)
    with torch.no_grad(), as_cnn(network):
        assert torch.equal(network(x), model(x))
    with torch.no_grad():
        logits = network(x)
        assert logits.shape == (2, 5) and torch.equal(copy.deepcopy(network)(x), logits)
    assert model.state_dict().keys() <= network.state_dict().keys()


# --- errors ---


class Untraceable(nn.Module):
    def forward(self, x):
        return F.relu(x) if x.sum() > 0 else x


class FunctionalDropout(nn.Module):
    def forward(self, x):
        return F.dropout(F.relu(x), training=self.training)


@pytest.mark.parametrize(
    "model, message",
    [
        (nn.Linear(3, 2), "expected at least one ReLU, got Linear without"),
        (nn.Sequential(nn.ReLU(), nn.SiLU()), "expected no activation but ReLU, got silu at _1"),
        (nn.Sequential(nn.ReLU(), nn.LeakyReLU()), "expected no activation but ReLU, got leakyrelu"),
        (Untraceable(), "expected one that torch.fx can trace, got Untraceable: "),
        (FunctionalDropout(), "expected a module of torch.nn, got the function dropout at dropout"),
    ],
)
def test_models_that_are_refused(model, message):
    with pytest.raises(ValueError, match=f"spiking: model: {message}"):
        spiking(model, STEPS, NEURON)


def test_batchnorm_of_timm_with_an_activation_is_refused():
    """torch.fx traces it to functions, which would train or not as the model did when it was traced."""
    layers = pytest.importorskip("timm.layers")
    with pytest.raises(ValueError, match="expected a module of torch.nn, got the function batch_norm"):
        spiking(nn.Sequential(nn.Conv2d(2, 4, 3), layers.BatchNormAct2d(4)), STEPS, NEURON)


def test_a_spiking_network_is_refused():
    with pytest.raises(ValueError, match="spiking: model: expected one that torch.fx can trace"):
        spiking(spiking(Plain(), STEPS, NEURON), STEPS, NEURON)


@pytest.mark.parametrize("steps", [0, -1])
def test_steps_that_are_refused(steps):
    with pytest.raises(ValueError, match=f"spiking: steps: expected at least 1, got {steps}"):
        spiking(Plain(), steps, NEURON)
    with pytest.raises(ValueError, match=f"set_steps: steps: expected at least 1, got {steps}"):
        set_steps(spiking(Plain(), STEPS, NEURON), steps)
