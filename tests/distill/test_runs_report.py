"""`report`: every figure and number of a run in one file; parts without data are left out."""

import base64
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from adderops.distill import main
from adderops.distill.runs.figures import draw_losses
from adderops.distill.runs.folder import RunFolder
from adderops.distill.runs.report import write_report
from adderops.distill.runs.weights import fit_gaussian
from adderops.distill.speed import COLUMNS as SPEED_COLUMNS


def embedded(page: str) -> dict[str, bytes]:
    """The figures in a page, by title."""
    found = re.findall(r'<img alt="([^"]+)" src="data:image/png;base64,([^"]+)">', page)
    return {title: base64.b64decode(content) for title, content in found}


def test_the_report_holds_every_figure_and_number(runs, tmp_path, capsys):
    run = runs["pkkd"]
    assert main(["report", str(run.path), "--output", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'report.html'}\n"
    page = (tmp_path / "report.html").read_text()
    figures = embedded(page)
    assert list(figures) == ["Accuracy", "Losses", "Speed limit", "Match of the layers", "Weights"]
    for name, content in zip(("accuracy", "losses", "speed", "layers", "weights"), figures.values(), strict=True):
        assert content.startswith(b"\x89PNG\r\n\x1a\n") and content.endswith(b"IEND\xaeB`\x82")
        assert (tmp_path / f"{name}.png").read_bytes() == content
    assert re.findall("<h2>(.*?)</h2>", page) == [
        *("Result", "Accuracy", "Losses", "Speed limit", "Match of the layers", "Weights", "Fits to the weights"),
        *("Operations per image", "On a microcontroller", "Command", "Configuration"),
    ]
    for row in run.results():
        cells = (row["network"], f"{100 * row['test_accuracy']:.2f}", f"{100 * row['best_test_accuracy']:.2f}")
        assert "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) in page
    assert run.config.command() in page and "<td>beta</td><td>0.1</td>" in page and "<td>lr</td><td>0.02</td>" in page
    assert "After epoch 2 of 2." in page
    gaussian = fit_gaussian(run.network("student").conv3.weight)
    assert f"<td>student conv3</td><td>adder layers</td><td>48000</td><td>{gaussian.scale:.4g}</td>" in page
    # 416,016 multiply-accumulates, 298,080 of them in the layers that become adders; 3.7 and 0.9 pJ, 0.2 and 0.03 pJ
    for cells in ("CNN 416,016 416,016 1,913,674 95,684", "adder_network 117,936 714,096 1,079,050 45,010"):
        assert "".join(f"<td>{cell.replace('_', ' ')}</td>" for cell in cells.split()) in page
    # nothing of it lies elsewhere
    assert not re.search(r'(src|href)="(?!data:)', page) and "http" not in page


@pytest.mark.slow
@pytest.mark.parametrize("method, network", [("plain", "student"), ("cnn", "teacher")])
def test_without_distillation_its_parts_are_left_out(runs, tmp_path, method, network):
    page = write_report(runs[method], tmp_path).read_text()
    assert (
        list(embedded(page)) == ["Accuracy", "Losses", "Speed limit", "Weights"]
        and not (tmp_path / "layers.png").exists()
    )
    assert set(re.findall(r"<td>(student|teacher) conv3</td>", page)) == {network}
    assert [axes.get_title() for axes in draw_losses(runs[method]).axes] == ["cross entropy with the labels"]


@pytest.mark.slow
def test_the_report_is_a_function_of_the_run(runs, tmp_path):
    run = runs["plain"]
    assert main(["report", str(run.path)]) == 0
    assert (run.path / "report" / "report.html").read_bytes() == write_report(run, tmp_path).read_bytes()


def test_a_run_in_training_has_no_weights_yet_and_names_are_escaped(runs, tmp_path):
    run = runs["pkkd"]
    config = run.config.changed(data="a<b>&c")
    page = write_report(RunFolder(run.path, config, run.rows[:1], run.layers[:3], finished=False), tmp_path).read_text()
    assert list(embedded(page)) == ["Accuracy", "Losses", "Speed limit", "Match of the layers"]
    assert "After epoch 1 of 2." in page and "Fits" not in page
    assert "<title>a&lt;b&gt;&amp;c, lenet5" in page and "<b>" not in page


def test_what_an_older_version_did_not_record_is_left_out(runs, tmp_path):
    """A run without a data.json, whose images are gone, and without a speed limit in its log."""
    run = runs["plain"]
    old = shutil.copytree(run.path, tmp_path / "old", ignore=shutil.ignore_patterns("data.json"))
    rows = [{name: value for name, value in row.items() if not name.endswith(SPEED_COLUMNS)} for row in run.rows]
    gone = replace(run, path=Path(old), config=run.config.changed(data=str(tmp_path / "gone")), rows=rows)
    page = write_report(gone, tmp_path / "report").read_text()
    assert "Not counted, because the size of the images is not known" in page and "energy" not in page
    assert list(embedded(page)) == ["Accuracy", "Losses", "Weights"]


# --- what is missing ---


def test_a_missing_file_ends_with_a_reason(runs, tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 2
    assert f"{tmp_path}: expected a run folder" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_without_matplotlib_there_is_a_remedy(runs, monkeypatch, capsys, tmp_path):
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    for name in ("report", "figures"):
        monkeypatch.delitem(sys.modules, f"adderops.distill.runs.{name}")
    run = str(runs["plain"].path)
    for arguments in (["report", run], ["compare", run, "--plot", str(tmp_path / "x.png")]):
        assert main(arguments) == 2
        assert "figures need matplotlib: install the extra `adderops[distill]`" in capsys.readouterr().err
