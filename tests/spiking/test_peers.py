"""Neurons of SpikingJelly and snnTorch take the place of ours in a spiking network, and fire alike."""

import math
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from adderops.distill import Options
from adderops.distill.methods import DSRTask
from adderops.models import lenet5
from adderops.spiking import IntegrateAndFire, sites, spiking

STEPS = 6


def spikingjelly_neuron(decay: float, reset: str) -> nn.Module:
    neuron = pytest.importorskip("spikingjelly.activation_based.neuron", exc_type=ImportError)
    v_reset = None if reset == "subtract" else 0.0
    if decay == 1:
        return neuron.IFNode(v_reset=v_reset, step_mode="m")
    return neuron.LIFNode(tau=1 / (1 - decay), decay_input=False, v_reset=v_reset, step_mode="m")


class SnnTorchNeuron(nn.Module):
    def __init__(self, decay: float, reset: str) -> None:
        super().__init__()
        snntorch = pytest.importorskip("snntorch")
        self.leaky = snntorch.Leaky(decay, reset_mechanism=reset, reset_delay=False, init_hidden=True)

    def reset(self) -> None:
        self.leaky.reset_mem()

    def forward(self, input: Tensor) -> Tensor:
        return torch.stack([self.leaky(x) for x in input])


PEERS = {"spikingjelly": spikingjelly_neuron, "snntorch": SnnTorchNeuron}


@pytest.mark.parametrize("reset", ["subtract", "zero"])
@pytest.mark.parametrize("decay", [1.0, 0.5])
@pytest.mark.parametrize("peer", PEERS)
def test_a_network_of_their_neurons_fires_as_one_of_ours(peer, decay, reset):
    """The same float32 operations, so the same bits.

    Currents stay below the threshold 1: an snnTorch neuron that is above it after a reset fires one step late. No
    membrane of random numbers is at the threshold, where snnTorch's do not fire.
    """
    torch.manual_seed(0)
    cnn = lenet5("cnn").eval()
    ours = spiking(cnn, STEPS, partial(IntegrateAndFire, decay=decay, reset=reset))
    theirs = spiking(cnn, STEPS, partial(PEERS[peer], decay, reset))
    spikes: dict[nn.Module, list[Tensor]] = {ours: [], theirs: []}
    for network, found in spikes.items():
        for site in sites(network).values():
            site.register_forward_hook(lambda site, inputs, output, found=found: found.append(output))
    with torch.no_grad():
        images = torch.randn(4, 1, 32, 32)
        for bn in (m for m in cnn.modules() if isinstance(m, nn.BatchNorm2d)):
            bn.weight.fill_(0.2)
            bn.bias.fill_(0.55)
        logits = [network(images) for network in (ours, theirs)]
    assert len(spikes[ours]) == 4
    for a, b in zip(spikes[ours], spikes[theirs], strict=True):
        assert 0.05 < a.mean() < 0.95
        assert torch.equal(a, b)
    assert torch.equal(*logits)


def test_the_rate_gradient_is_that_of_spikingjelly():
    """Spikes, and both gradients, of its node for DSR: multiples of 1/8, so that every sum is exact."""
    neuron = pytest.importorskip("spikingjelly.activation_based.neuron", exc_type=ImportError)
    theirs = neuron.DSRIFNode(T=8, v_threshold=2.0, alpha=0.5)
    ours = IntegrateAndFire(2.0, fire=0.5, scaled=True, gradient="rate", learn=True)
    torch.manual_seed(0)
    x = torch.randint(-8, 33, (8, 3, 4, 5)).float() / 8
    weight = torch.randint(-4, 5, x.shape).float()
    results = []
    for node, v in ((ours, ours.threshold), (theirs, theirs.v_threshold)):
        input = x.clone().requires_grad_()
        spikes = node(input)
        (spikes * weight).sum().backward()
        results.append((spikes, input.grad, v.grad))
    for a, b in zip(*results, strict=True):
        assert a.abs().sum() > 0 and torch.equal(a, b)
    assert 0.1 < (results[0][1] != 0).float().mean() < 0.9  # neurons below, above and between


def test_leaky_neurons_of_dsr_fire_as_those_of_spikingjelly():
    """Theirs emit V/dt; ours are in units of that, as in `--method dsr`."""
    neuron = pytest.importorskip("spikingjelly.activation_based.neuron", exc_type=ImportError)
    dt, v = 0.05, 0.3
    theirs = neuron.DSRLIFNode(T=20, v_threshold=v, tau=1.0, delta_t=dt, alpha=0.3)
    config = Options(method="dsr", decay=math.exp(-dt), threshold=v / dt).resolve()
    ours = DSRTask.neuron(config.spiking)()
    torch.manual_seed(0)
    x = 8 * torch.rand(20, 50)
    with torch.no_grad():
        a, b = ours(x), theirs(x)
    assert 0.1 < (a != 0).float().mean() < 0.9
    torch.testing.assert_close(a, b, rtol=1e-6, atol=0)
