"""Errors of the operators called directly, without the Python layer: operator, argument, expected, got."""

import re

import pytest
import torch

OPS = torch.ops.adderops
GEOMETRY = dict(stride=[1, 1], padding=[0, 0, 0, 0], dilation=[1, 1], groups=1)
X, W, GRAD_Y, BIAS = (2, 4, 5, 6), (8, 4, 3, 3), (2, 8, 3, 4), (8,)

# what is wrong, changed arguments, the message after "operator: "
WRONG_IN_EVERY_OPERATOR = [
    (
        "three dimensions",
        dict(x=torch.ones(4, 5, 6)),
        r"x: expected 4 dimensions \(N, C_in, H, W\), got shape \(4, 5, 6\)",
    ),
    (
        "flat weight",
        dict(w=torch.ones(8, 4)),
        r"w: expected 4 dimensions \(C_out, C_in/groups, KH, KW\), got shape \(8, 4\)",
    ),
    (
        "integers",
        dict(x=torch.ones(X).int(), w=torch.ones(W).int()),
        r"x: expected dtype float32, float64, bfloat16 or float16, got ",
    ),
    ("two dtypes", dict(w=torch.ones(W).double()), r"w: expected the dtype of x, float32, got float64"),
    (
        "two halves",
        dict(x=torch.ones(X).half(), w=torch.ones(W).bfloat16()),
        r"w: expected the dtype of x, float16, got bfloat16",
    ),
    ("channels", dict(w=torch.ones(8, 3, 3, 3)), r"w: expected shape \(8, 4, 3, 3\), got \(8, 3, 3, 3\)"),
    ("empty kernel", dict(w=torch.ones(8, 4, 0, 3)), r"w: expected no empty dimension, got shape \(8, 4, 0, 3\)"),
    ("no filter", dict(w=torch.ones(0, 4, 3, 3)), r"w: expected no empty dimension, got shape \(0, 4, 3, 3\)"),
    ("groups and C_in", dict(groups=3), r"groups: expected a positive divisor of C_in = 4 and C_out = 8, got 3"),
    ("groups and C_out", dict(w=torch.ones(6, 1, 3, 3), groups=4), r"groups: .* C_in = 4 and C_out = 6, got 4"),
    ("no groups", dict(groups=0), r"groups: expected a positive divisor .*, got 0"),
    ("negative groups", dict(groups=-1), r"groups: expected a positive divisor .*, got -1"),
    ("stride of 0", dict(stride=[1, 0]), r"stride: expected integers from 1 to 2\^31 - 1, got \(1, 0\)"),
    ("one stride", dict(stride=[1]), r"stride: expected 2 integers, got \(1\)"),
    ("huge stride", dict(stride=[1, 2**31]), r"stride: expected integers from 1 to 2\^31 - 1, got \(1, 2147483648\)"),
    (
        "negative padding",
        dict(padding=[0, 0, -1, 0]),
        r"padding: expected integers from 0 to 2\^31 - 1, got \(0, 0, -1, 0\)",
    ),
    ("two paddings", dict(padding=[1, 1]), r"padding: expected 4 integers, got \(1, 1\)"),
    ("dilation of 0", dict(dilation=[0, 1]), r"dilation: expected integers from 1 to 2\^31 - 1, got \(0, 1\)"),
    ("three dilations", dict(dilation=[1, 1, 1]), r"dilation: expected 2 integers, got \(1, 1, 1\)"),
    (
        "tall kernel",
        dict(w=torch.ones(8, 4, 6, 3)),
        r"w: expected a kernel no larger than the padded input in height, got 6 > 5",
    ),
    ("wide kernel", dict(dilation=[1, 3]), r"w: expected a kernel no larger than the padded input in width, got 7 > 6"),
]
WRONG_BIAS = [
    ("length", torch.ones(7), r"bias: expected shape \(8\), got \(7\)"),
    ("dimensions", torch.ones(8, 1), r"bias: expected shape \(8\), got \(8, 1\)"),
    ("dtype", torch.ones(8).double(), r"bias: expected the dtype of x, float32, got float64"),
]
WRONG_GRAD_Y = [
    ("size", torch.ones(2, 8, 3, 3), r"grad_y: expected shape \(2, 8, 3, 4\), got \(2, 8, 3, 3\)"),
    ("batch", torch.ones(1, 8, 3, 4), r"grad_y: expected shape \(2, 8, 3, 4\), got \(1, 8, 3, 4\)"),
    ("dimensions", torch.ones(8, 3, 4), r"grad_y: expected shape \(2, 8, 3, 4\), got \(8, 3, 4\)"),
    ("dtype", torch.ones(GRAD_Y).bfloat16(), r"grad_y: expected the dtype of x, float32, got bfloat16"),
]


def call(name: str, bias=None, grad_y=None, **changed):
    arguments = {"x": torch.ones(X), "w": torch.ones(W), **GEOMETRY, **changed}
    if name == "adder_conv2d":
        return OPS.adder_conv2d(bias=bias, **arguments)
    return getattr(OPS, name)(grad_y=torch.ones(GRAD_Y) if grad_y is None else grad_y, **arguments)


NAMES = ("adder_conv2d", "adder_conv2d_grad_x", "adder_conv2d_grad_w")


def test_the_unchanged_call_is_right():
    assert call("adder_conv2d", bias=torch.ones(BIAS)).shape == GRAD_Y
    assert call("adder_conv2d_grad_x").shape == X and call("adder_conv2d_grad_w").shape == W


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "changed, message", [w[1:] for w in WRONG_IN_EVERY_OPERATOR], ids=[w[0] for w in WRONG_IN_EVERY_OPERATOR]
)
def test_wrong_input(name, changed, message):
    with pytest.raises(RuntimeError, match=f"{name}: {message}"):
        call(name, **changed)


@pytest.mark.parametrize("bias, message", [w[1:] for w in WRONG_BIAS], ids=[w[0] for w in WRONG_BIAS])
def test_wrong_bias(bias, message):
    with pytest.raises(RuntimeError, match=message):
        call("adder_conv2d", bias=bias)


@pytest.mark.parametrize("name", NAMES[1:])
@pytest.mark.parametrize("grad_y, message", [w[1:] for w in WRONG_GRAD_Y], ids=[w[0] for w in WRONG_GRAD_Y])
def test_wrong_grad_y(name, grad_y, message):
    with pytest.raises(RuntimeError, match=f"{name}: {message}"):
        call(name, grad_y=grad_y)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", ("sse9", "AVX2", " avx2"))
def test_unknown_instruction_set(name, value, monkeypatch):
    monkeypatch.setenv("ADDEROPS_CPU_ISA", value)
    names = ", ".join(OPS._cpu_isas())
    with pytest.raises(
        RuntimeError, match=f"{name}: ADDEROPS_CPU_ISA: expected one of {names} on this machine, got '{value}'"
    ):
        call(name)
    with pytest.raises(RuntimeError, match="_cpu_isa: ADDEROPS_CPU_ISA: expected one of"):
        OPS._cpu_isa()


def test_empty_instruction_set_means_the_best(monkeypatch):
    monkeypatch.setenv("ADDEROPS_CPU_ISA", "")
    assert OPS._cpu_isa() == OPS._cpu_isas()[-1]


def freed(t: torch.Tensor, share: float = 0) -> torch.Tensor:
    """Returns t with only a share of the memory that its elements need, as FSDP leaves a parameter."""
    t = t.clone()
    t.untyped_storage().resize_(int(t.untyped_storage().nbytes() * share))
    return t


def bytes_of(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.ones(shape, dtype=torch.uint8)


IMAGES, NUMBERS = (2, 3, 4, 5), (0.3, 0.4, True)


def pairs(student: torch.Tensor, teacher: torch.Tensor, scales: torch.Tensor) -> tuple:
    """The lists of a call about two layers, the second of which is given."""
    return [torch.ones(IMAGES), student], [torch.ones(IMAGES), teacher], scales


INT8_OPTIONS = (1.0, False, False, 0, 255, 0, *GEOMETRY.values())
# operator, its tensors by name, and the call
CALLS_WITH_STORAGE = [
    (
        "adder_conv2d",
        dict(x=torch.ones(X), w=torch.ones(W), bias=torch.ones(BIAS)),
        lambda f, t: f(*t, *GEOMETRY.values()),
    ),
    *(
        (
            name,
            dict(grad_y=torch.ones(GRAD_Y), x=torch.ones(X), w=torch.ones(W)),
            lambda f, t: f(*t, *GEOMETRY.values()),
        )
        for name in NAMES[1:]
    ),
    (
        "adder_conv2d_int8",
        dict(x=bytes_of(X), w=bytes_of(W), scale=torch.ones(8), offset=torch.ones(8), residual=bytes_of(GRAD_Y)),
        lambda f, t: f(*t, *INT8_OPTIONS),
    ),
    (
        "integrate_and_fire",
        dict(x=torch.ones(2, 3, 4, 5), threshold=torch.ones(4, 5), initial=torch.ones(3, 4, 5)),
        lambda f, t: f(*t, 1.0, 1.0, 1.0, True, False, True, True, True),
    ),
    ("quantize", dict(x=torch.ones(X)), lambda f, t: f(*t, 0.1, 0, 255)),
    (
        "_kernel_moments",
        {"student[1]": torch.ones(IMAGES), "teacher[1]": torch.ones(IMAGES), "scales": torch.ones(2, 2)},
        lambda f, t: f(*pairs(*t), *NUMBERS),
    ),
    (
        "_kernel_moments_grad",
        {"student[1]": torch.ones(IMAGES), "teacher[1]": torch.ones(IMAGES), "scales": torch.ones(2, 2)}
        | {"grad": torch.ones(2 * 7 * 6)},
        lambda f, t: f([*t][3], *pairs(*[*t][:3]), *NUMBERS),
    ),
    ("_mean_abs", {"x[1]": torch.ones(IMAGES)}, lambda f, t: f([torch.ones(IMAGES), *t])),
    (
        "_match_rows",
        {"mixed_a[0]": torch.ones(2, 3, 9), "mixed_c[0]": torch.ones(2, 3, 9)}
        | {"w_a[0]": torch.ones(2, 3, 4), "w_c[0]": torch.ones(2, 3, 5)},
        lambda f, t: f(*([tensor] for tensor in t), 1e-5),
    ),
]


@pytest.mark.parametrize("share", (0, 0.9), ids=("gone", "too short"))
@pytest.mark.parametrize("name, tensors, call", CALLS_WITH_STORAGE, ids=[c[0] for c in CALLS_WITH_STORAGE])
def test_storage_that_is_gone(name, tensors, call, share):
    op = getattr(OPS, name).default
    call(op, tensors.values())
    for spoiled in tensors:
        given = [freed(t, share) if key == spoiled else t for key, t in tensors.items()]
        with pytest.raises(
            RuntimeError, match=f"{name}: {re.escape(spoiled)}: expected a storage of [0-9]+ bytes or more, got "
        ):
            call(op, given)


def test_an_empty_tensor_needs_no_storage():
    x = freed(torch.ones(X))[:0]
    assert OPS.adder_conv2d(x, torch.ones(W), None, *GEOMETRY.values()).shape == (0, *GRAD_Y[1:])


def test_errors_are_the_text_alone():
    """They name no line of our sources or of libtorch's headers on the build machine."""
    for arguments in (dict(stride=[0, 1]), dict(x=torch.ones(1, 1, 1, 1).expand(2**50, 4, 5, 6))):
        with pytest.raises(RuntimeError) as caught:
            call("adder_conv2d", **arguments)
        assert str(caught.value).startswith("adder_conv2d: ") and "csrc" not in str(caught.value)
        assert "originally from" not in str(caught.value)
