"""Integrate-and-fire neurons: what they fire, the gradients they are trained by, their state."""

import pickle

import pytest
import torch
import torch.nn.functional as F

from adderops.spiking import IntegrateAndFire, integrate_and_fire


def heaviside(u: torch.Tensor) -> torch.Tensor:
    """A spike with the surrogate gradient 1 / (1 + |u|)^2."""
    soft = u / (1 + u.abs())
    return (u >= 0).to(u.dtype) + (soft - soft.detach())


def dyadic(*shape: int, least: int, most: int, seed: int, unit: float = 1 / 16) -> torch.Tensor:
    """Multiples of 1/16, exact in float32 also as sums and products of a few."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(least, most + 1, shape, generator=generator) * unit


# --- what they fire ---


@pytest.mark.parametrize("steps", [1, 5, 32])
def test_count_of_a_constant_current(steps):
    """clip(floor((T r + initial + (1 - fire) V) / V), 0, T) for 1000 neurons with r, V and initial of their own."""
    neurons = 1000
    r, initial = dyadic(neurons, least=0, most=40, seed=0), dyadic(neurons, least=-16, most=48, seed=1)
    v = dyadic(neurons, least=1, most=32, seed=2)
    for fire in (0.25, 0.5, 1.0, 1.5):
        start = torch.maximum(initial, (fire - 1) * v)
        neuron = IntegrateAndFire(v, initial=start, fire=fire)
        count = neuron(r.expand(steps, 1, neurons)).sum(0)[0]
        expected = ((steps * r + start + (1 - fire) * v) / v).floor().clamp(0, steps)
        assert torch.equal(count, expected)


@pytest.mark.parametrize("reset, spikes, left", [("subtract", [0, 1, 1, 1], 0.25), ("zero", [0, 1, 0, 1], 0.0)])
def test_leaky_neurons_by_hand(reset, spikes, left):
    """u = u / 2 + 2 x is 1, then 1.5, which fires and leaves 0.25 or 0, then 1.25 or 1.125, then 1.5 or 2.0625."""
    x = torch.tensor([0.5, 0.5, 0.5625, 0.75]).view(4, 1, 1)
    neuron = IntegrateAndFire(1.25, decay=0.5, gain=2.0, reset=reset)
    assert neuron(x).flatten().tolist() == spikes and neuron.membrane.item() == left


@pytest.mark.parametrize("reset", ["subtract", "zero"])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("shape", [(), (3,), (3, 2, 2)])
def test_surrogate_steps_fire_as_the_operator(reset, scaled, shape):
    """The same spikes and membranes, to the bit, for all numbers; step by step, in two parts."""
    v, initial = (dyadic(*shape, least=4, most=24, seed=s) for s in (0, 1))
    x = dyadic(7, 2, 3, 2, 2, least=-16, most=32, seed=2)
    settings = {"initial": initial, "decay": 0.5, "gain": 1.5, "reset": reset, "fire": 0.75, "scaled": scaled}
    expected = integrate_and_fire(x, v, returns=("spikes", "membrane"), **settings)
    neuron = IntegrateAndFire(v, gradient=heaviside, **settings)
    spikes = torch.cat([neuron(x[:3]), neuron(x[3:])])
    assert torch.equal(spikes, expected[0]) and torch.equal(neuron.membrane, expected[1])
    assert 0 < spikes.count_nonzero() < spikes.numel()


@pytest.mark.parametrize("gradient", [None, heaviside])
def test_half_inputs_have_a_float32_membrane(gradient):
    """1 + 2^-10 is not a bfloat16, nor is 3 times the smallest step above 1."""
    x = torch.full((4, 1, 1), 2.0**-10, dtype=torch.bfloat16)
    x[0] = 1 + 2**-7
    neuron = IntegrateAndFire(1e3, gain=1 + 2**-10, gradient=gradient)
    spikes = neuron(x)
    assert spikes.dtype == torch.bfloat16 and neuron.membrane.dtype == torch.float32
    assert neuron.membrane.item() == pytest.approx((1 + 2**-7 + 3 * 2**-10) * (1 + 2**-10), rel=1e-7)


# --- gradients ---


def test_rate_gradient_by_hand():
    """Two neurons, two steps: the one within its clamp passes the mean gradient on, the other moves its threshold."""
    x = torch.tensor([[[1.0, 1.5]], [[0.5, 3.5]]], requires_grad=True)  # rates 0.75 and 2.5
    neuron = IntegrateAndFire(2.0, scaled=True, gradient="rate", learn=True)
    grad = torch.tensor([[[1.0, 2.0]], [[4.0, 8.0]]])
    neuron(x).backward(grad)
    assert x.grad.tolist() == [[[2.5, 0.0]], [[2.5, 0.0]]] and neuron.threshold.grad.item() == 10.0


@pytest.mark.parametrize("shape", [(), (3,), (3, 2, 2)])
def test_rate_gradient_is_that_of_the_clamp(shape):
    """Of T times clamp(gain * mean over the steps, 0, V), by autograd; T a power of two: exact."""
    x = dyadic(4, 2, 3, 2, 2, least=-16, most=48, seed=0).requires_grad_()
    v = dyadic(*shape, least=8, most=24, seed=1)
    grad = dyadic(2, 3, 2, 2, least=-16, most=16, seed=2)
    neuron = IntegrateAndFire(v, gain=0.5, fire=0.5, scaled=True, gradient="rate", learn=True)
    neuron(x).backward(grad.expand(4, 2, 3, 2, 2))

    other, threshold = x.detach().clone().requires_grad_(), v.clone().requires_grad_()
    bound = threshold.view(-1, 1, 1) if len(shape) == 1 else threshold
    rate = torch.minimum(0.5 * other.mean(0), bound.expand(2, 3, 2, 2)).clamp(min=0)
    (4 * rate).backward(grad)
    assert not ((0.5 * x.mean(0) == bound) | (x.mean(0) == 0)).any(), "at a kink the two may differ"
    assert torch.equal(x.grad, other.grad) and torch.equal(neuron.threshold.grad, threshold.grad)
    assert x.grad.any() and threshold.grad.any()


def test_rate_is_within_a_spike_of_the_clamp():
    """|mean of the scaled spikes - clamp(r, 0, V)| <= V / T, for a constant current."""
    r, v, steps = dyadic(500, least=-32, most=64, seed=0), 1.5, 10
    rate = IntegrateAndFire(v, fire=0.5, scaled=True)(r.expand(steps, 1, 500)).mean(0)
    assert (rate - r.clamp(0, v)).abs().max() <= v / steps
    assert (rate - r.clamp(0, v)).abs().max() > 0  # they are spikes


def test_rate_gradient_of_leaky_neurons():
    """Weights decay^(T-t): the rate decides by the weighted mean, and gradients are T times their weighted mean."""
    x = torch.tensor([4.0, 1.0]).view(2, 1, 1).requires_grad_()  # (0.5 * 4 + 1) / 1.5 = 2
    grad = torch.tensor([6.0, 3.0]).view(2, 1, 1)  # 2 * (0.5 * 6 + 3) / 1.5 = 8
    for v, of_input, of_threshold in ((2.125, 4.0, 0.0), (1.875, 0.0, 8.0)):
        x.grad = None
        neuron = IntegrateAndFire(v, decay=0.5, scaled=True, gradient="rate", learn=True)
        neuron(x).backward(grad)
        torch.testing.assert_close(x.grad.flatten(), torch.full((2,), of_input))
        torch.testing.assert_close(neuron.threshold.grad, torch.tensor(of_threshold))


def test_surrogate_gradient_goes_back_through_the_steps():
    """Two steps by hand: s = H(u - 1), u_1 = x_1, u_2 = u_1 - s_1 + x_2; H' = 1 / (1 + |u - 1|)^2."""
    x = torch.tensor([2.0, 0.0]).view(2, 1, 1).requires_grad_()
    neuron = IntegrateAndFire(1.0, gradient=heaviside, learn=True)
    neuron(x)[1].sum().backward()  # u_1 = 2 fires, u_2 = 1 fires
    assert x.grad.flatten().tolist() == [1 - 1 / 4, 1.0]  # du_2/dx_1 = 1 - H'(1)
    # du_2/dV = -s_1 + H'(1), minus the 1 of the threshold itself
    assert neuron.threshold.grad.item() == -1 + 1 / 4 - 1


def test_without_a_gradient_a_backward_pass_is_an_error():
    x = torch.ones(2, 1, 1, requires_grad=True)
    with pytest.raises(RuntimeError):
        IntegrateAndFire()(x).sum().backward()


def test_learned_thresholds_stay_above_the_least_in_training_only():
    neuron = IntegrateAndFire(0.25, scaled=True, gradient="rate", learn=True, least=0.5)
    neuron.eval()(torch.ones(1, 1, 1))
    assert neuron.threshold.item() == 0.25
    neuron.train()(torch.ones(1, 1, 1))
    assert neuron.threshold.item() == 0.5 and neuron.threshold.requires_grad


# --- state ---


@pytest.mark.parametrize("settings", [{}, {"scaled": True, "gradient": "rate"}, {"gradient": heaviside}])
def test_the_membrane_is_kept_until_reset(settings):
    x = dyadic(9, 2, 3, least=0, most=12, seed=0)
    neuron = IntegrateAndFire(initial=0.25, **settings)
    whole = neuron(x)
    neuron.reset()
    assert torch.equal(torch.cat([neuron(part) for part in x.split((2, 3, 4))]), whole)
    assert not torch.equal(neuron(x), whole)
    neuron.reset()
    assert torch.equal(neuron(x), whole)


@pytest.mark.parametrize("learn", [False, True])
@pytest.mark.parametrize("shape", [(1,), (3,), (3, 2, 2)])
def test_state_dict_of_another_shape(learn, shape):
    saved = IntegrateAndFire(torch.rand(shape) + 1, initial=torch.rand(shape), learn=learn)
    loaded = IntegrateAndFire(learn=learn)
    parameters = list(loaded.parameters())
    loaded.load_state_dict(pickle.loads(pickle.dumps(saved.state_dict())))
    for name in ("threshold", "initial"):
        assert torch.equal(getattr(loaded, name), getattr(saved, name))
    assert list(map(id, loaded.parameters())) == list(map(id, parameters)), "an optimizer would lose it"
    x = torch.rand(4, 2, *(shape if len(shape) > 1 else (3, 2, 2)))
    assert torch.equal(loaded(x), saved(x))
    with pytest.raises(RuntimeError, match="Missing key.*threshold"):
        loaded.load_state_dict({"initial": torch.zeros(())})


def test_it_shows_what_it_is():
    assert repr(IntegrateAndFire(2.0)) == "IntegrateAndFire(threshold=2, decay=1.0, reset='subtract', scaled=False)"
    assert "threshold=(3, 2)" in repr(IntegrateAndFire(torch.ones(3, 2), reset="zero"))


# --- errors ---


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"gradient": "dsr"}, "gradient: expected None, 'rate' or a function, got 'dsr'"),
        ({"gradient": "rate"}, "gradient: expected scaled=True and reset='subtract' with 'rate'"),
        ({"gradient": "rate", "scaled": True, "reset": "zero"}, "gradient: expected scaled=True and reset='subtract'"),
        ({"threshold": 0.0}, "threshold: expected a positive finite number, got 0.0"),
        ({"threshold": float("nan")}, "threshold: expected a positive finite number, got nan"),
    ],
)
def test_settings_that_are_refused(settings, message):
    with pytest.raises(ValueError, match=f"IntegrateAndFire: {message}"):
        IntegrateAndFire(**settings)


def test_inputs_that_are_refused():
    with pytest.raises(ValueError, match=r"input: expected shape \(T, N, ...\), got \(3,\)"):
        IntegrateAndFire()(torch.ones(3))
    with pytest.raises(TypeError, match="input: expected a floating-point tensor, got torch.int64"):
        IntegrateAndFire()(torch.ones(3, 1, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"threshold: expected a number, one per channel or .*got shape \(2,\)"):
        IntegrateAndFire(torch.ones(2))(torch.ones(3, 1, 5))
    neuron = IntegrateAndFire()
    neuron(torch.ones(3, 4, 5))
    with pytest.raises(ValueError, match=r"initial: expected .*\(3, 2, 5\), got shape \(4, 5\)"):
        neuron(torch.ones(3, 2, 5))  # the state of other images


def test_a_current_may_be_expanded():
    x = F.relu(dyadic(2, 3, 4, 4, least=-8, most=16, seed=0))
    expanded, whole = x.expand(6, *x.shape), x.repeat(6, 1, 1, 1, 1)
    for settings in ({}, {"scaled": True, "gradient": "rate"}, {"gradient": heaviside}):
        neuron = IntegrateAndFire(**settings)
        spikes = neuron(expanded)
        neuron.reset()
        assert torch.equal(spikes, neuron(whole))
