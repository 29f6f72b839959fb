"""The CUDA kernels pass the tests of the CPU kernels, and those that only a GPU can fail.

The bodies of the CPU tests run here again on a CUDA device.  Without a GPU, or without kernels, the whole file is one
skip.
"""

import csv
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import pytest
import torch
from cases import FORMATS, PASSES, SELECTED, Inputs, assert_same, case, compute, define, exact_inputs, exact_result
from conftest import Backend
from ops import (
    test_conv2d_accuracy,
    test_conv2d_exact,
    test_conv2d_nonfinite,
    test_conv2d_threads,
    test_elements,
    test_library,
    test_memory,
)
from ops import test_operator_errors as errors
from tolerances import tolerance

from adderops import AdderConv2d
from adderops.functional import adder_conv2d
from gpu.device import DEVICE

OPS = torch.ops.adderops
SHAPE = test_library.SHAPE
MEMORY_FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
# Several tiles of pixels and filters, with an edge in each.
LAYER = case("layer", (3, 40, 20, 21), 136, 3, padding=1)


@cache
def expected_here(name: str, c, *data):
    """`expected` of the accuracy tests, with the bound of the CUDA formula of grad_x; float64 has that of the CPU."""
    inputs, want, bound = expected_on_the_cpu(name, c, *data)
    if name != "grad_x" or inputs.x.dtype == torch.float64:
        return inputs, want, bound
    return inputs, want, tolerance(name, c, inputs, want, gpu=True)


expected_on_the_cpu = test_conv2d_accuracy.expected


@pytest.fixture
def backend(set_threads, monkeypatch):
    monkeypatch.setattr(test_conv2d_accuracy, "expected", expected_here)
    set_threads(1)
    return Backend(DEVICE, "sm_{}{}".format(*torch.cuda.get_device_capability()))


# Exact results in every geometry, format and dtype; accuracy within derived bounds; NaN and infinity; conversions of
# the halves; and, as threads of the host change nothing here, the same bits from call to call.
for _module in (
    test_conv2d_exact,
    test_conv2d_accuracy,
    test_conv2d_nonfinite,
    test_conv2d_threads,
    test_elements,
):
    _of = _module.__name__.removeprefix("ops.test_")
    for _name, _body in list(vars(_module).items()):
        if _name.startswith("test_"):
            globals()[f"test_{_of}_{_name.removeprefix('test_')}"] = _body


# grad_x of equal operands is exactly 0 on a CPU; here W/2 + 1/2 rounds, within the bound of tolerances.py.
del globals()["test_conv2d_accuracy_equal_operands_give_zero"]


def test_equal_operands():
    c = case("equal", (1, 40, 3, 3), 20, 3)
    for scale in (1e-40, 1.0, 1e30):
        x = test_conv2d_accuracy.random_inputs(c, torch.float32, scale, scale).x
        i = Inputs(x, x.expand(c.C_out, -1, -1, -1), torch.ones(c.y_shape), torch.zeros(c.C_out))
        assert_same(compute("forward", c, i.to(torch.float32, DEVICE)), torch.zeros(c.y_shape), f"forward, {scale}")
        got = compute("grad_x", c, i.to(torch.float32, DEVICE)).cpu().double()
        bound = tolerance("grad_x", c, i, torch.zeros(c.x_shape), gpu=True) if scale == 1.0 else 0
        assert (got.abs() <= bound).all(), f"grad_x, {scale}"


def on_device(c, dtype=torch.float32, form="contiguous", device=DEVICE) -> Inputs:
    i = exact_inputs(c)
    arranged = Inputs(*(FORMATS[form](t) for t in (i.x, i.w, i.grad_y)), i.bias)
    return arranged.to(dtype, device)


def leaves_of(i: Inputs) -> list[torch.Tensor]:
    return [t.clone(memory_format=torch.preserve_format).requires_grad_() for t in (i.x, i.w, i.bias)]


# --- as an operator of PyTorch ---


@pytest.mark.parametrize("requires_grad", (False, True), ids=("data", "requires_grad"))
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("name", PASSES)
def test_opcheck(name, form, requires_grad):
    i = on_device(SHAPE, form=form)
    for t in (i.x, i.w, i.grad_y, i.bias):
        t.requires_grad_(requires_grad)
    tests = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    if requires_grad and name != "forward":
        tests.remove("test_aot_dispatch_dynamic")  # it differentiates, and a second derivative is an error
    arguments = test_library.arguments(name, i)
    result = torch.library.opcheck(test_library.OVERLOADS[name], arguments, test_utils=tests)
    assert set(result.values()) == {"SUCCESS"}, result


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("dynamic", (False, True), ids=("static", "dynamic"))
def test_compile(dynamic, form):
    """One graph, forward and backward."""
    pytest.importorskip("triton", reason="torch.compile needs triton on a GPU")
    torch._dynamo.reset()

    def step(x, w, b):
        return adder_conv2d(x.relu(), w, b, stride=2, padding=1).tanh() * 2

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic)
    g = torch.Generator().manual_seed(0)
    for size in ((2, 4, 9, 8), (3, 4, 12, 7), (5, 4, 6, 11))[: 3 if dynamic else 1]:
        data = [torch.randn(s, generator=g).to(DEVICE) for s in (size, (6, 4, 3, 3), (6,))]
        data[0] = FORMATS[form](data[0])
        eager, graph = ([t.clone().requires_grad_() for t in data] for _ in range(2))
        y, z = step(*eager), compiled(*graph)
        torch.testing.assert_close(z, y, rtol=1e-5, atol=1e-5)  # tanh is the compiler's own
        assert z.stride() == y.stride()
        grad = torch.randn(y.shape, generator=g).to(DEVICE)
        y.backward(grad), z.backward(grad)
        for a, b in zip(eager, graph, strict=True):
            torch.testing.assert_close(b.grad, a.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", PASSES)
def test_memory_format_is_kept(name):
    for c in SELECTED:
        for form in FORMATS:
            i = on_device(c, form=form)
            got, like = compute(name, c, i), i.w if name == "grad_w" else i.x
            wanted = torch.contiguous_format if like.is_contiguous() else torch.channels_last
            assert got.is_contiguous(memory_format=wanted), f"{name} of {c!r}, {form}: strides {got.stride()}"


def test_autograd_hands_out_the_training_gradients():
    for c in SELECTED:
        i = on_device(c)
        leaves = leaves_of(i)
        OPS.adder_conv2d(*leaves, *c.geometry).backward(i.grad_y)
        for leaf, name in zip(leaves[:2], ("grad_x", "grad_w"), strict=True):
            assert_same(leaf.grad, exact_result(name, c).float(), f"{name} of {c!r}")
        assert_same(leaves[2].grad, exact_inputs(c).grad_y.sum((0, 2, 3)).float(), f"bias.grad of {c!r}")


def test_backward_of_an_expanded_gradient():
    """y.sum().backward() passes a grad_y with strides of zero."""
    i = on_device(SHAPE)
    x, w, _ = leaves_of(i)
    OPS.adder_conv2d(x, w, None, *SHAPE.geometry).sum().backward()
    ones = Inputs(i.x, i.w, torch.ones(SHAPE.y_shape), i.bias)
    assert_same(x.grad, define("grad_x", SHAPE, ones).float(), "x.grad")
    assert_same(w.grad, define("grad_w", SHAPE, ones).float(), "w.grad")


@pytest.mark.parametrize("form", FORMATS)
def test_the_layer_trains_as_on_the_cpu(form):
    """Forward and both gradients through AdderConv2d, its adaptive rate included, against the CPU."""
    c = case("layer-s2", (4, 24, 17, 15), 40, 3, stride=2, padding=1)
    torch.manual_seed(0)
    here = AdderConv2d(c.C_in, c.C_out, 3, stride=2, padding=1, bias=True)
    there = AdderConv2d(c.C_in, c.C_out, 3, stride=2, padding=1, bias=True, device=DEVICE)
    there.load_state_dict(here.state_dict())
    x = FORMATS[form](torch.randn(c.x_shape)).requires_grad_()
    z = x.detach().to(DEVICE).requires_grad_()
    grad_y = torch.randn(c.y_shape)
    y = here(x)
    y.backward(grad_y)
    got = there(z)
    got.backward(grad_y.to(DEVICE))
    results = [(got, y), (z.grad, x.grad), (there.weight.grad, here.weight.grad), (there.bias.grad, here.bias.grad)]
    for ours, theirs in results:
        torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_autocast_computes_in_float32(dtype):
    i = on_device(SHAPE)
    x, w = i.x.to(dtype).requires_grad_(), i.w.clone().requires_grad_()
    with torch.autocast(DEVICE, dtype=dtype):
        y = adder_conv2d(x, w, i.bias.to(dtype), (1, 2), 0, 1, 3)
        z = OPS.adder_conv2d(x, w, i.bias.to(dtype), *SHAPE.geometry)
    assert y.dtype == torch.float32
    assert_same(z.detach(), exact_result("forward", SHAPE).float(), "y")
    z.backward(i.grad_y)
    assert_same(x.grad, exact_result("grad_x", SHAPE).float().to(dtype), "x.grad")
    assert_same(w.grad, exact_result("grad_w", SHAPE).float(), "w.grad")


def test_empty_batch_and_empty_images():
    no_rows, no_columns = (
        case("rows", (2, 3, 0, 5), 4, 2, padding=(1, 0)),
        case("columns", (2, 3, 5, 0), 4, 2, padding=2),
    )
    for c in (SHAPE, no_rows, no_columns):
        for n in {0, c.N}:
            for dtype in (torch.float32, torch.float64, torch.bfloat16):
                shapes = (n, *c.x_shape[1:]), c.w_shape, (n, *c.y_shape[1:]), (c.C_out,)
                i = Inputs(*(torch.ones(s, dtype=dtype, device=DEVICE) for s in shapes))
                for name in PASSES:
                    got = compute(name, c, i)
                    assert got.shape == {"forward": i.grad_y, "grad_x": i.x, "grad_w": i.w}[name].shape
                    if n:
                        assert_same(got, define(name, c, i).to(dtype), f"{name} of {c!r}")
                    elif name == "grad_w":
                        assert not got.any()  # a sum of no terms


def test_no_operand_is_written():
    for c in SELECTED:
        i = on_device(c)
        operands = i.x, i.w, i.grad_y, i.bias
        copies, versions = [t.clone() for t in operands], [t._version for t in operands]
        for name in PASSES:
            compute(name, c, i)
        for t, copy, version in zip(operands, copies, versions, strict=True):
            assert torch.equal(t, copy) and t._version == version, f"{c!r}"


# --- errors ---


def moved(arguments: dict) -> dict:
    return {name: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for name, v in arguments.items()}


@pytest.mark.parametrize("name", errors.NAMES)
@pytest.mark.parametrize(
    "what, changed, message", errors.WRONG_IN_EVERY_OPERATOR, ids=lambda v: v if " " in v else None
)
def test_wrong_input(name, what, changed, message):
    with torch.device(DEVICE), pytest.raises(RuntimeError, match=f"{name}: {message}"):
        errors.call(name, **moved(changed))


@pytest.mark.parametrize("what, bias, message", errors.WRONG_BIAS, ids=[w[0] for w in errors.WRONG_BIAS])
def test_wrong_bias(what, bias, message):
    with torch.device(DEVICE), pytest.raises(RuntimeError, match=message):
        errors.call("adder_conv2d", bias=bias.to(DEVICE))


@pytest.mark.parametrize("name", errors.NAMES[1:])
@pytest.mark.parametrize("what, grad_y, message", errors.WRONG_GRAD_Y, ids=[w[0] for w in errors.WRONG_GRAD_Y])
def test_wrong_grad_y(name, what, grad_y, message):
    with torch.device(DEVICE), pytest.raises(RuntimeError, match=f"{name}: {message}"):
        errors.call(name, grad_y=grad_y.to(DEVICE))


@pytest.mark.parametrize("name", errors.NAMES)
@pytest.mark.parametrize("elsewhere", ("x", "w", "other"))
def test_operands_of_two_devices(name, elsewhere):
    """No kernel may receive a host address, for any operand."""
    other = "bias" if name == "adder_conv2d" else "grad_y"
    shapes = {"x": errors.X, "w": errors.W, other: errors.BIAS if other == "bias" else errors.GRAD_Y}
    operands = {field: torch.ones(shape, device=DEVICE) for field, shape in shapes.items()}
    field = other if elsewhere == "other" else elsewhere
    operands[field] = operands[field].cpu()
    with pytest.raises(RuntimeError, match=f"{name}: {'w' if field == 'x' else field}: expected the device of x"):
        errors.call(name, **operands)
    # and all but one on the host
    operands = {f: t.to(DEVICE if f == field else "cpu") for f, t in operands.items()}
    with pytest.raises(RuntimeError, match=f"{name}: .*: expected the device of x"):
        errors.call(name, **operands)


def test_the_function_names_the_device():
    x, w = torch.ones(errors.X, device=DEVICE), torch.ones(errors.W)
    with pytest.raises(ValueError, match=f"weight: expected the device of input, {x.device}, got cpu"):
        adder_conv2d(x, w)


# --- streams, graphs, devices ---


@pytest.mark.parametrize("name", PASSES)
def test_work_is_queued_on_the_current_stream(name):
    """The operands are zeros until the stream has slept: kernels on another stream would overtake the copies."""
    i, want = on_device(LAYER), exact_result(name, LAYER).float()
    late = Inputs(*(torch.zeros_like(t) for t in (i.x, i.w, i.grad_y, i.bias)))
    compute(name, LAYER, late)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(500_000_000)
        for target, source in zip((late.x, late.w, late.grad_y, late.bias), (i.x, i.w, i.grad_y, i.bias), strict=True):
            target.copy_(source)
        got = compute(name, LAYER, late)
        asleep = not stream.query()  # the call has returned while the copies wait: it does not synchronise
    stream.synchronize()
    assert asleep, f"{name} waited for the stream"
    assert_same(got, want, name)


@pytest.mark.parametrize("name", PASSES)
def test_streams_side_by_side(name):
    """Two streams run the same pass at once, from two threads: no workspace is shared, no bit changes."""
    i = on_device(LAYER)
    want = compute(name, LAYER, i).cpu()

    def repeat(stream):
        with torch.cuda.stream(stream):
            return [compute(name, LAYER, i) for _ in range(8)]

    torch.cuda.synchronize()
    with ThreadPoolExecutor(2) as pool:
        results = [*pool.map(repeat, (torch.cuda.Stream(), torch.cuda.Stream()))]
    torch.cuda.synchronize()
    for got in sum(results, []):
        assert torch.equal(got.cpu(), want)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("name", PASSES)
def test_cuda_graph(name, dtype):
    """Captured once, replayed with other data; a synchronisation, or foreign memory, would end the capture."""
    for c in (SHAPE, case("graph", (3, 32, 9, 10), 72, 3, padding=1)):
        i = on_device(c, dtype)
        static = Inputs(*(t.clone() for t in (i.x, i.w, i.grad_y, i.bias)))
        compute(name, c, static)  # modules are loaded before a capture
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = compute(name, c, static)
        for other in (i, Inputs(i.x.flip(2), i.w.flip(0), i.grad_y.flip(1), i.bias.flip(0)), i):
            for target, source in zip(vars(static).values(), vars(other).values(), strict=True):
                target.copy_(source)
            graph.replay()
            assert_same(got, define(name, c, other.to(torch.float64, "cpu")).float().to(dtype), f"{name} of {c!r}")


def test_a_graphed_training_step():
    c = case("graphed", (3, 32, 9, 10), 72, 3, padding=1)
    torch.manual_seed(0)
    layer = AdderConv2d(c.C_in, c.C_out, 3, padding=1, bias=True, device=DEVICE)
    x = torch.randn(c.x_shape, device=DEVICE, requires_grad=True)
    graphed = torch.cuda.make_graphed_callables(AdderConv2d(32, 72, 3, padding=1, bias=True, device=DEVICE), (x,))
    graphed.load_state_dict(layer.state_dict())
    for _ in range(2):
        data, grad_y = torch.randn(c.x_shape, device=DEVICE), torch.randn(c.y_shape, device=DEVICE)
        gradients = []
        for module in (layer, graphed):
            leaf = data.clone().requires_grad_()
            module.zero_grad(set_to_none=True)
            y = module(leaf)
            y.backward(grad_y)
            gradients.append((y.detach().clone(), leaf.grad, module.weight.grad.clone(), module.bias.grad.clone()))
        for a, b in zip(*gradients, strict=True):
            assert torch.equal(a, b)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second CUDA device")
@pytest.mark.parametrize("name", PASSES)
def test_another_device_than_the_current_one(name):
    last = torch.cuda.device_count() - 1
    i = on_device(LAYER, device=f"cuda:{last}")
    with torch.cuda.device(0):
        got = compute(name, LAYER, i)
        assert torch.cuda.current_device() == 0
    assert got.device.index == last
    assert_same(got, exact_result(name, LAYER).float(), name)
    with pytest.raises(RuntimeError, match="w: expected the device of x"):
        compute(name, LAYER, Inputs(i.x, i.w.to("cuda:0"), i.grad_y, i.bias))


# --- memory and size ---


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(
    "name, x, filters, stride, padding", test_memory.LAYERS, ids=[v[0] for v in test_memory.LAYERS]
)
def test_extra_memory_of_a_step(name, x, filters, stride, padding, form):
    """As on the CPU: forward plus backward stay below input + output + weights + 64 MiB, results included."""
    leaf = FORMATS[form](torch.randn(x, device=DEVICE)).requires_grad_()
    w = torch.randn(filters[0], x[1], filters[1], filters[1], device=DEVICE, requires_grad=True)
    grad_y = torch.randn_like(adder_conv2d(leaf.detach(), w.detach(), None, stride, padding))
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    y = adder_conv2d(leaf, w, None, stride, padding)
    y.backward(grad_y)
    extra = torch.cuda.max_memory_allocated() - before
    tensors = 4 * (leaf.numel() + w.numel() + y.numel())
    print(f"{name}: {extra / 2**20:.1f} MiB, of which results {tensors / 2**20:.1f}")
    assert extra < tensors + test_memory.ROOM


def test_nothing_is_kept():
    """A call returns all that it took from the allocator."""
    i = on_device(LAYER)
    before = torch.cuda.memory_allocated()
    for name in PASSES:
        compute(name, LAYER, i)
    assert torch.cuda.memory_allocated() == before


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("name", PASSES)
def test_more_elements_than_32_bits_count(name, form):
    """x, grad_y and y of 2.2e9 elements each.  Small integers; a filter of w is all -1, 0 or 1: few sums per pixel."""
    n, channels, size = 3, 64, 3400
    free, _ = torch.cuda.mem_get_info()
    if free < 30 * 2**30:
        pytest.skip(f"needs 30 GiB of GPU memory, {free / 2**30:.0f} are free")
    dtype, shape = torch.bfloat16, (n, channels, size, size)
    assert n * channels * size**2 > 2**31
    x = torch.empty(shape, dtype=dtype, device=DEVICE, memory_format=MEMORY_FORMATS[form]).random_(0, 7).sub_(3)
    level = torch.arange(channels, device=DEVICE) % 3 - 1
    w = level.to(dtype)[:, None, None, None].expand(-1, channels, 1, 1).contiguous()
    geometry = [1, 1], [0, 0, 0, 0], [1, 1], 1
    rows = [slice(r, r + 200) for r in range(0, size, 200)]
    if name == "forward":
        y = OPS.adder_conv2d(x, w, None, *geometry)
        for image in range(n):
            for r in rows:
                for v in (-1, 0, 1):
                    want = -(x[image, :, r].float() - v).abs().sum(0)
                    assert (y[image, level == v, r] == want).all(), f"image {image}, rows {r}, filters {v}"
        return
    # one pixel in 64 has a gradient: then grad_w is exact in float32 too
    grad_y = torch.empty_like(x).random_(0, 3).sub_(1)
    grad_y *= torch.empty((n, 1, size, size), dtype=torch.uint8, device=DEVICE).random_(0, 64) == 0
    if name == "grad_x":
        grad_x = OPS.adder_conv2d_grad_x(grad_y, x, w, *geometry)
        for image in range(n):
            for r in rows:
                want = 0
                for v in (-1, 0, 1):
                    of_filters = grad_y[image, level == v, r].float().sum(0)
                    want = want + of_filters * (v - x[image, :, r].float()).clamp_(-1, 1)
                assert (grad_x[image, :, r] == want).all(), f"image {image}, rows {r}"
        return
    grad_w = OPS.adder_conv2d_grad_w(grad_y, x, w, *geometry)
    want = torch.zeros(channels, channels, dtype=torch.float64, device=DEVICE)
    for image in range(n):
        for r in rows:
            g = grad_y[image, :, r].double().flatten(1)
            want += g @ x[image, :, r].double().flatten(1).T - level.double()[:, None] * g.sum(1, keepdim=True)
    assert want.abs().max() < 2**24
    assert_same(grad_w[:, :, 0, 0], want.float().to(dtype).cpu(), "grad_w")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ("float32", "float16", "bfloat16"))
def test_benchmark(dtype, tmp_path):
    """It runs end to end, including its own check of every result."""
    script, file = Path(__file__).resolve().parents[2] / "benchmarks" / "bench_adder.py", tmp_path / "r.csv"
    layers = "resnet20/16-16*,resnet20/16-32.1x1*"
    options = ["--device", "cuda", "--dtype", dtype, "--layers", layers, "--batch", "8", "--seconds", "2", "--full"]
    run = subprocess.run([sys.executable, script, *options, "--csv", file], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    lines = file.read_text().splitlines()
    about = [line for line in lines if line.startswith("#")]
    assert f"# device = {torch.cuda.get_device_name()}" in about
    limits = [line for line in about if line.startswith("# limit")]
    rows = csv.DictReader(line for line in lines if not line.startswith("#"))
    shares = [float(row["share_of_limit"]) for row in rows if row.get("share_of_limit")]
    assert len(shares) == (16 if limits else 0) and all(0 < share < 1 for share in shares)
