"""The host executor on small kernels: a correct one, and each deliberate bug with what must detect it."""

import ctypes
import re
from functools import cache

import numpy as np
import pytest
import torch

from simt import builder
from simt.builder import ORDERS

pytestmark = pytest.mark.skipif(not builder.compiler(), reason="no C++ compiler: set CXX, or install g++")

KERNELS = (builder.HERE / "trial_kernels.cpp",)
THREADS, ROUNDS, BLOCKS, PADDING = 64, 4, 3, 1024

# In the order of trial_kernels.cpp.  Bug: (what ends the launch in every build and order, what the race checker finds).
DIVERGENCE = "barrier divergence: "
BUGS = {
    "None": (None, None),
    "NoBarrierBeforeRead": (None, "race on shared s_turned"),
    "NoBarrierBeforeWrite": (None, "race on shared s_turned"),
    "NoWait": ("returned before 4 asynchronous copies", "unfinished cp.async on shared s_in"),
    "WaitForTooFew": ("returned before 1 asynchronous copies", "unfinished cp.async on shared s_in"),
    "SharedRowTooFar": (None, "out of bounds on shared s_turned, byte \\d+ of 256"),
    "GlobalRowTooFar": (None, "out of bounds on global y, byte \\d+ of 3072"),
    "GlobalReadBefore": (None, "out of bounds on global x, byte -4 of 3072"),
    "DifferentBarriers": (DIVERGENCE + "thread 0 waits in __syncthreads at tests/simt/trial_kernels.cpp:", None),
    "BarrierAfterReturn": (DIVERGENCE, None),
    "Deadlock": ("deadlock: for ever wait thread 0 in __syncthreads", None),
    "OtherBlocksRow": (None, "race on global y"),
    "Uninitialised": (None, "uninitialised read on shared s_share"),
    "LaneReturned": (None, None),  # the launch ends, by whichever lane is first
    "LaneNotInMask": ("has no bit for the lane that calls it", None),
    "NoWarpBarrier": (None, "race on shared s_turned"),
    "WriteToInput": (None, "write to an input on global x"),
    "NeverWaited": ("returned before 1 asynchronous copies", None),
    "Misaligned": (None, None),  # crashes, but for the race checker
    "Wild": (None, None),  # likewise
    "TooMuchShared": ("bytes of shared memory with s_more, more than 49152", None),
    "ReadWhileCopying": (None, "unfinished cp.async on shared s_in"),
    "CopyFromAnywhere": ("cp_async_4: from outside every array", None),
}
# What no value shows in any order: the race checker alone sees these.
SILENT = {"OtherBlocksRow", "WriteToInput", "Misaligned", "GlobalReadBefore", "GlobalRowTooFar"}


@cache
def library(variant: str) -> builder.Library:
    loaded = builder.Library(builder.build(variant, KERNELS))
    pointer, number = ctypes.c_void_p, ctypes.c_int
    for name, arguments in {
        "trial_run": (number, number, pointer, pointer, pointer),
        "trial_barriers": (number, number, number, pointer),
        "trial_order": (number, number, pointer, pointer, pointer),
        "trial_readers": (pointer,),
        "trial_mma": (number, number, pointer, pointer, pointer),
        "trial_minimum": (number, number, pointer, pointer, pointer),
        "trial_collectives": (number, pointer),
    }.items():
        function = getattr(loaded.c, name)
        function.argtypes, function.restype = arguments, ctypes.c_char_p
    loaded.c.trial_saturated_difference.argtypes = (ctypes.c_float, ctypes.c_float)
    loaded.c.trial_saturated_difference.restype = ctypes.c_float
    return loaded


def padded(values: np.ndarray) -> np.ndarray:
    return np.pad(values, PADDING, constant_values=np.nan)[PADDING:-PADDING]


def trial(variant: str, bug: str, order: str, seed: int = 1, poison: int = 0xFF):
    """Runs the trial kernel: (its error, the findings, whether the values are right, the values)."""
    lib = library(variant)
    lib.configure(order, seed, poison)
    x = padded(np.random.default_rng(0).integers(-99, 99, BLOCKS * ROUNDS * THREADS).astype(np.float32))
    y, sums = padded(np.full_like(x, np.nan)), padded(np.full(BLOCKS, np.nan, np.float32))
    before = x.copy()
    for name, array in (("x", x), ("y", y), ("sums", sums)):
        lib.c.simt_watch(name.encode(), array.ctypes.data, array.nbytes, name != "x", name == "x", None)
    error = lib.c.trial_run(list(BUGS).index(bug), BLOCKS, x.ctypes.data, y.ctypes.data, sums.ctypes.data)
    lib.c.simt_forget()
    reversed_rows = before.reshape(-1, THREADS)[:, ::-1].ravel()
    right = np.array_equal(y, reversed_rows) and np.array_equal(sums, before.reshape(BLOCKS, -1).sum(1))
    return lib.with_places(error.decode()) if error else None, lib.findings(), right, np.concatenate([y, sums])


def test_the_bugs_are_those_of_the_kernel():
    assert library("plain").c.trial_bugs() == len(BUGS) - 1


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("variant", ("plain", "race"))
def test_a_right_kernel(variant, order):
    """Exact sums, so every order gives the same bits; and not one false alarm."""
    for seed in range(3):
        error, findings, right, _ = trial(variant, "None", order, seed)
        assert (error, findings) == (None, [])
        assert right


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("variant", ("plain", "race"))
@pytest.mark.parametrize("bug", [bug for bug, (ends, _) in BUGS.items() if ends])
def test_the_executor_ends_the_launch(bug, variant, order):
    error = trial(variant, bug, order)[0]
    assert error
    assert error.startswith("trial_kernel<B>: block (") and "deadlock" in BUGS[bug][0] or BUGS[bug][0] in error


@pytest.mark.parametrize("order", ORDERS)
def test_a_lane_that_has_returned(order):
    assert "returned" in trial("plain", "LaneReturned", order)[0]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("bug", [bug for bug, (_, finding) in BUGS.items() if finding])
def test_the_race_checker_finds(bug, order):
    """In every order, with the place in the source, and it names the same array each time."""
    findings = trial("race", bug, order)[1]
    assert any(re.match(BUGS[bug][1], f) for f in findings), findings
    assert all("tests/simt/trial_kernels.cpp:" in f for f in findings), findings


@pytest.mark.parametrize("bug", [b for b, (ends, finding) in BUGS.items() if finding and not ends and b not in SILENT])
def test_wrong_values_without_the_checker(bug):
    """Poison and three orders show most of the races as wrong values, each in one order at least."""
    assert not all(trial("plain", bug, order)[2] for order in ORDERS)


@pytest.mark.parametrize(("bug", "message"), (("Misaligned", "is not aligned"), ("Wild", "outside every array")))
def test_what_would_crash_is_an_error(bug, message):
    error = trial("race", bug, "forward")[0]
    assert error and message in error and "tests/simt/trial_kernels.cpp:" in error, error


def test_a_seed_gives_its_order_again():
    runs = [trial("plain", "NoBarrierBeforeRead", "random", seed)[3] for seed in (1, 2, 3, 1, 2, 3)]
    assert all(np.array_equal(a, b, equal_nan=True) for a, b in zip(runs[:3], runs[3:], strict=True))
    assert not np.array_equal(runs[0], runs[1], equal_nan=True)


def test_poison_is_what_was_asked_for():
    nans = trial("plain", "NoBarrierBeforeRead", "forward")[3]
    numbers = trial("plain", "NoBarrierBeforeRead", "forward", poison=0x4B)[3]
    assert np.isnan(nans).any() and not np.isnan(numbers).any()
    assert np.array(0x4B4B4B4B, np.uint32).view(np.float32) in numbers


def test_orders_and_fresh_shared_memory():
    """Threads and blocks run as asked; every block finds poison where the one before left a number."""
    lib, runs = library("plain"), {}
    for order, seed in (("forward", 1), ("reverse", 1), ("random", 1), ("random", 2)):
        lib.configure(order, seed, poison=0x5A)
        counter, ran, fresh = np.zeros(1, np.int32), np.full(96, -1, np.int32), np.zeros(3, np.uint32)
        assert lib.c.trial_order(3, 32, counter.ctypes.data, ran.ctypes.data, fresh.ctypes.data) is None
        assert fresh.tolist() == [0x5A5A5A5A] * 3
        runs[order, seed] = ran.tolist()
    everyone = list(range(96))
    assert runs["forward", 1] == everyone and runs["reverse", 1] == everyone[::-1]
    assert runs["random", 1] != runs["random", 2]
    for seed in (1, 2):
        run = runs["random", seed]
        assert sorted(run) == everyone and run not in (everyone, everyone[::-1])
        assert len({n // 32 for n in run[:32]}) == 1, "one block at a time"


@pytest.mark.parametrize("order", ORDERS)
def test_the_race_checker_remembers_readers_of_other_warps(order):
    """Two later readers of the writer's own warp do not hide one of another warp."""
    lib, out = library("race"), np.zeros(64, np.float32)
    lib.configure(order)
    lib.c.simt_watch(b"out", out.ctypes.data, out.nbytes, 1, 0, None)
    assert lib.c.trial_readers(out.ctypes.data) is None
    lib.c.simt_forget()
    findings = lib.findings()
    assert any(re.match("race on shared s_value.* thread 32 ", f) for f in findings), findings


def test_limits_of_a_launch():
    run = library("plain").c.trial_barriers
    assert run(2, 1024, 1, None) is None
    assert b"expected 1 to 1024 threads" in run(2, 1025, 1, None)
    assert b"expected 1 to 1024 threads" in run(2, 0, 1, None)
    assert b"blocks" in run(0, 32, 1, None)


def test_votes_and_statistics():
    lib = library("plain")
    for order in ORDERS:
        lib.configure(order)
        before, votes = lib.statistics(), np.full(5, -1, np.int32)
        assert lib.c.trial_barriers(5, 96, 10, votes.ctypes.data) is None
        # threadIdx.x + i == 7 holds for one thread in each of the rounds 0 to 7
        assert votes.tolist() == [8] * 5
        counts = {name: value - before[name] for name, value in lib.statistics().items()}
        assert counts == {"launches": 1, "blocks": 5, "barriers": 50, "collectives": 0}


@pytest.mark.parametrize("order", ORDERS)
def test_shuffles_and_ballots(order):
    lib, out = library("plain"), np.full((64, 6), -7, np.int32)
    lib.configure(order)
    assert lib.c.trial_collectives(64, out.ctypes.data) is None
    t = np.arange(64)
    lane, base = t % 32, t // 32 * 32
    assert np.array_equal(out[:, 0], 10 * (base + (lane ^ 5)))
    assert np.array_equal(out[:, 1], 10 * np.where(lane + 3 < 32, t + 3, t))
    assert np.array_equal(out[:, 2], 10 * np.where(lane % 8 + 3 < 8, t + 3, t))
    ballots = [sum(1 << i for i in range(32) if (first + i) % 3 == 0) for first in (0, 32)]
    assert np.array_equal(out[:, 3].view(np.uint32), np.repeat(ballots, 32))
    assert np.array_equal(out[:, 4], 3 * (t ^ 1))
    assert np.array_equal(out[:, 5], np.where(lane < 8, base + (lane ^ 7), -1))
    assert b"names lane 8, which the block does not have" in lib.c.trial_collectives(8, out.ctypes.data)


def random_halves(dtype: torch.dtype, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Every kind of number, a NaN or infinity among twenty; most of ordinary size."""
    generator = torch.Generator().manual_seed(seed)
    ordinary = torch.randn(shape, generator=generator).to(dtype)
    patterns = torch.randint(-(2**15), 2**15, shape, generator=generator, dtype=torch.int16).view(dtype)
    special = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan"), 2.0**-24, 2.0**-133], dtype=dtype)
    specials = special[torch.randint(0, len(special), shape, generator=generator)]
    kind = torch.rand(shape, generator=generator)
    return torch.where(kind < 0.9, ordinary, torch.where(kind < 0.95, patterns, specials))


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
def test_minimum2_of_every_pattern(dtype):
    """numpy.fmin is IEEE's minNum: a NaN gives the other operand. -0 is less than 0."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    a = torch.cat([every, every, every, random_halves(dtype, (2**16,), 1)])
    b = torch.cat([every.flip(0), every.roll(1), random_halves(dtype, (2**17,), 2)])
    out = torch.empty_like(a)
    arguments = (int(dtype == torch.bfloat16), len(a) // 2, a.data_ptr(), b.data_ptr(), out.data_ptr())
    assert library("plain").c.trial_minimum(*arguments) is None
    x, y = a.float().numpy(), b.float().numpy()
    want = np.fmin(x, y)
    zeros = (x == 0) & (y == 0)
    want[zeros] = np.where(np.signbit(x) | np.signbit(y), np.float32(-0.0), np.float32(0))[zeros]
    got = out.float().numpy()
    assert np.array_equal(got, want, equal_nan=True)
    numbers = ~np.isnan(want)
    assert np.array_equal(np.signbit(got)[numbers], np.signbit(want)[numbers])
    assert np.isnan(want).any() and numbers.any() and zeros.any()
    both = np.isnan(x) & np.isnan(y)
    assert (out.view(torch.int16).numpy()[both] == 0x7FFF).all()


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
def test_mma(dtype):
    """Within the rounding of sixteen float32 additions; NaNs and infinities where the products have them."""
    count = 200
    a, b = random_halves(dtype, (count, 16, 16), 3), random_halves(dtype, (count, 16, 8), 4)
    a[: count // 2], b[: count // 2] = torch.randn(count // 2, 16, 16), torch.randn(count // 2, 16, 8)
    c = torch.randn(count, 16, 8)
    got = c.clone()
    arguments = (int(dtype == torch.bfloat16), count, a.data_ptr(), b.data_ptr(), got.data_ptr())
    assert library("plain").c.trial_mma(*arguments) is None
    a, b = a.double(), b.double()
    want = (c.double() + a @ b).numpy()
    terms = (c.double().abs() + a.nan_to_num(0, 0, 0).abs() @ b.nan_to_num(0, 0, 0).abs()).numpy()
    within = terms < 1e38  # float32 does not overflow on the way
    finite = np.isfinite(want) & within
    assert (np.abs(got.numpy()[finite] - want[finite]) <= 17 * 2.0**-24 * terms[finite]).all()
    assert np.array_equal(got.numpy()[within & ~finite], want[within & ~finite], equal_nan=True)
    assert finite.sum() > 64 * count and np.isnan(want[within]).any() and np.isinf(want[within]).any()


def test_mma_is_exact_on_small_integers_and_takes_subnormals():
    a, b = torch.randint(-8, 9, (50, 16, 16)).half(), torch.randint(-8, 9, (50, 16, 8)).half()
    a[0] = 0
    a[0, :, 3] = 2.0**-24
    c = torch.zeros(50, 16, 8)
    assert library("race").c.trial_mma(0, 50, a.data_ptr(), b.data_ptr(), c.data_ptr()) is not None  # not watched
    assert library("plain").c.trial_mma(0, 50, a.data_ptr(), b.data_ptr(), c.data_ptr()) is None
    assert torch.equal(c.double(), torch.matmul(a.double(), b.double()))


def test_saturated_difference():
    f = library("plain").c.trial_saturated_difference
    inf, nan = float("inf"), float("nan")
    for a, b, want in (
        *((0.75, 0.5, 0.25), (0.5, 0.75, 0), (3, 1, 1), (inf, 1, 1), (-inf, 1, 0), (1, -inf, 1)),
        *((nan, 1, 0), (1, nan, 0), (inf, inf, 0)),
    ):
        assert f(a, b) == want


SANITIZED = """
import ctypes, sys
from simt import builder
library = builder.Library(sys.argv[1])
floats = [(ctypes.c_float * (count + 2048))() for count in (768, 768, 3)]
inside = [ctypes.addressof(array) + 4096 for array in floats]
for place, count in zip(inside, (768, 768, 3)):
    library.c.simt_watch(b"", place, 4 * count, 1, 1, None)
library.c.trial_run.restype = ctypes.c_char_p
print(library.c.trial_run(int(sys.argv[2]), 3, *map(ctypes.c_void_p, inside)))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("bug", "report"),
    (
        ("None", None),
        ("SharedRowTooFar", "index 64 out of bounds for type 'float [64]'"),
        ("GlobalRowTooFar", "AddressSanitizer: use-after-poison"),
        ("Misaligned", "which requires 16 byte alignment"),
    ),
)
def test_sanitizers(bug, report):
    """Barriers, cp.async and shuffles run under AddressSanitizer; the reports have the place in the kernel."""
    path = builder.build("asan", KERNELS)
    process = builder.sanitized_python(SANITIZED, str(path), str(list(BUGS).index(bug)))
    if report is None:
        assert (process.stdout, process.returncode) == ("None\n", 0), process.stderr
    else:
        assert process.returncode and report in process.stderr, process.stderr
        assert "trial_kernels.cpp:" in process.stderr
