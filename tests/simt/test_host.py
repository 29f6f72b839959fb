"""host.py runs a pass on tensors of any strides, and reports everything that a kernel must not touch.

Passes with one output per thread stand in for the real kernels (tests/simt/trial_passes.cpp).
"""

import ctypes

import pytest
import torch

from adderops import reference
from simt import builder, host

pytestmark = pytest.mark.skipif(not builder.compiler(), reason="no C++ compiler: set CXX, or install g++")

KERNELS = (builder.HERE / "trial_passes.cpp",)
GEOMETRY = {"stride": (2, 1), "padding": (1, 0, 2, 1), "dilation": (1, 2), "groups": 2}


def tensors(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Small integers, none of them contiguous; grad_y is an expanded tensor."""
    torch.manual_seed(0)
    x = torch.randint(-9, 10, (2, 6, 7, 9)).to(dtype)[:, :, 1:, ::2]
    w = torch.randint(-9, 10, (3, 8, 3, 2)).to(dtype).transpose(0, 1)
    grad_y = torch.randint(-9, 10, (2, 8, 3, 1)).to(dtype).expand(2, 8, 3, 6)
    return {"x": x, "w": w, "grad_y": grad_y, "bias": torch.arange(8).to(dtype)}


def operands(name: str, of: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    return (of["x"], of["w"]) if name == "forward" else (of["grad_y"], of["x"], of["w"])


def expected(name: str, of: dict[str, torch.Tensor]) -> torch.Tensor:
    x, w, g = (of[key].double() for key in ("x", "w", "grad_y"))
    geometry = (list(GEOMETRY["stride"]), list(GEOMETRY["padding"]), list(GEOMETRY["dilation"]), GEOMETRY["groups"])
    if name == "forward":
        return reference.adder_conv2d(x, w, None, *geometry)
    return getattr(reference, f"adder_conv2d_{name}")(g, x, w, *geometry)


@pytest.mark.parametrize("variant", ("plain", "race"))
@pytest.mark.parametrize("dtype", host.ELEMENT_TYPES, ids=str)
@pytest.mark.parametrize("name", host.CONV2D)
def test_values(name, dtype, variant):
    of = tensors(dtype)
    want = expected(name, of).to(dtype)
    passes = host.build(variant, KERNELS)
    for order in builder.ORDERS:
        assert torch.equal(passes.conv2d(name, *operands(name, of), **GEOMETRY, order=order), want)


@pytest.mark.parametrize("name", host.CONV2D)
def test_strides_of_the_result(name):
    """The strides of `out`; without it channels_last where the first operand is, else contiguous."""
    of, passes = tensors(), host.build("race", KERNELS)
    want = expected(name, of).float()
    assert passes.conv2d(name, *operands(name, of), **GEOMETRY).is_contiguous()
    wide = torch.empty(2, *want.shape[:3], 2 * want.shape[3])[1, :, :, :, ::2]
    got = passes.conv2d(name, *operands(name, of), **GEOMETRY, out=wide)
    assert got.stride() == wide.stride() and torch.equal(got, want)
    of = {key: t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t for key, t in of.items()}
    got = passes.conv2d(name, *operands(name, of), **GEOMETRY)
    assert got.is_contiguous(memory_format=torch.channels_last) and torch.equal(got, want)


def test_bias_and_the_inputs_addresses():
    of, passes = tensors(), host.build("race", KERNELS)
    want = expected("forward", of).float() + of["bias"].view(-1, 1, 1)
    for offset in range(4):
        x = torch.zeros(of["x"].numel() + 4)[offset:].as_strided(of["x"].shape, of["x"].contiguous().stride())
        x.copy_(of["x"])
        buffer = host.Buffer("x", x, 0xFF, False)
        assert (buffer.data - x.data_ptr()) % 256 == 0
        assert torch.equal(passes.conv2d("forward", x, of["w"], bias=of["bias"], **GEOMETRY), want)


@pytest.mark.parametrize(
    ("variant", "finding"), (("plain", "^writes beyond the workspace"), ("race", "out of bounds on global workspace"))
)
@pytest.mark.parametrize("name", host.CONV2D)
def test_a_workspace_too_short(name, variant, finding):
    of = tensors()
    with pytest.raises(host.KernelError, match=finding):
        host.build(variant, KERNELS).conv2d(name, *operands(name, of), **GEOMETRY, tile=1)


@pytest.mark.parametrize(
    ("variant", "finding"), (("plain", "^out: a kernel wrote outside"), ("race", "between the elements on global out"))
)
@pytest.mark.parametrize("name", host.CONV2D)
def test_writes_between_the_elements(name, variant, finding):
    of = tensors()
    shape = expected(name, of).shape
    padded = torch.empty(*shape[:3], shape[3] + 1)[..., :-1]
    with pytest.raises(host.KernelError, match=finding):
        host.build(variant, KERNELS).conv2d(name, *operands(name, of), **GEOMETRY, out=padded, tile=2)


def test_tiles_and_wrong_arguments():
    of, passes = tensors(), host.build("plain", KERNELS)
    assert [passes.tiles(name) for name in host.CONV2D] == [3, 3, 3]
    with pytest.raises(ValueError, match="out: expected the shape"):
        passes.conv2d("forward", of["x"], of["w"], **GEOMETRY, out=torch.empty(1, 1, 1, 1))
    with pytest.raises(ValueError, match="one dtype"):
        passes.conv2d("forward", of["x"], of["w"].double(), **GEOMETRY)


def test_structs_are_those_of_csrc(monkeypatch):
    """A missing field changes the size, which Kernels compares."""
    fields = host.Conv2dArgs._fields_[:-1]
    shorter = type("Conv2dArgs", (ctypes.Structure,), {"_fields_": fields})
    monkeypatch.setattr(host, "STRUCTS", (*host.STRUCTS[:2], shorter))
    path = host.library("plain", KERNELS)
    with pytest.raises(
        TypeError, match=f"Conv2dArgs: host.py has {ctypes.sizeof(host.Conv2dArgs) - 8} bytes, csrc has"
    ):
        host.Kernels(path)


def test_a_pass_that_the_library_lacks():
    with pytest.raises(host.KernelError, match="no such pass"):
        host.build("plain", KERNELS).quantize(torch.zeros(1, 1, 1, 1), 1.0, 0)


def test_mutants():
    """A mutant differs in one place, its values show it, and the sources and other builds are unchanged."""
    of = tensors()
    text = (builder.CSRC / "definition/conv2d.h").read_text()
    changed = host.mutant([("definition/conv2d.h", "sum -= d < 0 ? -d : d;", "sum -= d;")], kernels=KERNELS)
    assert not torch.equal(changed.conv2d("forward", of["x"], of["w"], **GEOMETRY), expected("forward", of).float())
    assert torch.equal(changed.conv2d("grad_w", *operands("grad_w", of), **GEOMETRY), expected("grad_w", of).float())
    unchanged = host.build("plain", KERNELS)
    assert torch.equal(unchanged.conv2d("forward", of["x"], of["w"], **GEOMETRY), expected("forward", of).float())
    assert (builder.CSRC / "definition/conv2d.h").read_text() == text
    old = "sum += element<T>(args.grad_y, n, co, oh, ow) * d;"
    new = old.replace("ow)", "ow + (ow == p.OW - 1))")
    beyond = host.mutant([("definition/conv2d.h", old, new)], "race", KERNELS)
    with pytest.raises(host.KernelError, match="out of bounds on global grad_y"):
        beyond.conv2d("grad_x", of["grad_y"].contiguous(), of["x"], of["w"], **GEOMETRY)
    for old in ("no such text", "sum"):
        with pytest.raises(ValueError, match="once, found it"):
            host.mutant([("definition/conv2d.h", old, "")], kernels=KERNELS)


@pytest.mark.slow
def test_sanitized_runs():
    """The first call is correct, the second ends the process with the sanitizer's report."""
    of = tensors()
    calls = [("conv2d", ("forward", of["x"], of["w"]), GEOMETRY | {"tile": tile}) for tile in (-1, 1)]
    with pytest.raises(host.KernelError, match="AddressSanitizer: use-after-poison(.|\n)*trial_passes.cpp"):
        host.run_sanitized(calls, KERNELS)
