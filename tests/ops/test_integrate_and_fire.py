"""The operator integrate_and_fire against its definition, bit for bit: memory formats, sizes, parameters, requests.

Currents and thresholds are multiples of 1/4 and factors dyadic, so that float64 and every type here agree exactly.
"""

from itertools import product

import pytest
import torch
from slow import slow_except

from adderops import reference
from adderops.spiking import functional

OP = torch.ops.adderops.integrate_and_fire.default
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def step_order(x: torch.Tensor, *dims: int) -> torch.Tensor:
    """The same numbers, the last of `dims` innermost in memory."""
    return x.permute(dims).contiguous().permute([dims.index(i) for i in range(x.dim())])


def with_gaps(x: torch.Tensor) -> torch.Tensor:
    return torch.stack((x, x), -1)[..., 0]


# of x with 4 dimensions or more; 'channels_last' and 'contiguous' are read in place, the others copied
FORMS = {
    "contiguous": torch.Tensor.contiguous,
    "channels_last": lambda x: step_order(x, 0, 1, *range(3, x.dim()), 2),
    "some_channels": lambda x: FORMS["channels_last"](torch.cat((x, x), 2))[:, :, : x.size(2)],
    "images_first": lambda x: step_order(x, 1, 0, *range(2, x.dim())),
    "columns_first": lambda x: step_order(x, 0, 1, 2, *reversed(range(3, x.dim()))),
    "gaps": with_gaps,
    "every_second_step": lambda x: torch.stack((x, x), 1).flatten(0, 1)[::2],
    "constant": lambda x: x[:1].expand_as(x),
    "constant_channels_last": lambda x: step_order(x[:1], 0, 1, *range(3, x.dim()), 2).expand_as(x),
    "constant_with_gaps": lambda x: with_gaps(x[:1]).expand_as(x),
}
# Steps about the lanes of a vector (4, 8, 16), the neurons of a task (1024), and the steps of a group (4).
SHAPES = [
    *((1, 1, 3, 5, 1), (3, 2, 5, 3, 1), (4, 1, 17, 1, 1), (5, 3, 1, 7, 9), (9, 2, 16, 4, 8)),
    *((4, 1, 31, 33, 1), (2, 5, 2, 103, 1), (6, 2, 3, 5, 7, 11)),
]


def inputs(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[torch.Tensor, dict[str, tuple]]:
    """x, and the parameters by name: (threshold, initial) of every shape that the operator takes."""
    generator = torch.Generator().manual_seed(sum(shape))
    wide = torch.promote_types(dtype, torch.float32)

    def quarters(least: int, most: int, *sizes: int) -> torch.Tensor:
        return torch.randint(least, most, sizes, generator=generator).to(wide) / 4

    x, channels, pixels = quarters(-4, 9, *shape).to(dtype), shape[2], shape[3:]
    return x, {
        "one": (quarters(1, 9), None),
        "channel": (quarters(1, 9, channels), quarters(-4, 4, 1)),
        "neuron": (quarters(1, 9, channels, *pixels), quarters(-4, 4, channels)),
        "state": (quarters(1, 9, 1), quarters(-4, 4, *shape[1:])),
        "strided": (
            quarters(1, 9, channels, *(1 for _ in pixels)).expand(channels, *pixels),
            with_gaps(quarters(-4, 4, *shape[1:])),
        ),
        "columns_first": (
            step_order(quarters(1, 9, channels, *pixels), 0, *reversed(range(1, 1 + len(pixels)))),
            step_order(quarters(-4, 4, *shape[1:]), 0, *range(2, len(shape) - 1), 1),
        ),
    }


NUMBERS = ((1.0, 1.0, 1.0), (0.5, 0.5, 0.75))  # decay, gain, fire


def assert_equal(got: list[torch.Tensor], want: tuple[torch.Tensor, ...], dtype: torch.dtype, what: object) -> None:
    """Spikes, counts and membrane, exactly; NaN where NaN is wanted."""
    wide = torch.promote_types(dtype, torch.float32)
    for name, a, b, expected in zip(("spikes", "counts", "membrane"), got, want, (dtype, wide, wide), strict=True):
        assert a.dtype == expected and a.shape == b.shape, f"{what}: {name}: {a.dtype}, {tuple(a.shape)}"
        assert torch.equal(a.double().nan_to_num(12345.0), b.double().nan_to_num(12345.0)), f"{what}: {name}"


def run(x, threshold, initial, *options, wanted=(True, True, True)) -> list[torch.Tensor]:
    return OP(x, threshold, initial, *options, *wanted)


def define(x, threshold, initial, *options) -> tuple[torch.Tensor, ...]:
    """The definition in float64."""
    return reference.integrate_and_fire(
        x.double(), threshold.double(), None if initial is None else initial.double(), *options
    )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", slow_except((torch.float32,), DTYPES), ids=str)
def test_against_float64(dtype, form, backend, set_threads):
    """Every shape in every form, with all kinds of parameters, resets and outputs."""
    for i, shape in enumerate(SHAPES):
        x, parameters = inputs(shape, dtype)
        x = FORMS[form](x)
        for j, (name, (threshold, initial)) in enumerate(parameters.items()):
            set_threads(1 + j % 3)
            options = (*NUMBERS[(i + j) % 2], j % 2 == 0, (i + j) % 3 == 0)
            what = f"{shape}, {form}, {name}, {options}"
            assert_equal(run(x, threshold, initial, *options), define(x, threshold, initial, *options), dtype, what)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_numbers_give_the_bits_of_the_formula(dtype, backend):
    """Products and sums are rounded one by one, so that the definition in the same type has the same bits."""
    x = torch.randn(7, 3, 5, 41).to(dtype)
    x[2, 1, 3, 4], x[3, 0, 0, 0], x[3, 2, 4, 40] = float("nan"), float("inf"), -float("inf")
    threshold = torch.rand(5, dtype=torch.promote_types(dtype, torch.float32))
    for subtract, scaled in product((False, True), repeat=2):
        options = (0.9, 1.1, 0.7, subtract, scaled)
        want = reference.integrate_and_fire(x, threshold, None, *options)
        assert_equal(run(x, threshold, None, *options), want, dtype, options)
        assert want[2][1, 3, 4].isnan() and want[0][3, 0, 0, 0] > 0


@pytest.mark.parametrize("width", (1, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 1023, 1024, 1025, 2050))
def test_steps_of_any_width(width, backend):
    """(T, N) and (T, N, C), the last neuron in the last lane or beyond; nothing around an output changes."""
    for shape in ((6, width), (6, 1, width), (3, width, 1)):
        x = torch.randint(-4, 9, shape, generator=torch.Generator().manual_seed(width)) / 4
        initial = torch.arange(x[0].numel()).view(shape[1:]) % 5 / 4
        options = (1.0, 1.0, 1.0, True, False)
        want = define(x, torch.tensor(1.0), initial, *options)
        assert_equal(run(x, torch.tensor(1.0), initial, *options), want, x.dtype, shape)


def test_many_spikes(backend):
    """Those of a large call are stored past the caches, in whole vectors where all steps are aligned."""
    for neurons, threshold in ((2**19, torch.arange(2**19) % 3 / 2 + 0.5), (2**19 + 5, torch.tensor(1.0))):
        x = torch.arange(4 * neurons).view(4, 1, neurons) % 13 / 8
        options = (threshold, None, 1.0, 1.0, 1.0, True, True)
        assert_equal(run(x, *options), reference.integrate_and_fire(x, *options), x.dtype, neurons)


def test_results_have_the_format_of_the_steps():
    x, _ = inputs((3, 2, 5, 4, 6), torch.float32)
    for form, last in {
        "contiguous": False,
        "channels_last": True,
        "constant_channels_last": True,
        "gaps": False,
    }.items():
        for got in run(FORMS[form](x), torch.tensor(1.0), None, 1.0, 1.0, 1.0, True, False):
            images = got.flatten(0, -4)
            assert images.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


@pytest.mark.parametrize("wanted", [w for w in product((False, True), repeat=3) if any(w)])
def test_every_request(wanted, backend):
    x, parameters = inputs((5, 3, 7, 6, 5), torch.float32)
    threshold, initial = parameters["columns_first"]
    options = (0.5, 1.0, 1.0, False, True)
    all_three = run(x, threshold, initial, *options)
    got = run(x, threshold, initial, *options, wanted=wanted)
    assert all(map(torch.equal, got, [y for y, want in zip(all_three, wanted, strict=True) if want]))
    names = [name for name, want in zip(functional.OUTPUTS, wanted, strict=True) if want]
    for returns in (names, names[::-1]):
        found = functional.integrate_and_fire(
            x, threshold, initial, decay=0.5, reset="zero", scaled=True, returns=returns
        )
        assert all(torch.equal(y, all_three[functional.OUTPUTS.index(n)]) for n, y in zip(returns, found, strict=True))


@pytest.mark.parametrize("shape", ((0, 2, 3, 4, 5), (3, 0, 3, 4, 5), (3, 2, 0, 4, 5), (3, 2, 3, 0, 5), (0, 4), (4, 0)))
def test_nothing_to_do(shape, backend):
    """Without steps the membrane is the initial one; without neurons the results are empty."""
    x, initial = torch.ones(shape), torch.full(shape[1:], 0.25)
    spikes, counts, membrane = run(x, torch.ones(1), initial, 1.0, 1.0, 1.0, True, False)
    assert spikes.shape == shape and torch.equal(membrane, initial) and torch.equal(counts, torch.zeros(shape[1:]))


def test_a_sequence_in_parts(backend):
    """The membrane of one call starts the next, in either format."""
    x, parameters = inputs((9, 2, 16, 4, 8), torch.float32)
    for form in ("contiguous", "channels_last"):
        current = FORMS[form](x)
        options = (parameters["neuron"][0], 0.5, 1.0, 1.0, True, False)
        spikes, counts, membrane = run(current, options[0], None, *options[1:])
        first = run(current[:4], options[0], None, *options[1:])
        second = run(current[4:], options[0], first[2], *options[1:])
        assert torch.equal(torch.cat((first[0], second[0])), spikes)
        assert torch.equal(first[1] + second[1], counts) and torch.equal(second[2], membrane)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_the_count_has_a_closed_form(dtype, backend):
    """r T + u_0 over V, rounded down, within 0 and T: spikes of a constant current, with subtraction."""
    r = torch.arange(-32, 97).div(64).to(dtype)
    for steps, initial in product((1, 4, 8, 31), (0.0, 0.5)):
        [counts] = run(
            r.expand(steps, 1, len(r)), torch.ones(()), torch.tensor(initial), *(1.0, 1.0, 1.0), True, False,
            wanted=(False, True, False),
        )  # fmt: skip
        assert torch.equal(counts[0], (steps * r.float() + initial).floor().clamp(0, steps))


X = torch.ones(2, 3, 4, 5, 6)
ERRORS = {
    "one dimension": (dict(x=torch.ones(3)), r"x: expected 2 dimensions .T, N. or more, got shape \(3\)"),
    "integers": (dict(x=X.int()), "x: expected dtype float32, float64, bfloat16 or float16, got"),
    "a half threshold": (dict(threshold=torch.ones(4).half()), "threshold: expected dtype float32 with x of float32"),
    "a double threshold": (
        dict(x=X.half(), threshold=torch.ones(4).double()),
        "threshold: expected dtype float32 with x of float16, got float64",
    ),
    "a float threshold": (
        dict(x=X.double()),
        "threshold: expected dtype float64 with x of float64, got float32",
    ),
    "thresholds of images": (
        dict(threshold=torch.ones(3, 4, 5, 6)),
        r"threshold: expected one number, one per channel, shape \(4, 5, 6\), got shape \(3, 4, 5, 6\)",
    ),
    "thresholds of other channels": (dict(threshold=torch.ones(3)), r"threshold: expected .*, got shape \(3\)"),
    "thresholds of (T, N)": (
        dict(x=torch.ones(2, 3), threshold=torch.ones(3)),
        r"threshold: expected one number, shape \(\), got shape \(3\)",
    ),
    "a state of other images": (
        dict(initial=torch.ones(2, 4, 5, 6)),
        r"initial: expected one number, one per channel, shape \(4, 5, 6\) or \(3, 4, 5, 6\), got shape \(2, 4, 5, 6\)",
    ),
    "a double state": (dict(initial=torch.ones(4).double()), "initial: expected dtype float32"),
    "no output": (dict(spikes=False), "spikes: expected one output or more, got none"),
    "too many steps": (dict(x=torch.ones(1, 2).expand(2**31, 2)), "x: expected fewer than 2.31 steps, got 2147483648"),
}


@pytest.mark.parametrize("changed, message", ERRORS.values(), ids=ERRORS)
def test_the_operator_refuses(changed, message):
    arguments = dict(x=X, threshold=torch.ones(4), initial=None, decay=1.0, gain=1.0, fire=1.0, subtract=True)
    arguments |= dict(scaled=False, spikes=True, counts=False, membrane=False)
    assert OP(**arguments)[0].shape == X.shape
    with pytest.raises(RuntimeError, match=f"integrate_and_fire: {message}"):
        OP(**arguments | changed)


def test_devices_do_not_mix():
    for changed in (dict(threshold=torch.ones(4, device="meta")), dict(initial=torch.ones(4, device="meta"))):
        arguments = dict(x=X, threshold=torch.ones(4), initial=torch.ones(4)) | changed
        with pytest.raises(RuntimeError, match="integrate_and_fire: .*expected "):
            run(*arguments.values(), 1.0, 1.0, 1.0, True, False)


@pytest.mark.parametrize("form", FORMS)
def test_opcheck(form):
    for shape in ((3, 2, 5, 4, 6), (2, 1, 3, 1, 4)):
        x, parameters = inputs(shape, torch.float32)
        threshold, initial = parameters["columns_first"]
        for wanted in ((True, False, False), (True, True, True)):
            arguments = (FORMS[form](x), threshold, initial, 1.0, 1.0, 1.0, True, False, *wanted)
            assert set(torch.library.opcheck(OP, arguments).values()) == {"SUCCESS"}


def test_opcheck_of_few_dimensions():
    for x in (torch.ones(3, 5), torch.ones(3, 5, 2), torch.ones(5, 3, 2).transpose(0, 1), torch.ones(0, 2, 3, 4)):
        arguments = (x, torch.ones(()), None, 1.0, 1.0, 1.0, True, False, True, True, True)
        assert set(torch.library.opcheck(OP, arguments).values()) == {"SUCCESS"}


def test_compiled():
    """One graph for sizes that change."""

    def neurons(x: torch.Tensor, threshold: torch.Tensor) -> list[torch.Tensor]:
        counts, spikes = functional.integrate_and_fire(x, threshold, reset="zero", returns=("counts", "spikes"))
        return [counts + 1, spikes]

    compiled = torch.compile(neurons, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (2, 3):
        x, threshold = torch.rand(4, n, 3, 5, 5), torch.rand(3)
        assert all(map(torch.equal, compiled(x, threshold), neurons(x, threshold)))


def test_no_gradient():
    x, threshold = torch.rand(3, 2, 4).requires_grad_(), torch.ones(4, requires_grad=True)
    for leaves in ((x, threshold.detach()), (x.detach(), threshold)):
        y = run(*leaves, None, 1.0, 1.0, 1.0, True, False)
        assert all(t.requires_grad for t in y)
        with pytest.raises(RuntimeError, match="no differentiation of its result, .*IntegrateAndFire with a gradient"):
            y[2].sum().backward()
