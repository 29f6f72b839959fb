"""What cannot be exported is refused by the names of its node and layer, and says what to do."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from adderops.edge import export_c, program_of
from adderops.edge.calls import calls_of
from adderops.edge.program import AdderConv, AdderSums, Bytes, Counts, MultiplyConv, Program, Value, Window
from adderops.models import create_model
from adderops.nn import AdderConv2d
from adderops.quant import convert, reestimate_batchnorm
from adderops.quant.calibration import calibrate
from adderops.quant.scheme import Scheme

from .exported import integer_network

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Between(nn.Module):
    """A small network with a function in the middle."""

    def __init__(self, middle, after=None, channels=4):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.layer = AdderConv2d(4, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.middle, self.after = middle, after
        self.head = nn.Linear(channels, 5)

    def forward(self, x):
        x = self.middle(self.norm(self.layer(self.stem(x))))
        y = self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))
        return y if self.after is None else self.after(y)


def refused(model, match, x=X, **scheme):
    integer = integer_network(model, x, **scheme)
    with pytest.raises(ValueError, match=match):
        program_of(integer, x)


@pytest.fixture(scope="module")
def integer():
    torch.manual_seed(0)
    return integer_network(create_model("lenet5", in_channels=1), torch.randn(4, 1, 32, 32))


@pytest.mark.parametrize(
    ("middle", "match"),
    [
        (torch.sigmoid, r"node 'sigmoid' \(sigmoid\).*expected an operation that C code exists for"),
        (F.hardswish, r"'hardswish'"),
        (lambda x: x * 2, r"node '\w+' .*round|expected"),
        (lambda x: x + 1, r"node 'add\w*' \(add\)"),
        (lambda x: torch.cat([x, x], 1)[:, :4], r"\(cat\)|\(slice\)"),
        (lambda x: x.permute(0, 1, 3, 2), r"'permute'"),
        (lambda x: F.avg_pool2d(x, 2, divisor_override=3), r"average pool"),
    ],
)
def test_operations(middle, match):
    refused(Between(middle), match)


def test_softmax_says_that_logits_do():
    refused(Between(lambda x: x, lambda y: y.softmax(1)), r"'softmax'.*logits")


def test_ends_in_floats():
    refused(Between(F.relu), r"node '\w+' \(conv2d\) of layer 'stem.0'.*ends='int8'", ends="float")


def test_filter_groups():
    refused(
        create_model("lenet5", in_channels=1), r"filter_groups=1", torch.randn(4, 1, 32, 32), filter_groups=3, bits=4
    )


def test_several_outputs():
    refused(Between(lambda x: x, lambda y: (y, y + 0 * y)), r"output: expected one tensor|\(mul\)|\(add\)")


def test_max_pool_of_floats():
    integer = integer_network(Between(lambda x: F.max_pool2d(x, 2)), X)
    with pytest.raises(ValueError, match=r"max pool of bytes"):
        export_c(integer, X, "/nonexistent")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_inputs_of_another_dtype(dtype):
    model = create_model("lenet5", in_channels=1)
    x = torch.randn(4, 1, 32, 32)
    calibrated = calibrate(reestimate_batchnorm(model, [x]).eval(), [x], Scheme(ends="int8"))
    with pytest.raises(ValueError, match=r"'input'.*expected float32"):
        program_of(convert(calibrated.to(dtype), x.to(dtype)), x.to(dtype))


def test_layers_on_two_grids_of_the_input():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 3), AdderConv2d(3, 4, 3)
            self.head = AdderConv2d(4, 4, 1)

        def forward(self, x):
            return self.head(self.a(x) + self.b(x)).flatten(1)

    refused(Two(), "input: expected one grid", bits=4)


@pytest.mark.parametrize("name", ["", "9lives", "a-b", "int", "class", "_x", "x" * 60, "naïve", None, "a\n"])
def test_names(integer, tmp_path, name):
    with pytest.raises(ValueError, match="name: expected an identifier"):
        export_c(integer, torch.zeros(1, 1, 32, 32), tmp_path, name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"epilogue": "float16"}, "epilogue: expected one of float32, integer, got 'float16'"),
        ({"mean": [0.1]}, "std: expected both"),
        ({"mean": [0.1, 0.2], "std": [1.0]}, "mean: expected 1 numbers"),
        ({"mean": [0.1], "std": [0.0]}, "std: expected positive"),
        ({"mean": [float("nan")], "std": [1.0]}, "mean: expected 1 numbers"),
        ({"target": "z80"}, "target: expected one of cortex-m4"),
        ({"target": "cortex-m4", "epilogue": "integer"}, "target: .*epilogue='float32', got"),
        ({"main": True}, "mean: expected numbers with main=True"),
    ],
)
def test_options(integer, tmp_path, options, match):
    with pytest.raises(ValueError, match=match):
        export_c(integer, torch.zeros(1, 1, 32, 32), tmp_path, **options)
    assert not list(tmp_path.iterdir())


def test_examples(integer, tmp_path):
    with pytest.raises(TypeError, match="example: expected a tensor"):
        export_c(integer, [1], tmp_path)
    with pytest.raises(ValueError, match=r"example: expected shape \(N, 1, 32, 32\)"):
        export_c(integer, torch.zeros(1, 3, 32, 32), tmp_path)
    with pytest.raises(ValueError, match="convert"):
        export_c(nn.Linear(2, 2), torch.zeros(1, 2), tmp_path)


def test_names_of_layers_cannot_end_a_comment(tmp_path):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.add_module("a*/b", AdderConv2d(3, 4, 3))
            self.add_module("// head ??/", nn.Linear(4, 2))

        def forward(self, x):
            one, two = self.children()
            return two(F.adaptive_avg_pool2d(one(x), 1).flatten(1))

    export_c(integer_network(Odd(), X), X, tmp_path, "odd")
    text = (tmp_path / "odd.c").read_text() + (tmp_path / "odd.h").read_text()
    assert "a__b" in text and "a*/b" not in text and "??/" not in text


@pytest.mark.parametrize(
    ("size", "filters", "bound", "fits"),
    [(300, 2, 2**14, True), (300, 2, 2**15, False), (9000, 26, 1, True), (9000, 27, 1, False)],
)
@pytest.mark.parametrize("multiplies", [False, True])
def test_sums_of_an_average_over_too_many_pixels(size, filters, bound, fits, multiplies):
    """Both the sums and the places of the outputs, pixels * filters, are counted in 32 bits."""
    window, output = Window((1, 1)), Counts(1.0, bound, False, True)
    ones = torch.ones(filters)
    if multiplies:
        weight = torch.zeros(filters, 1, 1, 1, dtype=torch.int8)
        layer = MultiplyConv("stem", "u", "x", weight, ones, None, window, 1, 0, output)
    else:
        weight = torch.zeros(filters, 1, 1, 1, dtype=torch.uint8)
        layer = AdderConv("stem", "u", AdderSums("x", weight, ones, ones, window, 1, 0), output)
    values = {"x": Value("x", size, size, 1, "uint8"), "u": Value("u", 1, 1, filters, "int32")}
    program = Program(values, (layer,), "x", Bytes(0, 255, 1.0), "u", (filters,), "float32")
    if fits:
        assert calls_of(program)
    else:
        with pytest.raises(ValueError, match=r"layer 'stem'.*below 2\^31, got \d+ pixels of \d+ filters"):
            calls_of(program)
