"""The adaptive rate: one formula, applied once, whatever the training loop does to the gradients before."""

import copy
import gc
import io
import math
import os
import pickle
import weakref

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from adderops import AdderConv2d, AdderLinear
from adderops.models import resnet20
from adderops.optim import AdaptiveRate, normalize_gradient, normalize_gradients


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
    return torch.autograd.grad(layer(x).square().sum(), layer.weight)[0]


def stepped(layer, optimizer, backward):
    """Returns how far the weight moves in one step with learning rate 1."""
    before = layer.weight.detach().clone()
    backward()
    optimizer.step()
    return before - layer.weight.detach()


def test_the_layer_returns_the_raw_gradient_and_the_step_normalizes_it(make):
    layer, x = make(eta=0.3, bias=True)
    raw = raw_gradient(layer, x)
    assert rms(raw) > 1  # or the next lines would prove nothing
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    layer(x).square().sum().backward()
    assert torch.equal(layer.weight.grad, raw)
    bias, bias_grad = layer.bias.detach().clone(), layer.bias.grad.clone()
    before = layer.weight.detach().clone()
    optimizer.step()
    assert torch.equal(layer.weight, before - normalize_gradient(raw, 0.3))
    assert torch.equal(layer.bias, bias - bias_grad)


def test_without_eta_the_gradient_stays_raw(make):
    layer, x = make(eta=None)
    raw = raw_gradient(layer, x)
    step = stepped(layer, torch.optim.SGD(layer.parameters(), lr=1.0), layer(x).square().sum().backward)
    torch.testing.assert_close(step, raw)


@pytest.mark.parametrize("eta", [0, -0.2, "0.2", math.nan, math.inf, torch.tensor(0.2)])
def test_bad_eta(eta, make):
    with pytest.raises(ValueError, match="eta: expected a positive finite number or None, got"):
        make(eta=eta)


@pytest.mark.parametrize("eta", [1, np.float32(0.25), np.int64(2)])
def test_numbers_of_numpy_are_numbers(eta, make):
    layer, _ = make(eta=eta)
    assert layer.eta == eta and type(layer.eta) is float


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda layer: pickle.loads(pickle.dumps(layer)),
    "to": lambda layer: copy.deepcopy(layer).float(),
    "load": lambda layer: load(copy.deepcopy(layer), layer.state_dict()),
    "replaced": lambda layer: replace(copy.deepcopy(layer)),
    "averaged": lambda layer: torch.optim.swa_utils.AveragedModel(layer).module,
}


def load(layer, state):
    layer.load_state_dict({name: value.clone() for name, value in state.items()}, assign=True)
    return layer


def replace(layer):
    layer.weight = nn.Parameter(layer.weight.detach().clone())
    return layer


@pytest.mark.parametrize("copied", COPIES)
def test_copies_and_replaced_parameters_have_the_rate(copied, make):
    layer, x = make(eta=0.3)
    twin = COPIES[copied](layer)
    del layer
    optimizer = torch.optim.SGD(twin.parameters(), lr=1.0)
    assert rms(stepped(twin, optimizer, twin(x.to(twin.weight.dtype)).square().sum().backward)) == pytest.approx(0.3)


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=1.0),
    "foreach": lambda p: torch.optim.SGD(p, lr=1.0, foreach=True),
    "fused": lambda p: torch.optim.SGD(p, lr=1.0, fused=True),
}


@pytest.mark.parametrize("clip", [None, 1e-3])
@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_grad_scaler(kind, unscale, clip, make):
    layer, x = make(eta=0.3)
    raw = raw_gradient(layer, x)
    optimizer = OPTIMIZERS[kind](layer.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    before = layer.weight.detach().clone()
    scaler.scale(layer(x).square().sum()).backward()
    if unscale:
        scaler.unscale_(optimizer)
    if clip:
        nn.utils.clip_grad_norm_(layer.parameters(), clip)
    scaler.step(optimizer)
    scaler.update()
    torch.testing.assert_close(before - layer.weight, normalize_gradient(raw, 0.3), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_step_that_the_scaler_skips_changes_nothing(kind, make):
    layer, x = make(eta=0.3)
    optimizer = OPTIMIZERS[kind](layer.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    before = layer.weight.detach().clone()
    scaler.scale(layer(x).square().sum() * math.inf).backward()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(layer.weight, before)


def test_accumulated_gradients_step_as_the_whole_batch(make):
    layer, x = make(eta=0.3)
    x = x * torch.logspace(-2, 2, len(x)).double().view(-1, *[1] * (x.dim() - 1))  # samples with different gradients
    whole = normalize_gradient(raw_gradient(layer, x), 0.3)
    step = stepped(
        layer,
        torch.optim.SGD(layer.parameters(), lr=1.0),
        lambda: [layer(sample[None]).square().sum().backward() for sample in x],
    )
    torch.testing.assert_close(step, whole, rtol=1e-9, atol=1e-12)


def test_the_norm_of_all_gradients_is_not_that_of_the_adder_layers():
    """Clipping at 1.0, the default of Hugging Face's trainer, acts on the other layers as in a CNN."""
    torch.manual_seed(0)
    model = resnet20("adder")
    nn.functional.cross_entropy(model(torch.randn(16, 3, 32, 32)), torch.arange(16) % 10).backward()
    adder = [m.weight.grad for m in model.modules() if isinstance(m, AdderConv2d)]
    total = nn.utils.get_total_norm([p.grad for p in model.parameters()])
    assert nn.utils.get_total_norm(adder) < 0.1 * total


def test_layers_without_eta_other_parameters_and_idle_layers():
    a, b = AdderLinear(4, 4), AdderLinear(4, 4)
    b.weight = a.weight
    model = nn.ModuleDict({"a": a, "b": b, "raw": AdderLinear(4, 4, eta=None, bias=True), "idle": AdderLinear(4, 4)})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    model["raw"](b(a(torch.randn(8, 4)))).square().sum().backward()
    raw = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    optimizer.step()
    assert torch.equal(a.weight.grad, normalize_gradient(raw.pop("a.weight"), 0.2))
    assert raw.keys() == {"raw.weight", "raw.bias"}
    assert all(torch.equal(model.get_parameter(name).grad, grad) for name, grad in raw.items())
    assert model["idle"].weight.grad is None


@pytest.mark.parametrize("as_keyword", [False, True])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.LBFGS])
def test_closures_are_normalized_too(as_keyword, kind, make):
    layer, x = make(eta=0.3)
    raw = raw_gradient(layer, x)
    before = layer.weight.detach().clone()
    options = {"max_iter": 1} if kind is torch.optim.LBFGS else {}
    optimizer = kind(layer.parameters(), lr=1.0, **options)

    def closure():
        optimizer.zero_grad()
        loss = layer(x).square().sum()
        loss.backward()
        return loss

    assert (optimizer.step(closure=closure) if as_keyword else optimizer.step(closure)) > 0
    step = normalize_gradient(raw, 0.3)
    if kind is torch.optim.LBFGS:
        step = step / step.abs().sum()  # its first step has length lr in the 1-norm
    torch.testing.assert_close(before - layer.weight, step)


def test_a_closure_that_adds_to_earlier_gradients_steps_as_the_whole_batch(make):
    """As Lightning accumulates: the last part's backward pass is in the closure."""
    layer, x = make(eta=0.3)
    x = x * torch.logspace(-2, 2, len(x)).double().view(-1, *[1] * (x.dim() - 1))
    whole = normalize_gradient(raw_gradient(layer, x), 0.3)
    before = layer.weight.detach().clone()
    layer(x[:2]).square().sum().backward()
    torch.optim.SGD(layer.parameters(), lr=1.0).step(lambda: layer(x[2:]).square().sum().backward())
    torch.testing.assert_close(before - layer.weight, whole, rtol=1e-9, atol=1e-12)


def test_an_optimizer_per_parameter_that_steps_during_the_backward_pass(make):
    layer, x = make(eta=0.3)
    raw = raw_gradient(layer, x)
    optimizers = {p: torch.optim.SGD([p], lr=1.0) for p in layer.parameters()}
    for p in layer.parameters():
        p.register_post_accumulate_grad_hook(lambda p: optimizers[p].step())
    before = layer.weight.detach().clone()
    layer(x).square().sum().backward()
    assert torch.equal(layer.weight, before - normalize_gradient(raw, 0.3))


# --- optimizers that are not torch's ---


class Descent:
    """Has what AdaptiveRate needs, and nothing from torch.optim."""

    def __init__(self, parameters, lr):
        self.param_groups = [{"params": list(parameters), "lr": lr}]

    def step(self, closure=None):
        loss = closure() if closure else None
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data -= group["lr"] * parameter.grad
        return loss


class Wrapper:
    """As the optimizers that accelerate, Lightning and DeepSpeed put around torch's."""

    def __init__(self, inner, name):
        setattr(self, name, inner)
        self.inner = inner

    param_groups = property(lambda self: self.inner.param_groups)

    def step(self, closure=None):
        return self.inner.step(closure)


def optimizers_of_others(parameters):
    sgd = torch.optim.SGD(parameters, lr=1.0)
    return {
        "own": Descent(parameters, lr=1.0),
        "torch": sgd,
        "accelerate": Wrapper(sgd, "optimizer"),
        "lightning": Wrapper(sgd, "_optimizer"),
        "twice": Wrapper(Wrapper(sgd, "optimizer"), "optimizer"),
        "around its own": Wrapper(Descent(parameters, lr=1.0), "optimizer"),
    }


@pytest.mark.parametrize("closure", [False, True])
@pytest.mark.parametrize("kind", optimizers_of_others([torch.zeros(1)]))
def test_adaptive_rate_takes_any_optimizer(kind, closure, make):
    layer, x = make(eta=0.3)
    raw = raw_gradient(layer, x)
    optimizer = optimizers_of_others(list(layer.parameters()))[kind]
    AdaptiveRate(nn.Sequential(layer), optimizer)
    before = layer.weight.detach().clone()

    def backward():
        loss = layer(x).square().sum()
        loss.backward()
        return loss

    if closure:
        assert optimizer.step(backward) > 0
    else:
        backward()
        optimizer.step()
    assert torch.equal(layer.weight, before - normalize_gradient(raw, 0.3))


def test_adaptive_rate_refuses_an_optimizer_without_the_weights():
    layer = AdderLinear(4, 4)
    for others in (nn.Linear(4, 4), copy.deepcopy(layer)):  # the second: an optimizer that keeps copies
        with pytest.raises(
            ValueError, match="optimizer: expected one with the weight of an adder layer of model, got none"
        ):
            AdaptiveRate(layer, torch.optim.SGD(others.parameters(), lr=0.1))


def test_adaptive_rate_looks_at_the_optimizer_that_steps():
    """DeepSpeed's optimizers show the model's parameters and step copies of them."""
    layer = AdderLinear(4, 4)
    wrapper = Wrapper(torch.optim.SGD([layer.weight.detach().clone().requires_grad_()], lr=0.1), "optimizer")
    wrapper.inner = Descent(layer.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="expected one with the weight of an adder layer of model, got none"):
        AdaptiveRate(layer, wrapper)


def manual_loop(layer, x, update, steps=3):
    for _ in range(steps):
        layer(x).square().sum().backward()
        update()
        layer.zero_grad()


def test_a_loop_without_an_optimizer_is_warned_of_at_its_first_step(make):
    layer, x = make(eta=0.3)

    def update():
        layer.weight.data -= 0.1 * layer.weight.grad  # .data: the weight's version does not count this

    with pytest.warns(UserWarning, match="weight: expected steps of a torch.optim.Optimizer") as record:
        manual_loop(layer, x, update)
    assert len(record) == 1


def test_an_optimizer_of_copies_is_warned_of(make):
    layer, x = make(eta=0.3)
    master = layer.weight.detach().clone().requires_grad_()
    optimizer = torch.optim.SGD([master], lr=1.0)

    def update():
        master.grad = layer.weight.grad.clone()
        optimizer.step()
        layer.weight.data.copy_(master.data)

    with pytest.warns(UserWarning, match="call adderops.optim.normalize_gradients"):
        manual_loop(layer, x, update)


def test_right_loops_are_not_warned_of(make, recwarn):
    layer, x = make(eta=0.3)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    with torch.no_grad():
        layer(x)
    layer.weight.data.zero_()  # nothing was differentiated yet
    layer(x)
    layer.weight.data.normal_()
    layer(x).sum().backward()
    layer(x).sum().backward()  # accumulates
    optimizer.step()
    layer.weight.data.normal_()
    layer(x).sum().backward()
    layer.eval()(x)

    other, x = make(eta=0.3)

    def update():
        normalize_gradients(other.parameters())
        other.weight.data -= other.weight.grad
        assert rms(other.weight.grad) == pytest.approx(0.3)

    manual_loop(other, x, update)
    assert not recwarn.list


# --- without an optimizer: torch.func, graphs ---


def loss_of(layer):
    return lambda w, x: torch.func.functional_call(layer, {"weight": w}, (x,)).square().sum()


def test_grad_of_functional_call_has_the_rate(make):
    layer, x = make(eta=0.3)
    want = normalize_gradient(raw_gradient(layer, x), 0.3)
    w = layer.weight.detach()
    leaf = w.clone().requires_grad_()
    loss_of(layer)(leaf, x).backward()
    assert torch.equal(leaf.grad, want)
    # through the optimizer's own parameters a step follows, and applies it
    loss_of(layer)(layer.weight, x).backward()
    assert torch.equal(layer.weight.grad, raw_gradient(layer, x))


def rated_identity(w, eta=0.3):
    from adderops.optim import _rated

    return _rated(w, eta)


def test_the_rate_under_the_transforms_of_torch_func():
    w, x = torch.randn(5, 3).double(), torch.randn(4, 5, 3).double()

    def loss(w, x):
        return (rated_identity(w) * x).sum()

    each = torch.stack([normalize_gradient(sample, 0.3) for sample in x])
    grad, vmap, jacrev = torch.func.grad, torch.func.vmap, torch.func.jacrev
    torch.testing.assert_close(grad(loss)(w, x[0]), each[0])
    torch.testing.assert_close(grad(loss)(nn.Parameter(w), x[0]), each[0])
    torch.testing.assert_close(vmap(grad(loss), (None, 0))(w, x), each)  # per-sample gradients
    torch.testing.assert_close(vmap(grad(loss))(torch.stack([w] * 4), x), each)  # an ensemble
    torch.testing.assert_close(grad(lambda w: vmap(loss, (None, 0))(w, x).sum())(w), normalize_gradient(x.sum(0), 0.3))
    torch.testing.assert_close(jacrev(lambda w: vmap(loss, (None, 0))(w, x))(w), each)
    torch.testing.assert_close(torch.func.vjp(lambda w: loss(w, x[0]), w)[1](torch.ones(()).double())[0], each[0])
    assert torch.equal(vmap(rated_identity)(x), x)
    stacked = torch.stack([w] * 4).requires_grad_()
    (vmap(rated_identity)(stacked) * x).sum().backward()
    torch.testing.assert_close(stacked.grad, each)


def test_an_exported_training_program_has_the_rate_and_an_evaluation_program_nothing_of_it(make):
    layer, x = make(eta=0.3)
    raw = raw_gradient(layer, x)
    program = torch.export.export(layer.train(), (x,)).module()
    weight = dict(program.named_parameters())["weight"]
    program(x).square().sum().backward()
    torch.testing.assert_close(weight.grad, normalize_gradient(raw, 0.3))
    graph = str(torch.export.export(layer.eval(), (x,)).graph)
    assert "normalized" not in graph and "clone" not in graph


def test_a_traced_layer_has_no_python_function(make):
    layer, x = make(eta=0.3)
    for mode in (True, False):
        traced = torch.jit.trace(layer.train(mode), x)
        torch.jit.save(traced, io.BytesIO())
        assert torch.equal(traced(x), layer(x))


def test_a_replica_of_data_parallel_hands_over_the_raw_gradient(make):
    layer, x = make(eta=0.3)
    replica = layer._replicate_for_data_parallel()
    replica.bias = None
    replica.weight = layer.weight.detach().clone().requires_grad_()  # as nn.DataParallel: a tensor, no parameter
    assert torch.equal(raw_gradient(replica, x), raw_gradient(layer, x))


class Rated(nn.Module):
    """The part of an adder layer that torch.fx meets before the operator."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return x * self.layer.rated_weight()


def test_a_graph_of_torch_fx_keeps_the_rate_when_the_layer_is_gone():
    layer = AdderLinear(3, 5, eta=0.3)
    graph, gone = torch.fx.symbolic_trace(Rated(layer)), weakref.ref(layer)
    del layer
    gc.collect()
    assert gone() is None
    x = torch.randn(5, 3)
    (weight,) = graph.parameters()
    graph(x).sum().backward()
    assert torch.equal(weight.grad, x)
    torch.optim.SGD([weight], lr=1.0).step()
    assert torch.equal(weight.grad, normalize_gradient(x, 0.3))


# --- several processes ---


def _in_a_group(rank, folder, work, arguments):
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    torch.save(work(rank, *arguments), folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # threads of gloo that outlive their group would abort an ordinary exit


def _replica(rank, x, state):
    layer = AdderConv2d(3, 5, 3, eta=0.3, dtype=torch.float64)
    layer.load_state_dict(state)
    model = nn.parallel.DistributedDataParallel(layer, gradient_as_bucket_view=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    with model.no_sync():
        model(x[rank][:2]).square().sum().backward()
    model(x[rank][2:]).square().sum().backward()
    optimizer.step()
    return layer.weight.detach()


def _shard(rank, x, state):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    layer = AdderConv2d(3, 5, 3, eta=0.3, dtype=torch.float64)
    layer.load_state_dict(state)
    model = fully_shard(nn.Sequential(layer), mesh=init_device_mesh("cpu", (2,)))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model(x[rank]).square().sum().backward()
    optimizer.step()
    return layer.weight.full_tensor().detach()


@pytest.mark.slow
@pytest.mark.parametrize("work", [_replica, _shard], ids=["DistributedDataParallel", "fully_shard"])
def test_processes_step_as_the_whole_batch(work, tmp_path):
    torch.manual_seed(0)
    layer = AdderConv2d(3, 5, 3, eta=0.3, dtype=torch.float64)
    x = torch.randn(2, 4, 3, 6, 6).double() * torch.tensor([1.0, 100.0]).double().view(2, 1, 1, 1, 1)
    whole = normalize_gradient(sum(raw_gradient(layer, part) for part in x) / 2, 0.3)
    mp.spawn(_in_a_group, (tmp_path, work, (x, layer.state_dict())), nprocs=2)
    for rank in range(2):
        step = layer.weight.detach() - torch.load(tmp_path / f"{rank}.pt")
        torch.testing.assert_close(step, whole, rtol=1e-9, atol=1e-12)


# --- torch.compile ---


@pytest.mark.slow
@pytest.mark.parametrize(
    "dynamic, backend", [pytest.param(False, "inductor", marks=pytest.mark.slow), (True, "aot_eager")]
)
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
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    assert rms(stepped(model[0], optimizer, lambda: compiled(x).square().sum().backward())) == pytest.approx(0.2)


def test_compiled_step(make):
    torch.compiler.reset()
    layer, x = make(eta=0.3)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    compiled = torch.compile(lambda: optimizer.step(), backend="aot_eager")
    for _ in range(3):
        layer.zero_grad()
        before = layer.weight.detach().clone()
        layer(x).square().sum().backward()
        compiled()
        assert rms(before - layer.weight) == pytest.approx(0.3)
