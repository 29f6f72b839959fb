"""The formats that a day with a GPU reads: nvidia-smi, pytest, compute-sanitizer, Nsight Compute, our CSV files.

The samples follow the tools' documentation; those of our own programs are made by them.
"""

import subprocess
import sys
from pathlib import Path

import pytest
from harness import gpu_day_counters as counters
from harness import gpu_day_parsers as parsers
from harness import report
from harness.gpu_day_kernels import MEASURED, work_of
from harness.gpu_day_summary import number, table


def test_nvidia_smi():
    text = "NVIDIA H200, 580.159.03, 143771, 345, 3201, 1980, 3201, 700.00, 31, 9.0\n"
    found = parsers.nvidia_smi(text)
    assert found["name"] == "NVIDIA H200" and found["clocks.max.sm"] == "1980" and found["compute_cap"] == "9.0"
    for wrong in ("", "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.\n"):
        with pytest.raises(ValueError, match="expected 10 fields"):
            parsers.nvidia_smi(wrong)


PYTEST = """\
.....F..s.                                                               [100%]
=================================== FAILURES ===================================
E   assert 1 == 2
=========================== short test summary info ============================
FAILED tests/gpu/test_conv2d.py::test_cuda_graph[forward-torch.float32] - AssertionError: forward of x - 3 differ
FAILED tests/gpu/test_int8.py::test_the_longest_sum
ERROR tests/gpu/test_int8.py::test_every_option - RuntimeError: CUDA error: an illegal memory access
"""


@pytest.mark.parametrize(
    "end",
    (
        "2 failed, 7 passed, 1 skipped, 3 deselected, 1 warning, 3 errors in 12.34s\n",
        "= 2 failed, 7 passed, 1 skipped, 2 warnings, 3 errors in 12.34s (0:00:12) =\n",
        "!!!!!! KeyboardInterrupt !!!!!!\n2 failed, 7 passed, 1 skipped, 3 errors in 12.34s\n",
    ),
)
def test_pytest(end):
    found = parsers.pytest(PYTEST + end)
    assert [found[kind] for kind in ("passed", "failed", "error", "skipped")] == [7, 2, 3, 1]
    assert found["pytest_seconds"] == 12.34 and found["headline"] == "7 passed, 2 failed, 3 error, 1 skipped"
    assert parsers.pytest("1 passed, 1 error in 0.1s\n")["error"] == 1
    tests = [failure["test"].split("::")[1] for failure in found["failures"]]
    assert tests == ["test_cuda_graph[forward-torch.float32]", "test_the_longest_sum", "test_every_option"]
    assert found["failures"][0]["why"] == "AssertionError: forward of x - 3 differ"


def test_pytest_itself(tmp_path):
    """The installed pytest still prints what is parsed; without a summary there are no counts."""
    (tmp_path / "test_it.py").write_text("def test_good(): pass\ndef test_bad(): assert 0\n")
    command = [sys.executable, "-m", "pytest", "-q", "-rfE", "-p", "no:cacheprovider", "test_it.py"]
    text = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True).stdout
    found = parsers.pytest(text)
    assert (found["passed"], found["failed"]) == (1, 1) and found["failures"][0]["test"] == "test_it.py::test_bad"
    with pytest.raises(ValueError, match="no summary"):
        parsers.pytest("ImportError: no module\n")


MEMCHECK = """\
========= COMPUTE-SANITIZER
========= Invalid __global__ write of size 4 bytes
=========     at void adderops::cuda::forward_kernel<float>(...)+0x1a0
=========     by thread (3,0,0) in block (0,0,0)
=========     Access at 0x7f0000000400 is out of bounds
3 passed in 4.00s
========= Target application returned an error
========= ERROR SUMMARY: 1 error
"""
RACECHECK = """\
========= COMPUTE-SANITIZER
========= Error: Race reported between Write access at adderops::cuda::forward_kernel+0x90
=========     and Read access at adderops::cuda::forward_kernel+0x120 [128 hazards]
=========
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
"""


def test_sanitizer():
    found = parsers.sanitizer(MEMCHECK)
    assert found == {
        "errors": 1,
        "reports": ["Invalid __global__ write of size 4 bytes"],
        "headline": "1 error",
    }
    found = parsers.sanitizer(RACECHECK)
    assert found["errors"] == 1 and found["headline"] == "1 hazard displayed (1 error, 0 warnings)"
    assert found["reports"][0].startswith("Error: Race reported between Write access")
    assert parsers.sanitizer("========= ERROR SUMMARY: 0 errors\n")["errors"] == 0
    clean = "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n"
    assert parsers.sanitizer(clean)["errors"] == 0
    with pytest.raises(ValueError, match="no summary"):
        parsers.sanitizer("========= COMPUTE-SANITIZER\nKilled\n")


NCU = """\
==PROF== Connected to process 4711 (/usr/bin/python3.12)
==PROF== Profiling "forward_kernel": 0%....50%....100% - 9 passes
forward float32
==PROF== Disconnected from process 4711
"ID","Process ID","Process Name","Host Name","Kernel Name","Context","Stream","Block Size","Grid Size","Device","CC",\
"dram__bytes_read.sum","sm__cycles_elapsed.max","smsp__inst_executed.sum","sm__pipe_tensor_cycles_active.avg.pct"
"","","","","","","","","","","","byte","cycle","inst","%"
"0","4711","python3.12","127.0.0.1","_Z3onePf","1","7","(256, 1, 1)","(392, 1, 1)","0","9.0",\
"26,284,032","945932","5.0e+08","n/a"
"1","4711","python3.12","127.0.0.1","_Z3two<a, b>","1","7","(256, 1, 1)","(1, 1, 1)","0","9.0",\
"32","1,250.5","7","12.50"
==PROF== done
"""


def test_ncu():
    one, two = parsers.ncu(NCU)
    assert one == {
        "Kernel Name": "_Z3onePf",
        "dram__bytes_read.sum": 26284032.0,
        "sm__cycles_elapsed.max": 945932.0,
        "smsp__inst_executed.sum": 5e8,
    }
    assert two["Kernel Name"] == "_Z3two<a, b>" and two["sm__cycles_elapsed.max"] == 1250.5
    assert two["sm__pipe_tensor_cycles_active.avg.pct"] == 12.5
    with pytest.raises(ValueError, match="no table"):
        parsers.ncu("==PROF== Connected\n")


def test_ncu_refusals():
    text = "==ERROR== ERR_NVGPUCTRPERM - The user does not have permission to access NVIDIA GPU Performance Counters\n"
    assert "ERR_NVGPUCTRPERM" in parsers.ncu_refusal(text)
    assert parsers.ncu_refusal("==WARNING== No kernels were profiled.\n") == "ncu saw no kernel of adderops"
    assert parsers.ncu_refusal(NCU) is None


def test_counters_beside_predictions():
    unit = counters.UNITS["fp32"]
    main = {"kernel": "forward, 128x128", "unit": "fp32", counters.INSTRUCTIONS: 1000.0, unit: 100.0, counters.L2: 8.0}
    predicted = {"main": main, "never": {"kernel": "other", "unit": "alu", counters.INSTRUCTIONS: 1.0}}
    repair = {"Kernel Name": "main", counters.INSTRUCTIONS: 9.0, counters.L2: 1.0}
    launches = [{"Kernel Name": "main", counters.INSTRUCTIONS: 1100.0, counters.L2: 10.0}, repair]
    rows = counters.compared(predicted, launches)
    assert [(r["quantity"], r["predicted"], r["measured"], r["ratio"]) for r in rows] == [
        ("instructions", 1000.0, 1100.0, 1.1),
        ("fp32 unit, %", 100.0, None, None),  # a counter that the GPU lacks
        ("L2 bytes read", 256.0, 320.0, 1.25),
    ]


def test_the_measured_kernels_are_those_of_the_budgets(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[1] / "machine_code")
    import cuda_budgets as budgets

    labels = [i.label for i in budgets.INSTANCES if not i.architectures or 90 in i.architectures]
    for work in MEASURED:
        assert [label for label in labels if work_of(label) is work], work.label
    assert len({work.label for work in MEASURED}) == len(MEASURED)
    assert set(counters.UNITS) >= set(budgets.UNITS[90])


def test_the_work_of_a_layer():
    work = work_of("forward float32 direct planes")
    assert (work.rows, work.columns, work.depth) == (128, 64 * 28 * 28, 128 * 9)
    assert work.read == 4 * (64 * 128 * 28 * 28 + 128 * 128 * 9)
    assert work_of("forward float32 direct.cuh") is None


def test_layer_means(tmp_path):
    file = tmp_path / "r.csv"
    rows = [{"layer": "a", "pass": "forward"}, {"layer": "a", "pass": "step"}, {"layer": "b", "pass": "memory"}]
    report.write_csv(file, {"dtype": "float32", "mean: forward_over_conv2d": 1.25, "mean: over_conv2d": 2.0}, rows)
    found = parsers.layer_means(file)
    assert found["layers"] == 2 and found["means"] == {"forward_over_conv2d": 1.25, "over_conv2d": 2.0}
    assert found["headline"] == "2 layers, forward_over_conv2d 1.25, over_conv2d 2.00"


def test_training_steps(tmp_path):
    file = tmp_path / "r.csv"
    seconds = {"cnn": 0.001, "plain": 0.002, "pkkd": 0.0036}
    rows = [
        {"network": "resnet20", "contestant": who, "memory_format": "contiguous", "seconds": s}
        for who, s in seconds.items()
    ]
    report.write_csv(file, {}, rows)
    found = parsers.bench_distill(file)
    assert found["milliseconds"]["resnet20 pkkd contiguous"] == pytest.approx(3.6)
    assert found["headline"] == "pkkd / (plain + cnn): resnet20 contiguous: 1.20"


def test_page():
    assert [number(v) for v in (None, 0.12345, 12.345, 1234.5, 4.99e8)] == ["-", "0.123", "12.3", "1,234", "4.99e+08"]
    assert table(("a", "b"), [(1, "x|y")]) == "| a | b |\n| --- | --- |\n| 1 | x\\|y |"
