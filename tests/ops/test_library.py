"""The operators within PyTorch: schemas, fake kernels, autograd, autocast, torch.compile, memory formats."""

import platform
import re
from pathlib import Path

import pytest
import torch
from cases import (
    FORMATS,
    PASSES,
    SELECTED,
    VIEWS,
    Inputs,
    assert_same,
    case,
    compute,
    define,
    exact_inputs,
    exact_result,
)
from child import run_python
from torch._subclasses.fake_tensor import FakeTensorMode

from adderops.functional import adder_conv2d

OPS = torch.ops.adderops
SHAPE = case("library", (2, 6, 7, 8), 9, 3, stride=(1, 2), padding=(1, 0, 2, 1), groups=3)


def arguments(name: str, inputs: Inputs, c=SHAPE) -> tuple:
    operands = (inputs.x, inputs.w, inputs.bias) if name == "forward" else (inputs.grad_y, inputs.x, inputs.w)
    return *operands, *c.geometry


OVERLOADS = {
    "forward": OPS.adder_conv2d.default,
    "grad_x": OPS.adder_conv2d_grad_x.default,
    "grad_w": OPS.adder_conv2d_grad_w.default,
}


def test_the_instruction_sets_of_this_processor_are_built(monkeypatch):
    """Every instruction set in /proc/cpuinfo is built: a kernel missing from the build fails here, not skips."""
    want = {"x86_64": ["baseline"], "aarch64": ["neon"]}.get(platform.machine(), ["baseline"])
    if platform.machine() == "x86_64":
        flags = set(re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.M).group(1).split())
        if {"avx2", "fma"} <= flags:
            want.append("avx2")
        if {"avx2", "fma", "avx512f", "avx512bw", "avx512dq", "avx512vl"} <= flags:
            want.append("avx512")
    assert OPS._cpu_isas() == want
    monkeypatch.delenv("ADDEROPS_CPU_ISA", raising=False)
    assert OPS._cpu_isa() == want[-1]


def test_the_environment_variable_is_read_at_every_call(monkeypatch):
    for isa in [*OPS._cpu_isas(), *reversed(OPS._cpu_isas())]:
        monkeypatch.setenv("ADDEROPS_CPU_ISA", isa)
        assert OPS._cpu_isa() == isa


@pytest.mark.parametrize("requires_grad", (False, True), ids=("data", "requires_grad"))
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("name", PASSES)
def test_opcheck(name, form, requires_grad):
    i = exact_inputs(SHAPE).to(torch.float32)
    i = Inputs(*(FORMATS[form](t) if t.dim() == 4 else t for t in (i.x, i.w, i.grad_y, i.bias)))
    i = Inputs(
        *(
            t.clone(memory_format=torch.preserve_format).requires_grad_(requires_grad)
            for t in (i.x, i.w, i.grad_y, i.bias)
        )
    )
    tests = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    if requires_grad and name != "forward":
        tests.remove("test_aot_dispatch_dynamic")  # it differentiates; a second derivative is an error (below)
    result = torch.library.opcheck(OVERLOADS[name], arguments(name, i), test_utils=tests)
    assert set(result.values()) == {"SUCCESS"}, result


def test_opcheck_without_bias():
    i = exact_inputs(SHAPE).to(torch.float32)
    torch.library.opcheck(OVERLOADS["forward"], (i.x.requires_grad_(), i.w.requires_grad_(), None, *SHAPE.geometry))


@pytest.mark.parametrize("form", [*FORMATS, *VIEWS])
@pytest.mark.parametrize("name", PASSES)
def test_fake_kernels_tell_the_truth(name, form):
    """Shape, dtype and strides on the meta device and on fake tensors equal those of a real call."""
    for c in SELECTED:
        for dtype in (torch.float32, torch.bfloat16):
            i = exact_inputs(c).to(dtype)
            real = arguments(name, Inputs(*({**FORMATS, **VIEWS}[form](t) for t in (i.x, i.w, i.grad_y)), i.bias), c)
            got = OVERLOADS[name](*real)
            meta = OVERLOADS[name](*(t.to("meta") if isinstance(t, torch.Tensor) else t for t in real))
            mode = FakeTensorMode()
            with mode:
                fake = OVERLOADS[name](*(mode.from_tensor(t) if isinstance(t, torch.Tensor) else t for t in real))
            for other in (meta, fake):
                assert other.shape == got.shape and other.dtype == got.dtype, f"{name} of {c!r}"
            assert fake.stride() == got.stride(), f"{name} of {c!r}, {form}"
            assert fake.device == got.device and meta.device.type == "meta"


@pytest.mark.parametrize("name", PASSES)
def test_memory_format_is_kept(name):
    for c in SELECTED:
        i = exact_inputs(c).to(torch.float32)
        for form, how in FORMATS.items():
            got = compute(name, c, Inputs(how(i.x), how(i.w), i.grad_y, i.bias))
            like = how(i.w if name == "grad_w" else i.x)
            # a tensor with one channel or one pixel is both; the operator then treats it as contiguous
            wanted = torch.contiguous_format if like.is_contiguous() else torch.channels_last
            assert got.is_contiguous(memory_format=wanted), f"{name} of {c!r}, {form}: strides {got.stride()}"


def test_autograd_gives_the_training_gradients():
    for c in SELECTED:
        i = exact_inputs(c).to(torch.float32)
        leaves = [t.clone().requires_grad_() for t in (i.x, i.w, i.bias)]
        y = OPS.adder_conv2d(*leaves, *c.geometry)
        y.backward(i.grad_y)
        assert_same(leaves[0].grad, exact_result("grad_x", c).float(), f"x.grad of {c!r}")
        assert_same(leaves[1].grad, exact_result("grad_w", c).float(), f"w.grad of {c!r}")
        assert_same(leaves[2].grad, i.grad_y.sum((0, 2, 3)), f"bias.grad of {c!r}")
        for needed in range(3):  # a gradient does not depend on which others are requested
            some = [t.detach().requires_grad_(n == needed) for n, t in enumerate(leaves)]
            OPS.adder_conv2d(*some, *c.geometry).backward(i.grad_y)
            assert [t.grad is not None for t in some] == [n == needed for n in range(3)]
            assert_same(some[needed].grad, leaves[needed].grad, f"{c!r}, gradient {needed} alone")


def test_backward_of_an_expanded_gradient():
    """y.sum().backward() passes a grad_y with zero strides."""
    i = exact_inputs(SHAPE).to(torch.float32)
    x, w = i.x.requires_grad_(), i.w.requires_grad_()
    OPS.adder_conv2d(x, w, None, *SHAPE.geometry).sum().backward()
    ones = Inputs(i.x.detach(), i.w.detach(), torch.ones(SHAPE.y_shape), i.bias)
    assert_same(x.grad, define("grad_x", SHAPE, ones).float(), "x.grad")
    assert_same(w.grad, define("grad_w", SHAPE, ones).float(), "w.grad")


def test_no_graph_without_need():
    i = exact_inputs(SHAPE).to(torch.float32)
    assert not OPS.adder_conv2d(i.x, i.w, i.bias, *SHAPE.geometry).requires_grad
    w = i.w.requires_grad_()
    with torch.no_grad():
        assert not OPS.adder_conv2d(i.x, w, i.bias, *SHAPE.geometry).requires_grad
    with torch.inference_mode():
        assert OPS.adder_conv2d(i.x, w, i.bias, *SHAPE.geometry).is_inference()


@pytest.mark.parametrize("of", ("x", "w"))
def test_second_derivative_is_an_error(of):
    i = exact_inputs(SHAPE).to(torch.float32)
    x, w = i.x.requires_grad_(), i.w.requires_grad_()
    y = OPS.adder_conv2d(x, w, None, *SHAPE.geometry)
    (first,) = torch.autograd.grad(y.square().sum(), x if of == "x" else w, create_graph=True)
    with pytest.raises(RuntimeError, match=f"adder_conv2d_grad_{of}: .*second derivative"):
        first.sum().backward()


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_autocast_computes_in_float32(dtype):
    i = exact_inputs(SHAPE).to(torch.float32)
    x, w = i.x.to(dtype).requires_grad_(), i.w.clone().requires_grad_()
    with torch.autocast("cpu", dtype=dtype):
        y = OPS.adder_conv2d(x, w, i.bias.to(dtype), *SHAPE.geometry)
    assert_same(y.detach(), exact_result("forward", SHAPE).float(), "y")
    y.backward(i.grad_y)
    assert_same(x.grad, exact_result("grad_x", SHAPE).float().to(dtype), "x.grad")
    assert_same(w.grad, exact_result("grad_w", SHAPE).float(), "w.grad")


EMPTY = """
import os
import torch
from cases import PASSES, Inputs, assert_same, case, compute, define

no_rows, no_columns = case("rows", (2, 3, 0, 5), 4, 2, padding=(1, 0)), case("columns", (2, 3, 5, 0), 4, 2, padding=2)
shapes = [(isa, c) for isa in torch.ops.adderops._cpu_isas() for c in ({case}, no_rows, no_columns)]
for isa, c in shapes:
    os.environ["ADDEROPS_CPU_ISA"] = isa
    for n in {{0, c.N}}:
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            data = [torch.ones(s).to(dtype) for s in ((n, *c.x_shape[1:]), c.w_shape, (n, *c.y_shape[1:]), (c.C_out,))]
            for name in PASSES:
                print(isa, name, c, n, dtype, flush=True)
                shape = {{"forward": data[2], "grad_x": data[0], "grad_w": data[1]}}[name].shape
                got = compute(name, c, Inputs(*data))
                assert got.shape == shape and got.dtype == dtype, got.shape
                if n:
                    assert_same(got, define(name, c, Inputs(*data)).to(dtype), name)
                elif name == "grad_w":
                    assert not got.any()  # a sum of no terms
"""


def test_empty_batch_and_empty_images():
    """In a child process, which an integer division by zero would kill."""
    code = EMPTY.format(case=f"case('batch', {SHAPE.x_shape}, 9, 3, 2, 1, 1, 3)")
    done = run_python("-c", code)
    last = (done.stdout.splitlines() or ["nothing"])[-1]
    assert done.returncode == 0, f"exit {done.returncode} in {last}\n{done.stderr[-2000:]}"


def test_unbatched_and_named_padding():
    g = torch.Generator().manual_seed(0)
    x, w = (torch.randint(-8, 9, s, generator=g).float() for s in ((2, 4, 9, 10), (6, 4, 4, 3)))
    assert torch.equal(adder_conv2d(x[1], w, padding=1), adder_conv2d(x, w, padding=1)[1])
    assert torch.equal(adder_conv2d(x, w, padding="valid"), adder_conv2d(x, w))
    # with an even kernel the odd pixel goes below and to the right, as in F.conv2d
    for dilation, sides in (((1, 1), [1, 2, 1, 1]), ((2, 3), [3, 3, 3, 3])):
        same = adder_conv2d(x, w, padding="same", dilation=dilation)
        assert same.shape == (2, 6, 9, 10)
        assert torch.equal(same, OPS.adder_conv2d(x, w, None, [1, 1], sides, list(dilation), 1))
        conv = torch.nn.functional.conv2d(x, w, padding="same", dilation=dilation)
        pad = torch.nn.functional.pad(x, (sides[2], sides[3], sides[0], sides[1]))
        assert torch.equal(conv, torch.nn.functional.conv2d(pad, w, dilation=dilation))


@pytest.mark.parametrize("form", ("channels_last", pytest.param("contiguous", marks=pytest.mark.slow)))
@pytest.mark.parametrize("dynamic", (False, True), ids=("static", "dynamic"))
def test_compile(dynamic, form):
    """One graph, forward and backward, with the results of eager mode; dynamic shapes compile once."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()

    def step(x, w, b):
        return adder_conv2d(x.relu(), w, b, stride=2, padding=1).tanh() * 2

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic)
    g = torch.Generator().manual_seed(0)
    sizes = ((2, 4, 9, 8), (3, 4, 12, 7), (5, 4, 6, 11)) if dynamic else ((2, 4, 9, 8),)
    for size in sizes:
        data = [torch.randn(s, generator=g) for s in (size, (6, 4, 3, 3), (6,))]
        data[0] = FORMATS[form](data[0])
        eager, graph = ([t.clone().requires_grad_() for t in data] for _ in range(2))
        y, z = step(*eager), compiled(*graph)
        torch.testing.assert_close(z, y, rtol=1e-6, atol=1e-6)  # the compiler has its own tanh
        assert z.stride() == y.stride()
        grad = torch.randn(y.shape, generator=g)
        y.backward(grad), z.backward(grad)
        for a, b in zip(eager, graph, strict=True):
            torch.testing.assert_close(b.grad, a.grad, rtol=1e-5, atol=1e-5)
    if dynamic:
        assert torch._dynamo.utils.counters["frames"]["ok"] <= 2, torch._dynamo.utils.counters["frames"]


def test_no_operand_is_written():
    for c in SELECTED:
        i = exact_inputs(c).to(torch.float32)
        versions = [t._version for t in (i.x, i.w, i.grad_y, i.bias)]
        copies = [t.clone() for t in (i.x, i.w, i.grad_y, i.bias)]
        for name in PASSES:
            compute(name, c, i)
        for t, copy, version in zip((i.x, i.w, i.grad_y, i.bias), copies, versions, strict=True):
            assert torch.equal(t, copy) and t._version == version, f"{c!r}"
