"""The layers replace nn.Conv2d and nn.Linear: arguments, padding modes, state dicts, devices, printing."""

import copy
import inspect
import pickle

import numpy as np
import pytest
import torch
from torch import nn

from adderops import AdderConv2d, AdderLinear, reference
from adderops.functional import adder_conv2d


def parameters_of(kind):
    return list(inspect.signature(kind).parameters)


def test_signatures():
    expected = parameters_of(nn.Conv2d)
    expected.insert(expected.index("device"), "eta")
    assert parameters_of(AdderConv2d) == expected
    expected = parameters_of(nn.Linear)
    expected.insert(expected.index("device"), "eta")
    assert parameters_of(AdderLinear) == expected


def test_it_is_no_conv2d_but_a_convolution():
    # code that looks for nn.Conv2d (initialisers, fusers, quantizers) means a linear operator
    layer = AdderConv2d(3, 4, 3)
    assert isinstance(layer, nn.modules.conv._ConvNd)
    assert not isinstance(layer, nn.Conv2d)


@pytest.mark.parametrize("kind, twin", [(AdderConv2d, nn.Conv2d), (AdderLinear, nn.Linear)])
@pytest.mark.parametrize("bias", [False, True])
def test_repr_is_that_of_the_twin_and_eta(kind, twin, bias):
    cases = [((5, 7), {})]
    if kind is AdderConv2d:
        cases = [
            ((4, 6, 3), {}),
            ((4, 6, (3, 2)), dict(stride=2, padding=(1, 0), dilation=2, groups=2, padding_mode="circular")),
            ((4, 6, 3), dict(padding="same")),
        ]
    for positional, keywords in cases:
        expected = repr(twin(*positional, bias=bias, **keywords))
        expected = expected.replace(twin.__name__, kind.__name__)[:-1] + ", eta=0.7)"
        assert repr(kind(*positional, bias=bias, eta=0.7, **keywords)) == expected


@pytest.mark.parametrize("bias", [False, True])
def test_initial_weights(bias):
    torch.manual_seed(0)
    for layer in (AdderConv2d(64, 64, 3, bias=bias), AdderLinear(192, 192, bias=bias)):
        n = layer.weight.numel()  # 36,864: the standard error is 1/192 of the mean, 1/272 of the deviation
        assert abs(layer.weight.mean().item()) < 4 / n**0.5
        assert abs(layer.weight.std().item() - 1) < 4 / (2 * n) ** 0.5
        assert layer.bias is None if not bias else torch.equal(layer.bias, torch.zeros_like(layer.bias))


def integers(*shape):
    return torch.randint(-9, 10, shape).double()


def fill(layer, weight, bias):
    layer.weight.data.copy_(weight)
    layer.bias.data.copy_(bias)


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", [(2, 1), "same"])
def test_padding_modes(mode, padding, batched):
    layer = AdderConv2d(4, 6, (3, 4), padding=padding, groups=2, bias=True, padding_mode=mode, dtype=torch.float64)
    fill(layer, integers(6, 2, 3, 4), integers(6))
    x = integers(2, 4, 7, 8)
    # numpy's names of the same paddings; rows (above, below), columns (left, right), the odd one of 'same' on the right
    sides = ((1, 1), (1, 2)) if padding == "same" else ((2, 2), (1, 1))
    name = {"zeros": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}[mode]
    padded = torch.from_numpy(np.pad(x.numpy(), ((0, 0), (0, 0), *sides), mode=name))
    expected = reference.adder_conv2d(padded, layer.weight, layer.bias, groups=2)
    y = layer(x if batched else x[0])
    assert torch.equal(y, expected if batched else expected[0])


def test_every_argument_reaches_the_operator():
    x = integers(2, 4, 9, 9)
    layer = AdderConv2d(4, 6, (2, 3), (1, 2), (2, 1), (2, 1), 2, True, "zeros", 0.3, "cpu", torch.float64)
    fill(layer, integers(6, 2, 2, 3), integers(6))
    expected = reference.adder_conv2d(x, layer.weight, layer.bias, (1, 2), (2, 2, 1, 1), (2, 1), 2)
    assert torch.equal(layer(x), expected)
    assert layer.eta == 0.3


@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5), (0, 5), (2, 0, 5)], ids=str)
def test_linear_is_the_negative_distance(shape):
    layer = AdderLinear(5, 4, bias=True, dtype=torch.float64)
    fill(layer, integers(4, 5), integers(4))
    x = integers(*shape).requires_grad_()
    y = layer(x)
    expected = layer.bias - (x[..., None, :] - layer.weight).abs().sum(-1)
    assert y.shape == nn.Linear(5, 4).double()(x).shape
    assert torch.equal(y, expected)
    y.sum().backward()
    assert torch.equal(x.grad, (layer.weight - x.detach()[..., None, :]).clamp(-1, 1).sum(-2))


def test_linear_names_a_wrong_input():
    for shape in ((3, 4), ()):
        with pytest.raises(ValueError, match=r"adder_linear: input: expected shape \(\*, 5\), got \("):
            AdderLinear(5, 2)(torch.zeros(shape))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(groups=3), "divisible by groups"),
        (dict(groups=0), "positive integer"),
        (dict(padding="full"), "Invalid padding string"),
        (dict(padding="same", stride=2), "not supported for strided"),
        (dict(padding_mode="mirror"), "padding_mode must be one of"),
    ],
)
def test_bad_constructor_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        AdderConv2d(4, 8, 3, **arguments)


def test_unlike_channels_are_named():
    with pytest.raises(ValueError, match="adder_conv2d: weight: expected C_in/groups = 3 input channels, got"):
        AdderConv2d(4, 8, 3)(torch.zeros(1, 3, 5, 5))


@pytest.mark.parametrize("prefix", ["", "features.0."])
@pytest.mark.parametrize("make", [lambda: AdderConv2d(3, 4, 3, bias=True), lambda: AdderLinear(3, 4, bias=True)])
def test_published_checkpoint_keys_load(make, prefix):
    saved = make()
    state = {f"{prefix}adder": saved.weight.detach() + 1, f"{prefix}b": saved.bias.detach() + 2}
    layer = make()
    model = nn.ModuleDict({"features": nn.Sequential(layer)}) if prefix else layer
    copy = dict(state)
    model.load_state_dict(state, strict=True)
    assert state.keys() == copy.keys()  # the caller's dictionary is left alone
    assert torch.equal(layer.weight, saved.weight + 1)
    assert torch.equal(layer.bias, saved.bias + 2)


TWINS = [
    (lambda: AdderConv2d(3, 4, 3, bias=True), lambda: nn.Conv2d(3, 4, 3)),
    (lambda: AdderLinear(3, 4, bias=True), lambda: nn.Linear(3, 4)),
]


@pytest.mark.parametrize("make, twin", TWINS)
def test_state_dict_is_that_of_the_twin_and_a_mark(make, twin):
    layer, state = make(), make().state_dict()
    assert state.keys() == twin().state_dict().keys() | {"_extra_state"}
    layer.load_state_dict(state)
    assert torch.equal(layer.weight, state["weight"])
    with pytest.raises(RuntimeError, match="Unexpected key.*adder"):
        layer.load_state_dict({**state, "adder": state["weight"]})
    with pytest.raises(RuntimeError, match="Missing key.*weight"):
        layer.load_state_dict({"bias": state["bias"]})
    layer.load_state_dict({"bias": state["bias"] + 1}, strict=False)
    assert torch.equal(layer.bias, state["bias"] + 1)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("make, twin", TWINS)
def test_weights_of_ordinary_layers_are_refused(make, twin, strict):
    model = nn.ModuleDict({"body": make()})
    before = model["body"].weight.detach().clone()
    with pytest.raises(
        RuntimeError, match=f"body.weight: expected the weight of an {type(model['body']).__name__}, got"
    ):
        model.load_state_dict(nn.ModuleDict({"body": twin()}).state_dict(), strict=strict)
    assert torch.equal(model["body"].weight, before)
    with pytest.raises(RuntimeError, match="body._extra_state"):
        nn.ModuleDict({"body": twin()}).load_state_dict(model.state_dict())


@pytest.mark.parametrize("make, twin", TWINS)
def test_the_mark_is_a_tensor_that_tools_carry_along(make, twin, tmp_path):
    model = nn.Sequential(make(), nn.BatchNorm2d(4))
    state = model.state_dict()
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file(state, tmp_path / "model.safetensors")
    model.load_state_dict(safetensors.load_file(tmp_path / "model.safetensors"))
    torch.save(state, tmp_path / "model.pt")
    model.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    model.load_state_dict(
        {name: value.float() * 0.5 + value.float() * 0.5 for name, value in state.items()}
    )  # averages
    average = torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
    average.update_parameters(model)
    average.load_state_dict(average.state_dict())
    assert set(dict(model.named_buffers())) == {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
    copied = copy.deepcopy(model)
    copied.load_state_dict(pickle.loads(pickle.dumps(model)).state_dict())
    parameters, buffers = torch.func.stack_module_state([model, copied])
    assert parameters.keys() == dict(model.named_parameters()).keys() and len(buffers) == 3


def test_functional_call_takes_a_state_dict():
    layer, x = AdderConv2d(3, 4, 3), torch.randn(1, 3, 5, 5)
    state = {name: value + 1 for name, value in layer.state_dict().items()}
    expected = adder_conv2d(x, layer.weight + 1)
    assert torch.equal(torch.func.functional_call(layer, state, (x,)), expected)
    assert layer.state_dict().keys() == {"weight", "_extra_state"}


@pytest.mark.parametrize("bias", [False, True])
def test_fusers_of_linear_layers_refuse(bias):
    with pytest.raises(TypeError, match="fuse_conv_bn_eval: expected a linear layer, got AdderConv2d"):
        nn.utils.fuse_conv_bn_eval(AdderConv2d(3, 4, 3, bias=bias).eval(), nn.BatchNorm2d(4).eval())
    with pytest.raises(TypeError, match="fuse_linear_bn_eval: expected a linear layer, got AdderLinear"):
        nn.utils.fuse_linear_bn_eval(AdderLinear(3, 4, bias=bias).eval(), nn.BatchNorm1d(4).eval())
    layer = AdderConv2d(3, 4, 3, bias=bias)
    layer.weight = nn.Parameter(torch.zeros(4, 3, 3, 3))  # other callers may
    layer.bias = nn.Parameter(torch.zeros(4))


@pytest.mark.filterwarnings("ignore")
def test_quantization_of_torch_ao_names_ours():
    model = nn.Sequential(
        torch.ao.quantization.QuantStub(), nn.Conv2d(3, 4, 3), AdderConv2d(4, 4, 3), torch.ao.quantization.DeQuantStub()
    ).eval()
    model.qconfig = torch.ao.quantization.default_qconfig
    prepared = torch.ao.quantization.prepare(model)
    prepared(torch.randn(1, 3, 8, 8))
    with pytest.raises(TypeError, match="adder_conv2d: input: .* adder layers are quantized by adderops.quant"):
        torch.ao.quantization.convert(prepared)(torch.randn(1, 3, 8, 8))


@pytest.mark.parametrize("name", ["kernel_size", "stride", "padding", "dilation"])
def test_integers_of_numpy(name):
    arguments = {"kernel_size": 3, name: np.int64(2), "groups": np.int64(2)}
    layer, twin = (kind(np.int64(4), np.int64(4), **arguments) for kind in (AdderConv2d, nn.Conv2d))
    x = torch.zeros(1, 4, 9, 9)
    assert layer(x).shape == twin(x).shape
    assert type(getattr(layer, name)[0]) is int and type(layer.groups) is int
    assert getattr(AdderConv2d(4, 4, **{"kernel_size": 3, name: np.array([1, 2])}), name) == (1, 2)
    for bad in ("ab", 1.5, (1, 2, 3), None):
        if (name, bad) != ("padding", "ab"):
            with pytest.raises(TypeError, match=f"AdderConv2d: {name}: expected an integer or a pair of integers, got"):
                AdderConv2d(4, 4, **{"kernel_size": 3, name: bad})


@pytest.mark.parametrize(
    "make, shape", [(lambda **k: AdderConv2d(3, 4, 3, **k), (2, 3, 5, 5)), (lambda **k: AdderLinear(3, 4, **k), (2, 3))]
)
def test_lazy_devices(make, shape):
    expected = make()(torch.zeros(shape)).shape
    with torch.device("meta"):
        inside = make()
    for layer in (inside, make(device="meta")):
        assert layer.weight.is_meta
        assert layer(torch.zeros(shape, device="meta")).shape == expected
        layer.to_empty(device="cpu").reset_parameters()
        assert layer(torch.zeros(shape)).isfinite().all()
    assert make(dtype=torch.float64)(torch.zeros(shape).double()).dtype == torch.float64


def test_channels_last_model_stays_channels_last():
    layer = AdderConv2d(4, 6, 3, padding=1).to(memory_format=torch.channels_last)
    x = torch.randn(2, 4, 5, 5).to(memory_format=torch.channels_last).requires_grad_()
    y = layer(x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    y.sum().backward()
    assert x.grad.is_contiguous(memory_format=torch.channels_last)
    assert layer.weight.grad.is_contiguous(memory_format=torch.channels_last)


def test_the_layer_is_the_function():
    layer, x = AdderConv2d(3, 4, 3, eta=None), torch.randn(2, 3, 6, 6)
    grad_layer = torch.autograd.grad(layer(x).square().sum(), layer.weight)[0]
    grad_function = torch.autograd.grad(adder_conv2d(x, layer.weight).square().sum(), layer.weight)[0]
    assert torch.equal(grad_layer, grad_function)


def test_exported_program_computes_the_same():
    model = nn.Sequential(AdderConv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)).eval()
    x = torch.randn(2, 3, 6, 6)
    exported = torch.export.export(model, (x,))
    torch.testing.assert_close(exported.module()(x), model(x))
