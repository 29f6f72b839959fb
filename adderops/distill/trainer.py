"""A run: the training loop, its progress bar and its folder."""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import adderops
from adderops.distill import distributed
from adderops.distill.batches import ImageSetBatches
from adderops.distill.build import (
    build_average,
    build_mix,
    build_optimizer,
    redraw_classifier,
)
from adderops.distill.checkpoint import (
    load_checkpoint,
    reading,
    require_same_configuration,
    require_same_data,
    save_checkpoint,
    save_tensors,
    write_json,
)
from adderops.distill.config import Config, Options
from adderops.distill.data import Data, calibration_batches
from adderops.distill.interrupt import Interrupted, StopRequest, stop_request
from adderops.distill.lock import own
from adderops.distill.log import Log
from adderops.distill.loop import Loop, Progress
from adderops.distill.methods import METHODS
from adderops.distill.schedule import make_schedule
from adderops.quant import observe

try:
    from tqdm import tqdm
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError("adderops.distill needs tqdm: install the extra `adderops[distill]`") from missing

# Fits 80 columns with a name of 5 letters, 400 epochs, hours to go, two accuracies and a loss of three digits.
BAR = "{desc} {percentage:3.0f}%|{bar}|{remaining} {rate_fmt}{postfix}"
# Options that are arguments of the loop.
OF_LOOP = (
    "seed",
    "amp",
    "clip",
    "channels_last",
    "workers",
    "test_every",
    "patience",
    "reestimate_batchnorm",
    "cuda_graph",
)
Callback = Callable[[Progress], None]


def train(config: Config | Options, data: Data, folder: Path, device: torch.device | None = None) -> dict[str, Any]:
    """Trains to the end in a run folder; resumes where the folder holds a checkpoint of the same run.

    The folder gets config.json, data.json (`Data.facts`), log.csv (one row per epoch), layers.csv (one row per epoch
    and matched layer), checkpoint.pt (all state, once per epoch and every `checkpoint_minutes`), the state_dict of the
    main network at its best test (student_best.pt, for example), and at the end summary.json and the state_dict of each
    network: student.pt, teacher.pt.  Images, their order and all random numbers depend on seed, epoch and step only, so
    a resumed run ends with the same bits as an uninterrupted one, with the same numbers of threads and processes.  (The
    adder operators give the same bits for any number of threads; torch's convolution does not promise it.)

    Under torchrun every process calls it with the same arguments; process 0 writes.

    Args:
        config: with any method but 'compare'; `Options` are resolved.
        data: the images that the configuration names, see `load_data`.
        folder: created if missing.
        device: of this process; the CPU by default.

    Returns:
        The summary: configuration, accuracies of the last epoch, hours, command.

    Raises:
        ValueError: the folder holds another run or a damaged checkpoint, the images or classes are not those that the
            run began with, or there are fewer images than in a batch.
        BlockingIOError: another process owns the folder.
        FileNotFoundError: the folder holds a log but no checkpoint.
        FloatingPointError: a loss became infinite or NaN; the last checkpoint stays.
        Interrupted: SIGTERM or Ctrl-C; after a checkpoint.
    """
    if isinstance(config, Options):
        config = config.resolve()
    torch.set_num_threads(config.threads)
    device = device or torch.device("cpu")
    with own(folder), stop_request() as stop:
        batches = ImageSetBatches(
            data.train,
            config.batch_size,
            config.accumulate,
            config.seed,
            workers=config.workers,
            pin_memory=device.type == "cuda",
        )
        loop = _build_loop(config, data, batches, device)
        run = Run(loop, folder, config.method, data.held_out, config.checkpoint_minutes, config.tensorboard)
        identity = {"config": config.flat(), "data": data.facts()}

        def check(state: dict[str, Any]) -> None:
            require_same_configuration(folder, config.differences(state["config"]))
            require_same_data(folder, state.get("data"), identity["data"])
            if state["step"] >= batches.steps_per_epoch:
                raise ValueError(
                    f"{folder / 'checkpoint.pt'}: step: expected fewer than the steps of an epoch, "
                    f"{batches.steps_per_epoch}, got {state['step']}"
                )

        if not run.resume(check):
            if run.writes is not None:
                write_json(folder / "config.json", identity["config"])
            if config.bits is not None:
                images = (images.to(device) for images in calibration_batches(data.train))
                observe(loop.task.networks[loop.task.main], images)
        if run.writes is not None and not (folder / "data.json").exists():  # older versions wrote none
            write_json(folder / "data.json", identity["data"])
        if config.compile:
            for network in loop.task.networks.values():
                network.compile()
        run.epochs(stop, identity)
        summary = _summary(config, data, loop)
        run.save_networks()
        if run.writes is not None:
            write_json(folder / "summary.json", summary)
        return summary


def _build_loop(config: Config, data: Data, batches: ImageSetBatches, device: torch.device) -> Loop:
    task = METHODS[config.method].build(config, data, device)
    optimizer = build_optimizer(config, task)

    def begin_epoch(epoch: int) -> None:
        if config.rifle and epoch > 0 and epoch % config.rifle == 0:
            redraw_classifier(task.networks[task.main], optimizer)

    return Loop(
        task,
        optimizer,
        make_schedule(
            optimizer,
            config.epochs,
            config.warmup_epochs,
            config.rifle,
            batches.steps_per_epoch if config.lr_per_step else 1,
            config.schedule,
        ),
        batches,
        config.epochs,
        test=data.test,
        device=device,
        per_step=config.lr_per_step,
        average=build_average(config, task),
        mix=build_mix(config, data.num_classes),
        on_epoch_begin=begin_epoch,
        **{name: getattr(config, name) for name in OF_LOOP},
    )


class Run:
    """A training loop with its files and its progress bar.

    Args:
        loop: to run.
        folder: for checkpoint.pt, log.csv and layers.csv; None: no files.
        title: of the progress bar.
        held_out: whether it tests on validation images.
        checkpoint_minutes: minutes between checkpoints within an epoch.
        tensorboard: write TensorBoard events, too.
        quiet: show nothing.

    Attributes:
        writes: the folder, on the process that writes to it; None: on the others, and without a folder.
    """

    def __init__(
        self,
        loop: Loop,
        folder: Path | None,
        title: str = "",
        held_out: bool = False,
        checkpoint_minutes: float = 10.0,
        tensorboard: bool = False,
        quiet: bool = False,
    ) -> None:
        self.loop, self.folder, self.title, self.quiet = loop, folder, title, quiet
        self.kind = "validation" if held_out else "test"
        self.checkpoint_minutes = checkpoint_minutes
        self.writes = folder if distributed.rank() == 0 else None
        self.log = None if self.writes is None else Log(self.writes, tensorboard)
        self.saved_at = time.monotonic()

    def resume(self, check: Callable[[dict[str, Any]], None]) -> bool:
        """Continues from the folder's checkpoint; returns False where there is none.

        Args:
            check: raises ValueError if the checkpoint belongs to another run.
        """
        if self.folder is None or not any((self.folder / name).exists() for name in ("checkpoint.pt", "log.csv")):
            return False
        path = self.folder / "checkpoint.pt"
        state = load_checkpoint(path)
        check(state)
        with reading(path, "a checkpoint of this run"):
            self.loop.load_state_dict(state)
        self._write_log()
        return True

    def epochs(
        self,
        stop: StopRequest,
        identity: dict[str, Any],
        on_step: Callback | None = None,
        on_epoch: Callback | None = None,
    ) -> bool:
        """Trains the remaining epochs; returns whether a callback stopped it before the end.

        Args:
            stop: checked between steps; a request leads to a checkpoint and `Interrupted`.
            identity: entries of the checkpoints in addition to the state of the loop.
            on_step, on_epoch: called after each step and each epoch.
        """
        loop = self.loop
        with self._bar() as bar:
            try:
                for progress in loop:
                    bar.update(progress.images)
                    if progress.row is not None:
                        self._keep_epoch(progress.row, progress.improved, identity, bar)
                    for callback in (on_step, on_epoch if progress.row is not None else None):
                        if callback is not None:
                            callback(progress)
                    if progress.stopped:
                        if loop.step:
                            self._save(identity)
                        return not loop.finished
                    if not loop.finished:
                        self._answer(stop, identity)
            except FloatingPointError as error:
                kept = "the last checkpoint is intact" if loop.rows else "no epoch was finished"
                where = f"{self.folder}: {kept}" if self.folder is not None else kept
                raise FloatingPointError(
                    f"epoch {loop.epoch + 1}: {error}; try a smaller lr or beta; {where}"
                ) from None
            finally:
                if self.log is not None:
                    self.log.close()
        return False

    def save_networks(self) -> None:
        """Writes the state_dict of each network."""
        if self.writes is not None:
            for name, network in self.loop.tested.items():
                save_tensors(self.writes / f"{name}.pt", network.state_dict())

    def _keep_epoch(self, row: dict[str, Any], improved: list[str], identity: dict[str, Any], bar: tqdm) -> None:
        loop = self.loop
        if self.log is not None:
            self.log.show(row, [of_layer for of_layer in loop.layers if of_layer["epoch"] == row["epoch"]])
        if self.writes is not None:
            # before the checkpoint: a run killed between the two repeats this epoch
            for name in improved:
                save_tensors(self.writes / f"{name}_best.pt", loop.tested[name].state_dict())
        self._save(identity)
        self._show(row, bar)

    def _answer(self, stop: StopRequest, identity: dict[str, Any]) -> None:
        """Saves a checkpoint when due, or when asked to stop; then raises Interrupted."""
        loop, signum = self.loop, stop.agreed()
        due = time.monotonic() - self.saved_at > 60 * self.checkpoint_minutes
        if loop.step and (signum or due):
            self._save(identity)
        if signum:
            saved = f"saved in {self.folder}" if self.folder is not None else "done, and saved nowhere"
            raise Interrupted(signum, f"{loop.epoch} epochs and {loop.step} steps are {saved}")

    def _save(self, identity: dict[str, Any]) -> None:
        self.saved_at = time.monotonic()
        self.loop.require_finite()
        if self.writes is not None:
            save_checkpoint(self.writes / "checkpoint.pt", identity | self.loop.state_dict())
            self._write_log()

    def _write_log(self) -> None:
        if self.log is not None:
            self.log.write(self.loop.rows, self.loop.layers)

    def _bar(self) -> tqdm:
        loop, images = self.loop, self.loop.batches.images
        return tqdm(
            total=None if images is None else loop.epochs * images,
            initial=loop.epoch * (images or 0) + loop.images,
            desc=self._epoch_shown(),
            unit="img",
            unit_scale=True,
            bar_format=BAR if images is not None else None,
            disable=True if self.quiet or distributed.rank() else None,
        )

    def _show(self, row: dict[str, Any], bar: tqdm) -> None:
        loop = self.loop
        tested = {name: row.get(f"{name}_test_accuracy") for name in loop.tested}
        accuracies = {name: value for name, value in tested.items() if value is not None}
        loss = row.get(f"{loop.task.main}_loss", row.get(f"{loop.task.main}_ce", math.nan))
        bar.set_description_str(self._epoch_shown(), refresh=False)
        bar.set_postfix_str(postfix(accuracies, loss))
        if bar.disable and not self.quiet and distributed.rank() == 0:  # not a terminal: a line per epoch
            shown = ", ".join(f"{name} {100 * value:.2f} %" for name, value in accuracies.items())
            result = f"{self.kind} accuracy {shown}" if shown else f"loss {loss:.4g}"
            speed = f"{row['images_per_second']:.0f} img/s"
            print(f"{self.title or 'training'}: epoch {row['epoch']}: {result}, {speed}", flush=True)

    def _epoch_shown(self) -> str:
        return f"{self.title} {min(self.loop.epoch + 1, self.loop.epochs)}/{self.loop.epochs}".strip()


def postfix(accuracies: dict[str, float], loss: float) -> str:
    """Returns the text after the bar; a moving average replaces its network.

    >>> postfix({"teacher": 0.992, "student": 0.975, "student_ema": 0.9812}, 0.12345)
    'teacher 99.2 ema 98.1 loss 0.123'
    """
    shown = {name.partition("_")[0]: (name.rpartition("_")[2], value) for name, value in accuracies.items()}
    return " ".join([*(f"{name} {100 * value:.1f}" for name, value in shown.values()), f"loss {loss:.3g}"])


def _summary(config: Config, data: Data, loop: Loop) -> dict[str, Any]:
    """Returns the facts that a table of results needs; the accuracies are of the last epoch, not the best."""
    rows = loop.rows
    return {
        "dataset": data.name,
        "network": config.arch,
        "method": config.method,
        "seed": config.seed,
        "epochs": config.epochs,
        "epochs_done": len(rows),
        "train_images": len(data.train),
        "test_images": len(data.test),
        "test_is_validation": data.held_out,
        **{name: value for name, value in rows[-1].items() if name.endswith("_accuracy")},
        **{f"{name}_best_epoch": best["epoch"] for name, best in loop.best.items()},
        "images_per_second": round(sum(row["images_per_second"] for row in rows) / len(rows), 1),
        "hours": round(sum(row["seconds"] for row in rows) / 3600, 4),
        "threads": config.threads,
        "processes": distributed.world_size(),
        "torch": torch.__version__,
        "adderops": adderops.__version__,
        "command": config.command(),
    }
