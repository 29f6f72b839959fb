"""The training loop: one optimizer step a batch, one log row and one checkpoint an epoch, the same for every method."""

import math
import random
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import adderops
from adderops.distill.checkpoint import load_checkpoint, save_checkpoint, save_tensors, write_csv, write_json
from adderops.distill.config import Config
from adderops.distill.data import Dataset, epoch_batches
from adderops.distill.task import Losses, PKKDTask, SingleTask
from adderops.models import create_model
from adderops.optim import AdaptiveRate

try:
    from tqdm import tqdm
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError("adderops.distill needs tqdm: install the extra `adderops[distill]`") from missing

MOMENTUM = 0.9
TEST_BATCH = 500
KIND_OF_ROLE = {"teacher": "cnn", "student": "adder"}


def build_task(config: Config, dataset: Dataset) -> PKKDTask | SingleTask:
    """Builds the networks of a run and the task that trains them.

    A network's initial weights depend on the seed and its role only: the student of `plain` starts as the student of
    `pkkd` does, and `cnn` is the training of pkkd's teacher.
    """

    def network(role: str) -> nn.Module:
        entropy = np.random.SeedSequence([config.seed, list(KIND_OF_ROLE).index(role)])
        torch.manual_seed(int(entropy.generate_state(1)[0]))
        return create_model(config.arch, KIND_OF_ROLE[role], dataset.train_images.size(1), dataset.num_classes)

    if config.method == "pkkd":
        return PKKDTask(network("teacher"), network("student"), config.alpha, config.beta)
    role = "teacher" if config.method == "cnn" else "student"
    return SingleTask(network(role), role)


def learning_rate(config: Config, epoch: int) -> float:
    r"""Returns :math:`lr \cdot (1 + \cos(\pi\,epoch / epochs)) / 2`, epoch counted from 0.

    >>> learning_rate(Config(lr=0.1, epochs=2), epoch=1)
    0.05
    """
    return config.lr * 0.5 * (1 + math.cos(math.pi * epoch / config.epochs))


def train(config: Config, dataset: Dataset, folder: Path) -> dict[str, Any]:
    """Trains to the end in a run folder; continues where the folder holds a checkpoint of the same run.

    The folder gets config.json, log.csv (a row an epoch), checkpoint.pt (all state, once an epoch) and at the end
    summary.json and one state_dict for each network: student.pt, teacher.pt.  The order of images follows from seed and
    epoch, so a continued run ends with the same bits as one never interrupted, given the same number of threads.  (The
    adder operators give the same bits on any number; torch's own convolution does not promise it.)

    Args:
        config: with a method other than 'compare'.
        dataset: that of `load_dataset(config.data)`.
        folder: made if missing.

    Returns:
        The summary: configuration, accuracies of the last epoch, hours, command.

    Raises:
        ValueError: the folder holds another run or a damaged checkpoint, or fewer images than a batch.
        FileNotFoundError: the folder holds a log but no checkpoint.
        FloatingPointError: a loss became infinite or NaN; the last checkpoint stays.
    """
    config = config.resolve()
    torch.set_num_threads(config.threads)
    if len(dataset.train_images) < config.batch_size:
        raise ValueError(
            f"batch_size: expected at most the {len(dataset.train_images)} images, got {config.batch_size}"
        )
    task = build_task(config, dataset)
    for set_seed in (random.seed, np.random.seed, torch.manual_seed):
        set_seed(config.seed)
    # One optimizer for both networks: they share no parameter, so its step is one step of each.
    optimizer = torch.optim.SGD(
        task.parameters(), config.lr, momentum=MOMENTUM, weight_decay=config.weight_decay, nesterov=config.nesterov
    )
    if config.method != "cnn":
        AdaptiveRate(task, optimizer)

    checkpoint, log = folder / "checkpoint.pt", folder / "log.csv"
    rows: list[dict[str, float]] = []
    if checkpoint.exists() or log.exists():
        state = load_checkpoint(checkpoint)
        _require_same_run(config, state["config"], folder)
        task.load_state_dict(state["task"])
        optimizer.load_state_dict(state["optimizer"])
        rows = state["log"]
        write_csv(log, rows)
    else:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "config.json", asdict(config))

    count = len(dataset.train_images)
    done = len(rows)
    with tqdm(
        total=config.epochs * count, initial=done * count, desc=config.method, unit="img", unit_scale=True, disable=None
    ) as bar:
        for epoch in range(done, config.epochs):
            try:
                row = _train_epoch(config, dataset, task, optimizer, epoch, bar) | _test(dataset, task)
            except FloatingPointError as error:
                kept = f"the checkpoint of epoch {epoch} in {folder} is intact" if epoch else "no epoch was finished"
                raise FloatingPointError(f"epoch {epoch + 1}: {error}; try a smaller --lr or --beta; {kept}") from None
            rows.append({name: float(f"{value:.6g}") for name, value in row.items()} | {"epoch": epoch + 1})
            state = {"task": task.state_dict(), "optimizer": optimizer.state_dict()}
            save_checkpoint(checkpoint, {"config": asdict(config), "log": rows, **state})
            write_csv(log, rows)
            _show(config, rows[-1], task, bar)

    for role, network in task.networks.items():
        save_tensors(folder / f"{role}.pt", network.state_dict())
    summary = _summary(config, dataset, rows)
    write_json(folder / "summary.json", summary)
    return summary


def _train_epoch(config: Config, dataset: Dataset, task, optimizer, epoch: int, bar: tqdm) -> dict[str, float]:
    """Trains for one epoch and returns its log row: means over the images, and the diagnosis of the last batch."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(config, epoch)
    task.train()
    batches = epoch_batches(len(dataset.train_images), config.batch_size, config.seed, epoch)
    sums: Counter[str] = Counter()
    diagnosis: dict[str, float] = {}
    begin = time.perf_counter()
    for batch in batches:
        images, labels = dataset.normalize(dataset.train_images[batch]), dataset.train_labels[batch]
        losses: Losses = task(images, labels)
        terms = {name: term.item() for name, term in losses.terms.items()}
        _require_finite(terms)
        if batch is batches[-1]:
            diagnosis = task.diagnose(losses)
        optimizer.zero_grad()
        losses.total.backward()
        optimizer.step()

        for name, value in terms.items():
            sums[name] += value * len(batch)
        for role, logits in losses.logits.items():
            sums[f"{role}_train_accuracy"] += _correct(logits, labels)
        bar.update(len(batch))
    seconds = time.perf_counter() - begin
    count = len(dataset.train_images)
    means = {name: value / count for name, value in sums.items()}
    speed = {"images_per_second": count / seconds, "seconds": seconds}
    return {"epoch": epoch + 1, "lr": learning_rate(config, epoch), **means, **diagnosis, **speed}


@torch.no_grad()
def _test(dataset: Dataset, task: nn.Module) -> dict[str, float]:
    """Returns loss and accuracy of each network on the test images."""
    task.eval()
    count = len(dataset.test_labels)
    row = {}
    for role, network in task.networks.items():
        loss, correct = 0.0, 0
        for batch in torch.arange(count).split(TEST_BATCH):
            labels = dataset.test_labels[batch]
            logits = network(dataset.normalize(dataset.test_images[batch]))
            loss += F.cross_entropy(logits, labels, reduction="sum").item()
            correct += _correct(logits, labels)
        row |= {f"{role}_test_loss": loss / count, f"{role}_test_accuracy": correct / count}
    # weights that became NaN in the last step of an epoch show here, before they are saved
    _require_finite({name: value for name, value in row.items() if name.endswith("loss")})
    return row


def _correct(logits: Tensor, labels: Tensor) -> int:
    return int((logits.argmax(1) == labels).sum())


def _require_finite(losses: dict[str, float]) -> None:
    if not all(map(math.isfinite, losses.values())):
        described = ", ".join(f"{name} {value:.4g}" for name, value in losses.items())
        raise FloatingPointError(f"loss is not finite: {described}")


def _require_same_run(config: Config, saved: dict[str, Any], folder: Path) -> None:
    changed = [name for name, value in asdict(config).items() if name != "threads" and value != saved.get(name)]
    if changed:
        described = ", ".join(f"{name} {saved.get(name)!r} -> {getattr(config, name)!r}" for name in changed)
        raise ValueError(f"{folder}: expected the configuration of the run in this folder, got another: {described}")


def _show(config: Config, row: dict[str, float], task: nn.Module, bar: tqdm) -> None:
    accuracies = {role: f"{100 * row[f'{role}_test_accuracy']:.2f} %" for role in task.networks}
    bar.set_postfix(epoch=row["epoch"], **accuracies)
    if bar.disable:  # not a terminal: a line an epoch in place of the bar
        shown = ", ".join(f"{role} {accuracy}" for role, accuracy in accuracies.items())
        speed = f"{row['images_per_second']:.0f} img/s"
        print(f"{config.method}: epoch {row['epoch']}: test accuracy {shown}, {speed}", flush=True)


def _summary(config: Config, dataset: Dataset, rows: list[dict[str, float]]) -> dict[str, Any]:
    """The facts that a table of results needs; the accuracies are those of the last epoch, not the best."""
    return {
        "dataset": dataset.name,
        "network": config.arch,
        "method": config.method,
        "seed": config.seed,
        "epochs": config.epochs,
        "train_images": len(dataset.train_images),
        "test_images": len(dataset.test_images),
        **{name: value for name, value in rows[-1].items() if name.endswith("_accuracy")},
        "images_per_second": round(sum(row["images_per_second"] for row in rows) / len(rows), 1),
        "hours": round(sum(row["seconds"] for row in rows) / 3600, 4),
        "threads": config.threads,
        "torch": torch.__version__,
        "adderops": adderops.__version__,
        "command": config.command(),
    }
