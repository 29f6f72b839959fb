"""The adaptive rate: one formula, applied by the layer or by AdaptiveRate, never by both."""

import copy
import math
import pickle

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from adderops import AdderConv2d, AdderLinear
from adderops.optim import AdaptiveRate, normalize_gradient


def rms(t):
    return t.double().square().mean().sqrt().item()


def test_normalize_gradient_by_hand():
    # norm 5 of 2 elements: 0.2*sqrt(2)/5 times each
    result = normalize_gradient(torch.tensor([[3.0], [-4.0]], dtype=torch.float64), 0.2)
    expected = torch.tensor([[3.0], [-4.0]], dtype=torch.float64) * (0.2 * math.sqrt(2) / 5)
    torch.testing.assert_close(result, expected, rtol=1e-15, atol=0)


@pytest.mark.parametrize("scale", [1e-10, 1.0, 1e10])
def test_scale_of_the_gradient_cancels(scale):
    grad = torch.randn(8, 3, 5, 5, dtype=torch.float64)
    assert rms(normalize_gradient(grad * scale, 0.2)) == pytest.approx(0.2, rel=1e-12)


def test_zero_and_tiny_gradients():
    assert torch.equal(normalize_gradient(torch.zeros(3, 4), 0.2), torch.zeros(3, 4))
    # below the floor of 1e-12 the norm no longer divides
    tiny = torch.tensor([1e-15], dtype=torch.float64)
    torch.testing.assert_close(normalize_gradient(tiny, 0.5), tiny * 0.5 / 1e-12, rtol=1e-15, atol=0)


@pytest.mark.parametrize("dtype, magnitude", [(torch.float16, 6e4), (torch.float16, 1e-6), (torch.bfloat16, 1e15)])
def test_norm_of_halves_does_not_overflow(dtype, magnitude):
    grad = torch.full((64, 64, 3, 3), magnitude).to(dtype)  # as float16 its norm, 192*6e4, would be infinite
    result = normalize_gradient(grad, 0.25)
    assert result.dtype == dtype
    assert torch.equal(result, torch.full_like(grad, 0.25))


def test_memory_format_is_kept():
    grad = torch.randn(8, 4, 3, 3).to(memory_format=torch.channels_last)
    assert normalize_gradient(grad, 0.2).is_contiguous(memory_format=torch.channels_last)


LAYERS = {
    "conv": lambda **k: (AdderConv2d(3, 5, 3, padding=1, dtype=torch.float64, **k), torch.randn(4, 3, 6, 6).double()),
    "linear": lambda **k: (AdderLinear(7, 5, dtype=torch.float64, **k), torch.randn(9, 7).double()),
}


@pytest.fixture(params=LAYERS)
def make(request):
    torch.manual_seed(0)
    return LAYERS[request.param]


def raw_gradient(layer, x):
    raw = copy.deepcopy(layer)
    raw.eta = None
    return torch.autograd.grad(raw(x).square().sum(), raw.weight)[0]


def test_layer_hands_over_the_normalized_gradient(make):
    layer, x = make(eta=0.3)
    layer(x).square().sum().backward()
    raw = raw_gradient(layer, x)
    assert rms(raw) > 1  # so that the next line says something
    assert torch.equal(layer.weight.grad, normalize_gradient(raw, 0.3))


def test_other_gradients_stay_raw(make):
    layer, x = make(eta=0.3, bias=True)
    raw = copy.deepcopy(layer)
    raw.eta = None
    grads = [
        torch.autograd.grad(m(i).square().sum(), (i, m.bias))
        for m in (layer, raw)
        for i in [x.clone().requires_grad_()]
    ]
    assert torch.equal(grads[0][0], grads[1][0])
    assert torch.equal(grads[0][1], grads[1][1])


@pytest.mark.parametrize("eta", [0, -0.2, "0.2", math.nan])
def test_bad_eta(eta, make):
    with pytest.raises(ValueError, match="eta: expected a positive number or None, got"):
        make(eta=eta)


@pytest.mark.parametrize(
    "copy_of", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
def test_copies_keep_the_rate_but_not_the_takeover(copy_of, make):
    layer, x = make(eta=0.3)
    copied = copy_of(layer)
    copied(x).sum().backward()
    assert rms(copied.weight.grad) == pytest.approx(0.3)

    AdaptiveRate(layer, torch.optim.SGD(layer.parameters(), lr=1.0))
    copied = copy_of(layer)
    copied(x).sum().backward()
    assert rms(copied.weight.grad) == pytest.approx(0.3)
    layer(x).sum().backward()
    assert rms(layer.weight.grad) > 1


def test_adaptive_rate_applies_once_before_the_step(make):
    layer, x = make(eta=0.3)
    raw = raw_gradient(layer, x)
    before = layer.weight.detach().clone()
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    AdaptiveRate(layer, optimizer)
    layer(x).square().sum().backward()
    assert torch.equal(layer.weight.grad, raw)
    optimizer.step()
    assert torch.equal(layer.weight, before - normalize_gradient(raw, 0.3))


def test_adaptive_rate_of_accumulated_gradients_is_that_of_the_whole_batch(make):
    layer, x = make(eta=0.3)
    x = x * torch.logspace(-2, 2, len(x)).double().view(-1, *[1] * (x.dim() - 1))  # samples of unlike gradients
    whole = normalize_gradient(raw_gradient(layer, x), 0.3)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    AdaptiveRate(layer, optimizer)
    before = layer.weight.detach().clone()
    for sample in x:
        layer(sample[None]).square().sum().backward()
    optimizer.step()
    torch.testing.assert_close(before - layer.weight, whole, rtol=1e-9, atol=1e-12)


def test_remove_gives_the_scaling_back(make):
    layer, x = make(eta=0.3)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    rate = AdaptiveRate(layer, optimizer)
    rate.remove()
    layer(x).sum().backward()
    assert rms(layer.weight.grad) == pytest.approx(0.3)
    layer.weight.grad.mul_(10)
    optimizer.step()
    assert rms(layer.weight.grad) == pytest.approx(3)
    AdaptiveRate(layer, optimizer).remove()


def test_layers_without_eta_and_other_parameters_stay_raw():
    model = nn.Sequential(
        AdderLinear(4, 6, bias=True, eta=None), nn.BatchNorm1d(6), nn.ReLU(), AdderLinear(6, 2, bias=True)
    )
    AdaptiveRate(model, optimizer := torch.optim.SGD(model.parameters(), lr=0.0))
    model(torch.randn(8, 4)).square().sum().backward()
    raw = {name: p.grad.clone() for name, p in model.named_parameters()}
    optimizer.step()
    for name, p in model.named_parameters():
        if name == "3.weight":
            assert rms(p.grad) == pytest.approx(0.2)
        else:
            assert torch.equal(p.grad, raw[name])


def test_parameters_without_gradient_and_shared_weights():
    a, b = AdderLinear(4, 4), AdderLinear(4, 4)
    idle = AdderLinear(4, 4)
    b.weight = a.weight
    model = nn.ModuleList([a, b, idle])
    AdaptiveRate(model, optimizer := torch.optim.SGD(model.parameters(), lr=0.0))
    x = torch.randn(8, 4)
    b(a(x)).square().sum().backward()
    raw = a.weight.grad.clone()
    optimizer.step()
    assert torch.equal(a.weight.grad, normalize_gradient(raw, 0.2))
    assert idle.weight.grad is None


@pytest.mark.parametrize("as_keyword", [False, True])
def test_closures_are_normalized_too(as_keyword, make):
    layer, x = make(eta=0.3)
    raw = raw_gradient(layer, x)
    before = layer.weight.detach().clone()
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    AdaptiveRate(layer, optimizer)

    def closure():
        optimizer.zero_grad()
        loss = layer(x).square().sum()
        loss.backward()
        return loss

    assert (optimizer.step(closure=closure) if as_keyword else optimizer.step(closure)) > 0
    assert torch.equal(layer.weight, before - normalize_gradient(raw, 0.3))


def test_what_cannot_be_taken_over():
    layer, other = AdderLinear(4, 4), nn.Linear(4, 4)
    with pytest.raises(
        ValueError, match="optimizer: expected one with the weight of an adder layer of model, got none"
    ):
        AdaptiveRate(layer, torch.optim.SGD(other.parameters(), lr=0.1))
    AdaptiveRate(layer, torch.optim.SGD(layer.parameters(), lr=0.1))
    with pytest.raises(ValueError, match="got layers that another AdaptiveRate has"):
        AdaptiveRate(layer, torch.optim.SGD(layer.parameters(), lr=0.1))


def _replica(rank, folder, x, state):
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    layer = AdderConv2d(3, 5, 3, eta=0.3, dtype=torch.float64)
    layer.load_state_dict(state)
    model = nn.parallel.DistributedDataParallel(layer, gradient_as_bucket_view=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    AdaptiveRate(model, optimizer)
    model(x[rank]).square().sum().backward()
    optimizer.step()
    torch.save(layer.weight.detach(), folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_adaptive_rate_under_data_parallelism_is_that_of_the_whole_batch(tmp_path):
    torch.manual_seed(0)
    layer = AdderConv2d(3, 5, 3, eta=0.3, dtype=torch.float64)
    x = torch.randn(2, 4, 3, 6, 6).double() * torch.tensor([1.0, 100.0]).double().view(2, 1, 1, 1, 1)
    whole = normalize_gradient(sum(raw_gradient(layer, part) for part in x) / 2, 0.3)
    mp.spawn(_replica, (tmp_path, x, layer.state_dict()), nprocs=2)
    for rank in range(2):
        stepped = layer.weight.detach() - torch.load(tmp_path / f"{rank}.pt")
        torch.testing.assert_close(stepped, whole, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dynamic, backend", [(False, "inductor"), (True, "aot_eager")])
def test_compiled_model_trains_the_same(dynamic, backend):
    torch.manual_seed(0)
    torch.compiler.reset()
    model = nn.Sequential(
        AdderConv2d(3, 8, (3, 2), stride=2, padding=(1, 0), padding_mode="circular"),
        nn.BatchNorm2d(8),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        AdderLinear(8, 10, bias=True),
    ).double()
    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic, backend=backend)

    def gradients(forward, x):
        y = forward(x)
        return [y, *torch.autograd.grad(y.square().sum(), list(model.parameters()))]

    x = torch.randn(4, 3, 8, 7, dtype=torch.float64)
    inputs = (
        [x, torch.randn(6, 3, 10, 7, dtype=torch.float64)] if dynamic else [x, x.to(memory_format=torch.channels_last)]
    )
    for x in inputs:
        torch.testing.assert_close(gradients(compiled, x), gradients(model, x), rtol=1e-9, atol=1e-9)
    AdaptiveRate(model, torch.optim.SGD(model.parameters(), lr=0.1))  # the compiled code notices
    raw = gradients(model, x)
    assert rms(raw[1]) > 1
    torch.testing.assert_close(gradients(compiled, x), raw, rtol=1e-9, atol=1e-9)
