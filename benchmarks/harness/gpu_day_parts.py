"""The parts of a day with a GPU, in order of what matters most, and the commands behind them.

In a dry run the same programs run without a GPU, with less to do.
"""

import json
import os
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

from harness import gpu_day_parsers as parsers
from harness import report
from harness.gpu_day_runner import Day, Part, Skip, python

# Each kernel once, on shapes that are ragged against its tiles.
FEW = "every_geometry and (K27 or batch5-s2 or groups4 or depthwise17x2 or resnet20-16 or bands-images)"
DISTILL = "moments and (float64 or mean_abs or match)"
NEURONS = "fire and float16"
SANITIZED = f"({FEW}) or (other_dtypes and bfloat16) or test_quantize or ({DISTILL}) or ({NEURONS})"
REHEARSED = f"(every_geometry and (K27 or batch5-s2)) or (moments and (view or mean_abs or match)) or ({NEURONS})"
REHEARSED_REST = "every_geometry and (K27 or batch7-s2 or depth193)"

LAYERS = ",".join(
    (
        *("resnet20/16-16.*", "resnet20/32-32.*", "resnet20/64-64.*", "resnet18/64-64.*", "resnet18/256-256.*"),
        *("resnet18/512-512.*", "resnet50/256-64.1x1@56", "resnet50/128-128.3x3s2@56", "resnet50/1024-256.1x1@14"),
    )
)


def _last_json(text: str) -> dict[str, Any]:
    return json.loads(next(line for line in reversed(text.splitlines()) if line.startswith("{")))


# --- environment and build ---


def _environment(day: Day, seconds: float) -> list[str]:
    return python("-m", "harness.gpu_day_environment", *(["--dry-run"] if day.dry_run else []))


def _read_environment(day: Day, text: str) -> dict[str, Any]:
    facts = _last_json(text)
    gpu = facts["gpu"]
    facts["headline"] = f"{gpu['name']}, {gpu['capability']}, torch {facts['torch']}"
    return facts


def _gpu(day: Day) -> dict[str, Any]:
    return day.figures("environment")["gpu"]


def _build(day: Day, seconds: float) -> list[str]:
    return python("-m", "harness.gpu_day_build", _gpu(day)["capability"], *(["--dry-run"] if day.dry_run else []))


def _last_line(day: Day, text: str) -> dict[str, Any]:
    return {"headline": text.strip().splitlines()[-1]}


# --- correctness ---


def _pytest(day: Day, *selection: str) -> list[str]:
    options = ["-m", "pytest", "tests/gpu", "-q", "-rfE", "--tb=short", "--color=no", "-p", "no:cacheprovider"]
    options += ["--continue-on-collection-errors"]
    return python(*options, *(["-p", "harness.gpu_day_rehearsal"] if day.dry_run else []), *selection)


def _tests(marker: str, workers: int, rehearsed: str) -> Callable[[Day, float], list[str]]:
    def command(day: Day, seconds: float) -> list[str]:
        several = min(workers, (os.cpu_count() or 1) // 2)
        if day.dry_run:
            return _pytest(day, "-m", "slow or not slow", "-k", rehearsed)
        # most of the time goes into the references in float64 on the CPU
        return _pytest(day, "-m", marker, *(["-n", str(several)] if several > 1 and find_spec("xdist") else []))

    return command


def _read_tests(day: Day, text: str) -> dict[str, Any]:
    return parsers.pytest(text)


def _sanitizer(tool: str) -> Part:
    def command(day: Day, seconds: float) -> list[str]:
        options = ["--tool", tool, "--error-exitcode", "86", "--kernel-regex", "kns=adderops", "--print-limit", "50"]
        tests = _pytest(day, "-m", "not slow", "-k", REHEARSED_REST if day.dry_run else SANITIZED)
        return ["compute-sanitizer", *options, *tests]

    def read(day: Day, text: str) -> dict[str, Any]:
        for sign in ("Device not supported", "Unable to find injection library"):
            if sign in text:
                raise Skip(f"compute-sanitizer: {sign}")
        return parsers.pytest(text) | parsers.sanitizer(text)

    return Part(
        tool, 25, command, read, ("build",), ("compute-sanitizer",), (), (("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),)
    )


# --- benchmarks ---


def _bench_adder(dtype: str, share: int) -> Part:
    name = f"adder-{dtype}"

    def command(day: Day, seconds: float) -> list[str]:
        script, file = ["benchmarks/bench_adder.py"], ["--csv", day.file(f"{name}.csv")]
        if day.dry_run:  # F.conv2d has 16-bit floats on a GPU only
            options = ["--batch", 1, "--seconds", 0.5, "--threads", 1, "--layers", "resnet20/64-64.*"]
            options += [] if dtype == "float32" else ["--passes", "forward"]
            return python(*script, *options, *file)
        options = ["--device", "cuda", "--dtype", dtype, "--layers", LAYERS, "--seconds", seconds / 2]
        return python(*script, *options, *file)

    return Part(name, share, command, lambda day, _: parsers.layer_means(day.file(f"{name}.csv")), ("build",))


def _bench_int8(day: Day, seconds: float) -> list[str]:
    device = ["--threads", 1, "--batch", 2, "--layers", "resnet20/64-64.*"] if day.dry_run else ["--device", "cuda"]
    options = ["--seconds", 0.5 if day.dry_run else seconds / 2, "--csv", day.file("int8.csv")]
    return python("benchmarks/bench_int8.py", *device, *options)


def _bench_distill(name: str, *extra: str) -> Part:
    def command(day: Day, seconds: float) -> list[str]:
        rehearsed = ["--threads", 1, "--networks", "lenet5", "--batch", 2, "--seconds", 0.5]
        real = ["--device", "cuda", "--networks", "resnet20", "--seconds", seconds / 2]
        options = [*(rehearsed if day.dry_run else [*real, *extra]), "--csv", day.file(f"{name}.csv")]
        return python("benchmarks/bench_distill.py", *options)

    return Part(
        name,
        30,
        command,
        lambda day, _: parsers.bench_distill(day.file(f"{name}.csv")),
        ("build",),
        modules=("torchvision",),
    )


def _epoch(day: Day, seconds: float) -> list[str]:
    rehearsed = ["--device", "cpu", "--images", 64, "--batch-size", 32, "--arch", "lenet5"]
    return python("-m", "harness.gpu_day_epoch", day.output, *(rehearsed if day.dry_run else []))


def _read_epoch(day: Day, text: str) -> dict[str, Any]:
    figures = _last_json(text)
    _, (row,) = report.read_csv(day.file("pkkd") / "log.csv")
    figures |= {name: row[name] for name in ("images_per_second", "student_test_accuracy", "teacher_test_accuracy")}
    rate, accuracy = figures["images_per_second"], 100 * figures["student_test_accuracy"]
    figures["headline"] = f"{figures['data']}: {rate:.0f} images/s, student {accuracy:.1f} % after one epoch"
    return figures


# --- counters ---


def _counters(day: Day, seconds: float) -> list[str]:
    gpu = _gpu(day)
    options = [day.output, "--capability", gpu["capability"], "--multiprocessors", gpu["multiprocessors"]]
    if day.dry_run:
        options += ["--device", "cpu", "--kernel", "forward float32 direct planes"]
    return python("-m", "harness.gpu_day_counters", *options)


def _read_counters(day: Day, text: str) -> dict[str, Any]:
    figures = _last_json(text)
    if figures["refusal"]:
        raise Skip(f"Nsight Compute: {figures['refusal']}")
    kernels = len({row["kernel"] for row in figures["rows"]})
    missing = f", no predictions: {figures['no_predictions']}" if figures["no_predictions"] else ""
    figures["headline"] = f"{len(figures['launches'])} launches, {kernels} kernels beside their predictions{missing}"
    return figures


PARTS = (
    Part("environment", 20, _environment, _read_environment),
    Part("build", 110, _build, _last_line, ("environment",)),
    Part("correctness", 70, _tests("not slow", 8, REHEARSED), _read_tests, ("build",), modules=("pytest",)),
    Part("correctness-rest", 60, _tests("slow", 4, REHEARSED_REST), _read_tests, ("build",), modules=("pytest",)),
    *(_sanitizer(tool) for tool in ("memcheck", "racecheck", "synccheck")),
    _bench_adder("float32", 50),
    _bench_adder("float16", 25),
    _bench_adder("bfloat16", 20),
    Part(
        "int8",
        25,
        _bench_int8,
        lambda day, _: parsers.layer_means(day.file("int8.csv")),
        ("build",),
        modules=("safetensors",),
    ),
    _bench_distill("distill"),
    _bench_distill("distill-graph", "--cuda-graph"),
    Part("epoch", 25, _epoch, _read_epoch, ("build",), modules=("torchvision",)),
    Part("counters", 50, _counters, _read_counters, ("build",), ("ncu",)),
)
