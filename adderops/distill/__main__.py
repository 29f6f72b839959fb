"""`python -m adderops.distill`: trains an adder network by PKKD and prints what the distillation was worth."""

import argparse
import sys
import time
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from adderops.distill.checkpoint import write_json
from adderops.distill.config import Config
from adderops.distill.data import Dataset, load_dataset
from adderops.distill.trainer import train

DESCRIPTION = """\
Trains an adder network (student) together with a CNN of the same architecture (teacher) by PKKD, arXiv 2009.13044.
Without arguments: scikit-learn's digits, the student with and without distillation, a table; under two minutes."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m adderops.distill",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,  # so that options given are told from defaults
    )
    for f in fields(Config):
        flag = "--" + f.name.replace("_", "-")
        text = f.metadata["help"] + ("" if f.default is None else f" (default: {f.default})")
        kind = f.metadata.get("type") or type(f.default)
        if kind is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, help=text)
        else:
            parser.add_argument(flag, type=kind, choices=f.metadata.get("choices"), help=text)
    parser.add_argument(
        "--output", type=Path, metavar="FOLDER", help="run folder to make (default: runs/DATA-ARCH-METHOD-TIME)"
    )
    parser.add_argument(
        "--resume",
        type=Path,
        metavar="FOLDER",
        help="run folder to continue as its config.json says; no other option but --threads",
    )
    return parser


def _open_run(parser: argparse.ArgumentParser, given: dict[str, Any]) -> tuple[Config, Path]:
    """Returns configuration and folder of the run that the options ask for."""
    resume, output = given.pop("resume", None), given.pop("output", None)
    if resume is not None:
        others = sorted(set(given) - {"threads"}) + ["output"] * (output is not None)
        if others:
            refused = ", ".join("--" + name.replace("_", "-") for name in others)
            parser.error(f"--resume takes everything from the run's config.json; drop {refused}")
        if not (resume / "config.json").is_file():
            raise FileNotFoundError(f"--resume: expected a run folder, got {resume} without a config.json")
        return replace(Config.load(resume / "config.json"), **given), resume
    config = Config(**given).resolve()
    if output is None:
        stamp = time.strftime("%Y%m%d-%H%M%S")
        output = Path("runs") / f"{Path(config.data).name}-{config.arch}-{config.method}-{stamp}"
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise FileExistsError(f"--output: {output} exists; continue it with --resume, or choose another folder")
    return config, output


def _compare(config: Config, dataset: Dataset, folder: Path) -> list[dict[str, Any]]:
    """Runs pkkd and plain in subfolders; those that are finished already return at once."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", asdict(config))
    summaries = [train(replace(config, method=method), dataset, folder / method) for method in ("pkkd", "plain")]
    write_json(folder / "summary.json", summaries)
    return summaries


def _table(summaries: list[dict[str, Any]]) -> str:
    """One line for each network trained, with the standard error that the number of test images implies."""
    named = {
        ("pkkd", "teacher"): "teacher: CNN, by the labels",
        ("pkkd", "student"): "student: adder network, by PKKD",
        ("plain", "student"): "plain:   adder network, by the labels",
        ("cnn", "teacher"): "cnn:     CNN, by the labels",
    }
    lines = []
    for summary in summaries:
        for role in ("teacher", "student"):
            accuracy = summary.get(f"{role}_test_accuracy")
            if accuracy is not None:
                error = (accuracy * (1 - accuracy) / summary["test_images"]) ** 0.5
                lines.append(f"{named[summary['method'], role]:<40}{100 * accuracy:6.2f} % +- {100 * error:.2f}")
    first = summaries[0]
    title = f"{first['dataset']}, {first['network']}, seed {first['seed']}, {first['epochs']} epochs"
    return "\n".join([f"{title}: test accuracy", *lines])


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = _parser()
    folder = None
    try:
        config, folder = _open_run(parser, vars(parser.parse_args(arguments)))
        dataset = load_dataset(config.data)
        print(f"run folder: {folder}", flush=True)
        if config.method == "compare":
            summaries = _compare(config, dataset, folder)
        else:
            summaries = [train(config, dataset, folder)]
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        print(f"adderops.distill: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\nadderops.distill: interrupted; continue with --resume {folder}", file=sys.stderr)
        return 130
    print(f"\n{_table(summaries)}\nrun folder: {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
