"""The three passes, bit for bit: sums of small multiples of 1/4 do not round, so there is one correct result.

Every instruction set, memory layout and dtype must give it.
"""

from dataclasses import replace

import pytest
import torch
from cases import (
    CASES,
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
    opposite_offsets,
    random_case,
)
from slow import slow_except

HALVES = (torch.bfloat16, torch.float16)
QUICK = {*CASES[::3], *SELECTED}


def operands(name: str, inputs: Inputs) -> list[str]:
    return ["x", "w"] if name == "forward" else ["grad_y", "x", "w"]


def rearranged(inputs: Inputs, **how) -> Inputs:
    """The fields named, each in a memory layout of its own."""
    return replace(inputs, **{field: arrange(getattr(inputs, field)) for field, arrange in how.items()})


@pytest.mark.parametrize("name", PASSES)
@pytest.mark.parametrize("case", slow_except(QUICK, CASES), ids=str)
def test_every_geometry_in_both_formats(case, name, backend):
    inputs, want = exact_inputs(case).to(torch.float32, backend.device), exact_result(name, case).float()
    for x in FORMATS.values():
        for w in FORMATS.values():
            for grad_y in FORMATS.values() if name != "forward" else (FORMATS["contiguous"],):
                arranged = rearranged(inputs, x=x, w=w, grad_y=grad_y)
                formats = ", ".join(f"{f} {getattr(arranged, f).stride()}" for f in operands(name, arranged))
                assert_same(compute(name, case, arranged), want, f"{name} of {case!r}, strides of {formats}")


@pytest.mark.parametrize("seeds", (range(50), pytest.param(range(50, 200), marks=pytest.mark.slow)), ids=str)
@pytest.mark.parametrize("name", PASSES)
def test_random_geometries(name, seeds, backend, set_threads):
    for seed in seeds:
        set_threads(1 + seed % 3)
        c = random_case(seed)
        pick = list(FORMATS.values())
        arranged = rearranged(
            exact_inputs(c).to(torch.float32, backend.device),
            x=pick[seed % 2],
            w=pick[seed // 2 % 2],
            grad_y=pick[seed // 4 % 2],
        )
        assert_same(compute(name, c, arranged), exact_result(name, c).float(), f"{name} of {c!r}")


@pytest.mark.parametrize("dtype", (torch.float64, *HALVES), ids=str)
@pytest.mark.parametrize("name", PASSES)
def test_other_dtypes(name, dtype, backend):
    for c in SELECTED:
        inputs = exact_inputs(c).to(dtype, backend.device)
        # float32 holds the exact sum, so this rounds once
        want = exact_result(name, c).float().to(dtype)
        for how in FORMATS.values():
            assert_same(compute(name, c, inputs.arranged(how)), want, f"{name} of {c!r} in {dtype}")


@pytest.mark.parametrize("dtype", (torch.float32, *HALVES), ids=str)
@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("name", PASSES)
def test_views(name, view, dtype, backend):
    """Any strides, one operand at a time and all at once; the memory around a view is NaN and stays unwritten."""
    for c in SELECTED:
        inputs, want = exact_inputs(c).to(dtype, backend.device), exact_result(name, c).float().to(dtype)
        fields = operands(name, inputs)
        for chosen in [[f] for f in fields] + [fields]:
            arranged = rearranged(inputs, **{f: VIEWS[view] for f in chosen})
            assert_same(compute(name, c, arranged), want, f"{name} of {c!r}, {view} {' and '.join(chosen)}")
            for f in chosen:
                assert_same(getattr(arranged, f), getattr(inputs, f).cpu(), f"{f} after {name} of {c!r}")


@pytest.mark.parametrize("name", PASSES)
@pytest.mark.parametrize("c", SELECTED, ids=str)
def test_expanded_operands(c, name, backend):
    """Zero strides: one image for the whole batch, one filter for all outputs, one gradient for all pixels."""
    inputs = exact_inputs(c).to(torch.float32, backend.device)
    expanded = Inputs(
        inputs.x[:1].expand(inputs.x.shape),
        inputs.w[:1].expand(inputs.w.shape),
        inputs.grad_y[:, :, :1, :1].expand(inputs.grad_y.shape),
        inputs.bias[:1].expand(inputs.bias.shape),
    )
    dense = Inputs(*(t.contiguous() for t in (expanded.x, expanded.w, expanded.grad_y, expanded.bias)))
    assert_same(compute(name, c, expanded), define(name, c, dense).float(), f"{name} of {c!r}")


@pytest.mark.parametrize("offset", (64, 1024))
@pytest.mark.parametrize("c", SELECTED, ids=str)
def test_common_offset(c, offset, backend):
    """Far from zero sum x + sum w - 2*sum min(x, w) cancels; the sums stay exact, and so does the result."""
    for how in FORMATS.values():
        arranged = rearranged(exact_inputs(c, offset).to(torch.float32, backend.device), x=how, w=how)
        for name in ("forward", "grad_x"):
            assert_same(compute(name, c, arranged), exact_result(name, c, offset).float(), f"{name} of {c!r}")


@pytest.mark.parametrize("form", FORMATS)
def test_opposite_offsets(form, backend):
    """Offsets of both signs cancel within sum x + sum w and leave no digits; only the direct form is exact."""
    for c in [*SELECTED, case("deep", (1, 512, 2, 3), 33, 1), case("deep-k3", (1, 96, 5, 6), 20, 3)]:
        if c.C_in == c.groups or any(c.padding):  # a padded zero is far from w, which makes y as large as the offset
            continue
        inputs = opposite_offsets(c, exact_inputs(c), 2**20)
        arranged = rearranged(inputs.to(torch.float32, backend.device), x=FORMATS[form], w=FORMATS[form])
        assert_same(compute("forward", c, arranged), define("forward", c, inputs).float(), f"forward of {c!r}")


def test_without_bias(backend):
    for c in SELECTED:
        inputs = exact_inputs(c).to(torch.float32, backend.device)
        want = exact_result("forward", c) - inputs.bias.cpu().double()[:, None, None]
        assert_same(compute("forward", c, inputs, bias=False), want.float(), f"forward of {c!r}")


def test_bias_view(backend):
    """A bias need not be dense."""
    c = case("bias", (2, 3, 4, 4), 33, 2)
    inputs = exact_inputs(c).to(torch.float32, backend.device)
    bias = torch.full((67,), float("nan"), device=backend.device)[1::2].copy_(inputs.bias)
    assert_same(
        compute("forward", c, rearranged(inputs, bias=lambda _: bias)), exact_result("forward", c).float(), "bias"
    )
