"""`eval RUN`: tests the saved networks of a finished run again, on its test images or on those of another set."""

import math
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from adderops.batchnorm import reestimate_batchnorm
from adderops.distill.build import device_type
from adderops.distill.data import ImageSet, calibration_batches, load_test_images
from adderops.distill.data.facts import differences
from adderops.distill.evaluate import evaluate
from adderops.distill.options import option
from adderops.distill.runs.command import CommandOptions, of_training, run_folder, weights_option
from adderops.distill.runs.folder import RunFolder
from adderops.distill.runs.tables import percent, text_table


@dataclass(frozen=True)
class Options(CommandOptions):
    folder: Path = run_folder()
    weights: str | None = weights_option("network to test (default: all that the last epoch tested)")
    data: str | None = option(
        None,
        "test on the test images of this set, sized and normalized as in training, with classes matched by name "
        "(default: the run's test set)",
        type=str,
    )
    reestimate_batchnorm: int | None = option(
        None,
        "first re-estimate the BatchNorm statistics on N training images: running averages lag behind weights that "
        "still move at the end of training (default: as saved)",
        type=int,
        least=2,
        metavar="N",
    )
    root: str | None = of_training("root", "folder with mnist, cifar10 and so on (default: as in training)")
    device: str | None = of_training("device", "where to test (default: as in training)")
    threads: int | None = of_training("threads", "CPU threads (default: as in training)")
    workers: int | None = of_training("workers", "processes that load images (default: as in training)")


def run(options: Options) -> None:
    run = RunFolder.load(options.folder)
    given = {name: getattr(options, name) for name in ("root", "device", "threads", "workers")}
    config = run.config.changed(**{name: value for name, value in given.items() if value is not None})
    run = replace(run, config=config)
    networks = {name: run.network(name) for name in ([options.weights] if options.weights else run.networks)}
    device = torch.device(device_type(config.device))
    torch.set_num_threads(config.threads)
    count = options.reestimate_batchnorm
    data = run.load_data() if count or (options.data is None and config.validation) else None
    if data is not None and options.data is None and config.validation:
        images, kind = data.test, "validation images"
    else:
        images, kind = _test_images(run, options.data)
    print(f"{run.title}: {len(images)} {kind}", flush=True)
    if data is not None and count:
        print(f"BatchNorm statistics of {min(count, len(data.train))} training images", flush=True)
    rows, notes = [], []
    for name, network in networks.items():
        network.to(device).to(memory_format=torch.channels_last if config.channels_last else torch.preserve_format)
        if data is not None and count:
            reestimate_batchnorm(network, calibration_batches(data.train, count, config.workers), device)
        begin = time.perf_counter()
        tested = evaluate(
            {name: network},
            images,
            device,
            amp=config.amp,
            channels_last=config.channels_last,
            workers=config.workers,
        )
        speed = len(images) / (time.perf_counter() - begin)
        accuracy, loss = tested[f"{name}_test_accuracy"], tested[f"{name}_test_loss"]
        error = (accuracy * (1 - accuracy) / len(images)) ** 0.5
        cells = {"accuracy, %": percent(accuracy, error), "loss": f"{loss:.4f}", "images/s": f"{speed:.0f}"}
        rows.append({"network": name, **cells})
        trained = _accuracy_in_training(run, name)
        if options.data is None and abs(trained - accuracy) > 0.5 / len(images):  # another machine rounds differently
            notes.append(f"{name}: {percent(trained)} % when the training ended")
    print("\n".join([text_table(rows), *notes]))


def _test_images(run: RunFolder, other: str | None) -> tuple[ImageSet, str]:
    """Returns the test images of the run's set, or of another set, and what to call them."""
    root = Path(run.config.root)
    if other is not None:
        return load_test_images(other, run.data, root)[0], f"test images of {other}"
    images, sums = load_test_images(run.config.data, run.data, root, own=True)
    changed = differences({"checksums": run.data["checksums"]}, {"checksums": sums})
    return images, "test images" + f" ({', '.join(changed)} than when the run was trained)" * bool(changed)


def _accuracy_in_training(run: RunFolder, name: str) -> float:
    tests = [value for value in run.curve(f"{name.removesuffix('_best')}_test_accuracy") if not math.isnan(value)]
    return max(tests) if name.endswith("_best") else tests[-1]
