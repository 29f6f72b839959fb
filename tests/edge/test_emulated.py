"""Whole networks on emulated processors: every bit of the logits is that of Python.

The harness compares each output with the definition (`adderops.edge.interpreter`); arena and output lie between guards,
image and arena one byte off alignment. Here the definition is compared with the integer network as well.
"""

import functools

import pytest
import torch
import torch.nn.functional as F
from slow import slow_except
from torch import nn

from adderops.nn import AdderConv2d

from .emulation import cortex_m, toolchain

from harness import edge_programs  # isort: skip
from harness.edge_peers import WrongResult  # isort: skip

NAMES = ("resnet8", "ds_cnn", "residual")
SHAPES = {"resnet8": (3, 12, 12), "ds_cnn": (1, 13, 6)}  # small: cores without USADA8 take ten times as long
CORES = ("cortex-m4", "cortex-m33", "cortex-m7", "cortex-m0plus", "aarch64")


class Residual(nn.Module):
    """A residual, a strided shortcut, channels that do not fill a word; weights small enough for fixed-point scales."""

    def __init__(self):
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(3, 16, 3, padding=1), *(AdderConv2d(16, 16, 3, padding=1) for _ in "ab")
        self.c, self.d = AdderConv2d(16, 22, 3, stride=2, padding=1), AdderConv2d(16, 22, 1, stride=2)
        self.e, self.fc = AdderConv2d(22, 7, 1), nn.Linear(7 * 9, 5)
        for layer in (self.a, self.b, self.c, self.d, self.e):
            layer.weight.data *= 0.2
        self.norms = nn.ModuleList(nn.BatchNorm2d(c) for c in (16, 16, 16, 22, 22, 7))

    def forward(self, x):
        n = self.norms
        x = n[0](self.stem(x)).relu()
        x = (n[2](self.b(n[1](self.a(x)).relu())) + x).relu()
        x = (n[3](self.c(x)) + n[4](self.d(x))).relu()
        return self.fc(F.max_pool2d(n[5](self.e(x)).relu(), 2).flatten(1))


@functools.cache
def network(name, epilogue="float32"):
    if name == "residual":
        torch.manual_seed(0)
        return edge_programs.integer_program(Residual(), torch.randn(1, 3, 12, 12), epilogue)
    return edge_programs.network(name, epilogue, shape=SHAPES[name])


@pytest.fixture(autouse=True)
def one_thread(set_threads):
    set_threads(1)


def run(name, core, compiler=None, path="chosen", epilogue="float32", count=False):
    tools = toolchain(compiler, core)
    program, images, logits = network(name, epilogue)
    if epilogue == "float32":
        want = edge_programs.interpret(program, images)
        assert torch.equal(want, logits)
    return edge_programs.network_run(program, images, tools, core, path, count)


@pytest.mark.parametrize("name", slow_except(("residual",), NAMES))
@pytest.mark.parametrize("core", slow_except(("cortex-m4", "cortex-m0plus", "aarch64"), CORES))
def test_logits_are_those_of_python(name, core):
    counted = run(name, core, "zig" if core == "cortex-m7" else None)
    assert counted.terms > 50_000


@pytest.mark.parametrize("core", ("cortex-m4", "cortex-m4-soft", "cortex-m0plus", "aarch64"))
def test_fixed_point_epilogue(core):
    counted = run("residual", core, epilogue="integer")
    soft = [name for name in counted.linked.elf.functions if "mul" in name and ("f3" in name or "fmul" in name)]
    assert bool(soft) != cortex_m.CORES[core].fpu  # only the logits are floats


@pytest.mark.parametrize("compiler", slow_except(("gcc",), ("gcc", "zig")))
@pytest.mark.parametrize("path", ("assembly", "ACLE", "C"))
def test_every_path_on_cortex_m4(path, compiler):
    run("resnet8", "cortex-m4", compiler, path)


@pytest.mark.parametrize("value", (0, 255))
@pytest.mark.parametrize("epilogue", ("float32", "integer"))
def test_extreme_images(value, epilogue):
    program, images, _ = network("residual", epilogue)
    tools = toolchain()
    edge_programs.network_run(program, torch.full_like(images, value), tools, "cortex-m4", count=False)


def test_soft_floats_cost_more_than_the_fixed_point_epilogue():
    floats, fixed = (run("residual", "cortex-m4-soft", epilogue=e, count=True) for e in ("float32", "integer"))
    assert fixed.run.instructions < 0.8 * floats.run.instructions


def test_a_wrong_instruction_is_found(monkeypatch):
    tools = toolchain()
    program, images, _ = network("resnet8")
    code = edge_programs.emit.code

    def broken(source):
        text = code(source)
        pixel = "#define PIXEL_3(op, x) PIXEL(op, 7, 11, x)"
        assert pixel in text
        return text.replace(pixel, pixel.replace("11", "10"))

    monkeypatch.setattr(edge_programs.emit, "code", broken)
    with pytest.raises(WrongResult, match="cortex-m4, chosen, float32: wrong result"):
        edge_programs.network_run(program, images, tools, "cortex-m4", count=False)
