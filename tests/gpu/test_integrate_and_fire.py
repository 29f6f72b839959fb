"""The CUDA kernels of integrate-and-fire neurons on a GPU, bit for bit; without one the whole file is one skip."""

import pytest
import torch
from ops.test_integrate_and_fire import DTYPES, FORMS, NUMBERS, OP, SHAPES, assert_equal, define, inputs

from gpu.device import DEVICE

ALL = (True, True, True)


def on_device(x: torch.Tensor, threshold: torch.Tensor, initial: torch.Tensor | None, *options) -> list[torch.Tensor]:
    parameters = threshold.to(DEVICE), None if initial is None else initial.to(DEVICE)
    return [y.cpu() for y in OP(x, *parameters, *options, *ALL)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_against_float64(dtype):
    """Every shape in every form, with all kinds of parameters."""
    for i, (shape, form) in enumerate((shape, form) for shape in SHAPES for form in FORMS):
        x, parameters = inputs(shape, dtype)
        for j, (name, (threshold, initial)) in enumerate(parameters.items()):
            options = (*NUMBERS[(i + j) % 2], j % 2 == 0, (i + j) % 3 == 0)
            got = on_device(FORMS[form](x.to(DEVICE)), threshold, initial, *options)
            want = define(FORMS[form](x), threshold, initial, *options)
            assert_equal(got, want, dtype, f"{shape}, {form}, {name}, {options}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_numbers_give_the_bits_of_the_cpu(dtype):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(9, 4, 24, 6, 7, generator=generator).to(dtype)
    x[2, 1, 3, 4, 0], x[3, 0, 0, 0, 1], x[3, 2, 4, 4, 2] = float("nan"), float("inf"), -float("inf")
    threshold = torch.rand(24, generator=generator, dtype=torch.promote_types(dtype, torch.float32)) + 0.1
    for subtract in (True, False):
        options = (0.9, 1.1, 0.7, subtract, True)
        assert_equal(
            on_device(x.to(DEVICE), threshold, None, *options), OP(x, threshold, None, *options, *ALL), dtype, ""
        )


def test_operands_of_two_devices():
    x, one = torch.ones(2, 3, 4, device=DEVICE), torch.ones(1)
    for parameters in ((one, None), (one.to(DEVICE), one)):
        with pytest.raises(RuntimeError, match="integrate_and_fire: .*expected the device of x, got another"):
            OP(x, *parameters, 1.0, 1.0, 1.0, True, False, *ALL)


def test_a_graph_replays_the_operator():
    x, parameters = inputs((6, 2, 16, 4, 8), torch.float16)
    x, threshold, initial = x.to(DEVICE), *(p.to(DEVICE) for p in parameters["columns_first"])

    def step() -> list[torch.Tensor]:
        return OP(x, threshold, initial, 0.5, 1.0, 1.0, True, True, *ALL)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    x.mul_(0.5)
    graph.replay()
    assert all(map(torch.equal, captured, step()))
