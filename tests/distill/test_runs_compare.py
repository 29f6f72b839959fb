"""`compare`: its tables by hand, and which options it shows."""

import csv
import shutil

import pytest

from adderops.distill import Options, main
from adderops.distill.checkpoint import write_json
from adderops.distill.runs.folder import RunFolder
from distill.runs import error_of, lines_of, written_run

pytestmark = pytest.mark.usefixtures("one_thread")


def test_compare_has_a_line_for_each_network(trained, tmp_path, capsys):
    plain = written_run(tmp_path / "plain", [0.5, 0.75, 0.625], method="plain", data=str(tmp_path))
    run = RunFolder.load(trained)
    assert main(["compare", str(trained), str(plain)]) == 0
    header, *lines = [line for line in lines_of(capsys) if line][1:]
    by_network = {(line[0], line[header.index("network")]): dict(zip(header, line, strict=False)) for line in lines}
    assert [name for _, name in by_network] == ["student", "student_ema", "teacher", "student"]
    for name in run.networks:
        line = by_network[str(trained), name]
        assert float(line["last"]) == pytest.approx(100 * run.rows[-1][f"{name}_test_accuracy"], abs=0.005)
    assert by_network[str(trained), "student_ema"]["training"] == "-"


def test_compare_shows_only_the_options_that_differ(tmp_path, capsys):
    runs = [
        written_run(tmp_path / "a", [0.5], method="pkkd", beta=0.5, threads=1),
        written_run(tmp_path / "b", [0.5], method="pkkd", beta=0.25, threads=2, root="elsewhere"),
        written_run(tmp_path / "c", [0.5], method="plain", beta=0.125, alpha=3.0),
    ]
    assert main(["compare", *map(str, runs)]) == 0
    text = capsys.readouterr().out
    header = text.splitlines()[2].split()
    # alpha means nothing to `plain`, where the data lie and the number of threads to no run
    assert header == "run method beta network epochs last best best_epoch training images/s hours".split()
    assert [line.split()[2] for line in text.splitlines()[3:6]] == ["0.5", "0.25", "-"]
    assert "confidence" not in text  # no two runs of a group


def test_compare_of_runs_by_hand(tmp_path, capsys):
    """Accuracies in percent 50, 60, 70 and 52, 64, 71: differences 2, 4, 1."""
    runs = [
        *(written_run(tmp_path / f"p{s}", [0.9, a], method="plain", seed=s) for s, a in enumerate((0.5, 0.6, 0.7))),
        *(written_run(tmp_path / f"k{s}", [0.1, a], method="pkkd", seed=s) for s, a in enumerate((0.52, 0.64, 0.71))),
        written_run(tmp_path / "running", [0.3], method="pkkd", seed=3, epochs=2),
    ]
    target, plot = tmp_path / "runs.csv", tmp_path / "curves.png"
    assert main(["compare", *map(str, runs), "--csv", str(target), "--plot", str(plot)]) == 0
    text = capsys.readouterr().out
    assert text.startswith("digits, lenet5, test accuracy in %\n")
    lines = [line.split() for line in text.splitlines()]
    assert lines[3][1:] == "plain student 0 2 50.00 90.00 1 100.00 100 1".split()
    assert lines[9][1:] == "pkkd student 3 1/2 30.00 30.00 1 100.00 100 0.5".split()
    assert lines[-2] == "plain student 3 60.00 10.00 - - -".split()
    # deviation of 52, 64, 71: sqrt((10.333^2 + 1.667^2 + 8.667^2) / 2); of 2, 4, 1: 1.5275, times 4.3027 / sqrt 3
    assert lines[-1] == "pkkd student 3 62.33 9.61 3 +2.33 -1.46 to +6.13".split()

    with open(target) as file:
        rows = list(csv.DictReader(file))
    assert [float(row["test_accuracy"]) for row in rows] == [0.5, 0.6, 0.7, 0.52, 0.64, 0.71, 0.3]
    assert rows[0]["run"] == str(runs[0]) and rows[6]["finished"] == "False" and rows[3]["beta"] == "0.1"
    assert plot.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_compare_takes_the_folder_of_a_comparison(tmp_path, capsys):
    both = tmp_path / "both"
    for method in ("pkkd", "plain"):
        written_run(both / method, [0.5], method=method)
    write_json(both / "config.json", Options(data="digits", method="compare").resolve().flat())
    assert main(["compare", str(both)]) == 0
    assert [line[:2] for line in lines_of(capsys)[3:]] == [[str(both / m), m] for m in ("pkkd", "plain")]
    shutil.rmtree(both / "pkkd")
    shutil.rmtree(both / "plain")
    assert "expected run folders pkkd and plain" in error_of(capsys, "compare", both)


def test_compare_of_equal_runs_says_why_there_are_no_means(tmp_path, capsys):
    runs = [written_run(tmp_path / name, [0.5], method="plain") for name in "ab"]
    assert main(["compare", *map(str, runs)]) == 2
    printed = capsys.readouterr()
    assert str(runs[1]) in printed.out and "got seed 0 twice" in printed.err


def test_compare_of_one_run_twice_prints_no_half_result(trained, capsys):
    assert main(["compare", str(trained), str(trained)]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and "expected each run once, got" in printed.err
