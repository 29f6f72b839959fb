"""benchmarks/gpu_day.py keeps its time and its results, whatever a part does; a whole dry run comes to its page."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import gpu_day
import pytest
from harness import gpu_day_parts, gpu_day_runner, gpu_day_summary
from harness.gpu_day_parts import PARTS
from harness.gpu_day_runner import (
    FAILED,
    OUT_OF_TIME,
    PASSED,
    ROOT,
    SKIPPED,
    Day,
    Part,
    Skip,
    pending,
    python,
    run_all,
    shares,
)

SCRIPT = Path(gpu_day.__file__)


@pytest.fixture
def day(tmp_path, monkeypatch):
    """A folder for results; parts of seconds have their shares."""
    monkeypatch.setattr(gpu_day_runner, "FLOOR", 0.0)
    monkeypatch.setattr(gpu_day_runner, "LEAST", 0.5)
    return Day(tmp_path)


def part(name: str, code: str = "", read=lambda day, text: {"headline": text.split()[-1]}, share=1, **more) -> Part:
    return Part(name, share, lambda day, seconds: python("-S", "-c", code), read, **more)


def states(day: Day, *parts: Part, seconds: float = 30) -> dict[str, str]:
    run_all(day, parts, seconds, lambda: None)
    return {p.name: (day.result(p.name) or {}).get("status") for p in parts}


def test_a_failure_stops_only_what_needs_it(day):
    parts = (
        part("good", "print('fine')"),
        part("bad", "raise SystemExit('broken')"),
        part("after", "print('still here')", needs=("good",)),
        part("on-top", needs=("bad",)),
        part("unread", "print('?')", read=lambda *_: json.loads("?")),
        part("without-tool", tools=("no-such-tool",)),
        part("without-module", modules=("no_such_module",)),
        part("absent", read=lambda day, text: (_ for _ in ()).throw(Skip("nothing there"))),
    )
    assert list(states(day, *parts).values()) == [PASSED, FAILED, PASSED, SKIPPED, FAILED, *[SKIPPED] * 3]
    headlines = {p.name: day.result(p.name)["headline"] for p in parts}
    assert (headlines["good"], headlines["bad"], headlines["absent"]) == ("fine", "broken", "nothing there")
    assert headlines["on-top"] == "needs bad, which has not passed (failed)"
    assert "no-such-tool" in headlines["without-tool"] and "no_such_module" in headlines["without-module"]
    assert "not understood" in headlines["unread"]
    assert "broken" in day.file("bad.log").read_text()
    page = gpu_day_summary.page(day, parts)
    assert "| good | passed |" in page and "| bad | **failed** |" in page and "- bad: broken" in page


def alive(process: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{process}/status").read_text()  # not a zombie
    except OSError:
        return False


def processes_of(folder: Path) -> list[int]:
    """Those whose PATH has the stand-ins of a dry run in this folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            environ = (process / "environ").read_text(errors="replace")
        except OSError:  # gone, or another user's
            continue
        if f"{folder}/rehearsal" in environ and alive(int(process.name)):
            found.append(int(process.name))
    return found


STUBBORN = """
import signal, subprocess, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)"], start_new_session=False)
print(child.pid, flush=True)
time.sleep(60)
"""
POLITE = """
import time
try:
    print('half', flush=True); time.sleep(60)
except KeyboardInterrupt:
    print('so far')
"""


def test_out_of_time(day):
    """A part is interrupted, then killed with its children; the rest still run, and the whole ends in time.

    A loaded machine takes seconds to start a process. What a shell starts with & ignores interrupts; its parts do not.
    """
    start, before = time.monotonic(), signal.signal(signal.SIGINT, signal.SIG_IGN)
    parts = (part("stubborn", STUBBORN), part("polite", POLITE), part("last", "print('done')"))
    try:
        found = states(day, *parts, seconds=21)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
    assert found == {"stubborn": OUT_OF_TIME, "polite": OUT_OF_TIME, "last": PASSED}
    assert time.monotonic() - start < 22
    assert day.result("polite")["headline"] == "far"
    child = next(int(line) for line in day.file("stubborn.log").read_text().splitlines() if line.isdigit())
    assert not alive(child)


def test_what_is_not_reached_has_no_result(day):
    assert states(day, part("first", "print(1)"), part("second"), seconds=0.4) == {"first": None, "second": None}
    assert "| second | not reached |" in gpu_day_summary.page(day, [part("second")])


def test_shares(day):
    parts = [part("a", share=30), part("b", share=60), part("c", share=10)]
    assert shares(parts, 200) == (60, 90)
    assert shares(parts[2:], 7) == (7, 7)  # never more than is left


def test_a_part_has_time_to_begin():
    parts = [part("a", share=1), part("b", share=99)]
    assert shares(parts, 100) == (1, 20) and shares(parts, 10) == (0.1, 10)


def test_a_second_run_takes_up_what_is_missing(day):
    parts = [part("good", "print(1)"), part("bad", "raise SystemExit('no')"), part("skipped", tools=("no-such-tool",))]
    parts += [part("late", POLITE), part("never")]
    run_all(day, parts[:4], 3, lambda: None)
    assert [p.name for p in pending(day, parts)] == ["skipped", "late", "never"]
    assert [p.name for p in pending(day, parts, ["bad", "good"])] == ["good", "bad"]
    day.file("good.json").write_text('{"status": "pas')  # a torn file is no result
    assert pending(day, parts)[0].name == "good"


def test_old_files_are_not_read_again(day):
    day.file("part.csv").write_text("of an earlier run")
    states(day, part("part", "print(1)", read=lambda day, _: {"headline": str(day.file("part.csv").exists())}))
    assert day.result("part")["headline"] == "False"


def test_the_order_is_that_of_what_matters_most():
    names = [p.name for p in PARTS]
    assert len(set(names)) == len(names) and sum(p.share for p in PARTS) <= 600
    wanted = "environment build correctness correctness-rest memcheck adder-float32 int8 distill epoch counters".split()
    assert sorted(wanted, key=names.index) == wanted
    for p in PARTS:
        assert set(p.needs) <= set(names[: names.index(p.name)]), p.name


def test_every_command_can_be_made(day):
    """On the day, not in a dry run: with the environment's facts of one."""
    facts = {"gpu": {"capability": "9.0", "multiprocessors": 132}}
    day.file("environment.json").write_text(json.dumps({"status": PASSED, "figures": facts}))
    for p in PARTS:
        command = [str(word) for word in p.command(day, 30.0)]
        assert command[0] in (sys.executable, "compute-sanitizer"), p.name
        if p.name not in ("environment", "build"):
            assert "--dry-run" not in command and "rehearsal" not in " ".join(command), p.name
    assert not (day.output / "rehearsal").exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--parts", "bild"], "--parts: expected some of environment, build"),
        (["--minutes", "0"], "--minutes: expected a positive number, got 0"),
        ([], "--output"),
    ],
)
def test_wrong_arguments(arguments, message, tmp_path, capsys):
    if arguments:
        arguments = [*arguments, "--output", str(tmp_path)]
    with pytest.raises(SystemExit):
        gpu_day.main(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_without_a_gpu_the_reason_is_on_the_page(tmp_path):
    run = subprocess.run(
        [sys.executable, SCRIPT, "--output", tmp_path, "--minutes", "2"],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    page = (tmp_path / "summary.md").read_text()
    assert "| environment | **failed** |" in page and "no GPU: torch.cuda.is_available() is False" in page
    assert "| build | **skipped** |" in page and "needs environment" in page


def test_a_terminated_day_leaves_no_process(tmp_path):
    day = subprocess.Popen(
        [sys.executable, SCRIPT, "--dry-run", "--output", tmp_path, "--parts", "environment"], stdout=subprocess.PIPE
    )
    while not processes_of(tmp_path) and day.poll() is None:
        time.sleep(0.05)
    day.send_signal(signal.SIGTERM)
    assert day.wait(20) != 0
    assert not processes_of(tmp_path)
    assert not (tmp_path / "environment.json").exists()


@pytest.mark.slow
def test_what_the_sanitizers_run():
    """On the day: every kernel, and not many tests."""
    options = ["-p", "harness.gpu_day_rehearsal", "-p", "no:cacheprovider", "--collect-only", "-q", "-m", "not slow"]
    command = [sys.executable, "-m", "pytest", "tests/gpu", *options, "-k", gpu_day_parts.SANITIZED]
    run = subprocess.run(command, cwd=ROOT, env=Day(ROOT).environ, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    tests = [line for line in run.stdout.splitlines() if "::" in line]
    for wanted in (
        *(f"test_conv2d_exact_every_geometry_in_both_formats[K27-{name}]" for name in ("forward", "grad_x", "grad_w")),
        *("test_int8.py::test_every_geometry[groups4]", "test_quantize[", "exact_other_dtypes[forward-torch.bfloat16]"),
        *("test_moments.py::test_against_float64[channels_last", "test_moments.py::test_match_rows"),
        "test_integrate_and_fire.py::test_against_float64[torch.float16]",
    ):
        assert any(wanted in test for test in tests), wanted
    assert len(tests) < 160


@pytest.mark.slow
def test_dry_run(tmp_path):
    """Every part passes, with the CUDA kernels on the host; the page has their figures."""
    from simt import builder

    if not builder.compiler():
        pytest.skip("no C++ compiler: set CXX, or install g++")
    for package in ("torchvision", "safetensors"):
        pytest.importorskip(package)
    command = [sys.executable, SCRIPT, "--dry-run", "--output", tmp_path, "--minutes", "20"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    results = {p.name: json.loads((tmp_path / f"{p.name}.json").read_text()) for p in PARTS}
    assert {name: r["status"] for name, r in results.items() if r["status"] != PASSED} == {}, run.stdout
    page = (tmp_path / "summary.md").read_text()
    assert "no figure here is a measurement" in page
    for name in ("correctness", "correctness-rest", "memcheck"):
        assert results[name]["figures"]["passed"] >= 10 and results[name]["figures"]["failed"] == 0
        launches = (tmp_path / f"{name}.log").read_text().partition("executed on the host: ")[2].split()[0]
        assert int(launches) >= 100
    for wanted in ("forward_over_conv2d", "over_conv2d", "lenet5 pkkd channels_last"):
        assert wanted in page, wanted
    counters = results["counters"]["figures"]
    if not counters["no_predictions"]:  # no NVRTC, or no nvdisasm
        ratios = [row["ratio"] for row in counters["rows"]]
        assert ratios and ratios == pytest.approx([1.25] * len(ratios), rel=1e-3)
        assert "| forward float32 direct planes, 128x128 | cycles |" in page
