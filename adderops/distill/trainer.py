"""The training loop: one optimizer step a batch, one log row and one checkpoint an epoch, the same for every method."""

import math
import time
from collections import Counter
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import adderops
from adderops.distill import distributed
from adderops.distill.build import build_average, build_optimizer, build_task, main_role
from adderops.distill.checkpoint import (
    load_checkpoint,
    reading,
    require_same_data,
    restore,
    save_checkpoint,
    save_tensors,
    write_json,
)
from adderops.distill.config import Config
from adderops.distill.data import Data, calibration_batches, epoch_batches
from adderops.distill.evaluate import correct, evaluate, to_device
from adderops.distill.interrupt import Interrupted, StopRequest, stop_request
from adderops.distill.lock import own
from adderops.distill.log import Log
from adderops.distill.task import Losses
from adderops.models import classifier
from adderops.optim import AdaptiveRate, AdaptiveRateLayer
from adderops.quant import observe

try:
    from tqdm import tqdm
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError("adderops.distill needs tqdm: install the extra `adderops[distill]`") from missing


def learning_rate(lr: float, epoch: int, epochs: int) -> float:
    r"""Returns :math:`lr \cdot (1 + \cos(\pi\,epoch / epochs)) / 2`, epoch counted from 0.

    >>> learning_rate(0.1, epoch=1, epochs=2)
    0.05
    """
    return lr * 0.5 * (1 + math.cos(math.pi * epoch / epochs))


def train(config: Config, data: Data, folder: Path, device: torch.device | None = None) -> dict[str, Any]:
    """Trains to the end in a run folder; continues where the folder holds a checkpoint of the same run.

    The folder gets config.json, data.json (`Data.facts`), log.csv (a row an epoch), layers.csv (a row an epoch and
    matched layer), checkpoint.pt (all state, once an epoch and every `checkpoint_minutes`) and at the end summary.json
    and one state_dict for each network: student.pt, teacher.pt.  Images, their order and all random numbers follow from
    seed, epoch and step, so a continued run ends with the same bits as one never interrupted, given as many threads and
    processes.  (The adder operators give the same bits on any number; torch's own convolution does not promise it.)

    Under torchrun every process calls it with the same arguments; process 0 writes.

    Args:
        config: with a method other than 'compare'.
        data: that of the configuration.
        folder: made if missing.
        device: of this process; the CPU by default.

    Returns:
        The summary: configuration, accuracies of the last epoch, hours, command.

    Raises:
        ValueError: the folder holds another run or a damaged checkpoint, the images or classes are not those that the
            run began with, or fewer images than a batch.
        BlockingIOError: another process owns the folder.
        FileNotFoundError: the folder holds a log but no checkpoint.
        FloatingPointError: a loss became infinite or NaN; the last checkpoint stays.
        Interrupted: SIGTERM or Ctrl-C; after a checkpoint.
    """
    config = config.resolve()
    torch.set_num_threads(config.threads)
    if len(data.train) < config.batch_size:
        raise ValueError(f"batch_size: expected at most the {len(data.train)} images, got {config.batch_size}")
    if config.batch_size < 2 * config.accumulate * distributed.world_size():
        raise ValueError(
            f"accumulate: expected at least 2 images in each part of a batch of {config.batch_size} for "
            f"{distributed.world_size()} processes, got {config.accumulate} parts"
        )
    with own(folder), stop_request() as stop:
        run = _Run(config, data, folder, device or torch.device("cpu"))
        run.start()
        run.epochs(stop)
        return run.finish()


class _Run:
    """A run in progress: all of its state, and the files it is kept in."""

    def __init__(self, config: Config, data: Data, folder: Path, device: torch.device) -> None:
        self.config, self.data, self.folder, self.device = config, data, folder, device
        self.writes = distributed.rank() == 0
        self.task = build_task(config, data.in_channels, data.num_classes, device)
        self.optimizer = build_optimizer(config, self.task)
        if any(isinstance(module, AdaptiveRateLayer) for module in self.task.modules()):
            AdaptiveRate(self.task, self.optimizer)
        self.average = build_average(config, self.task)
        self.role = main_role(config)
        self.log = Log(folder, config.tensorboard and self.writes)
        self.epoch, self.step = 0, 0  # done: whole epochs, and batches of the next
        self.sums: Counter[str] = Counter()
        self.saved_at = time.monotonic()

    def start(self) -> None:
        """Continues from the folder's checkpoint, or makes the folder."""
        checkpoint = self.folder / "checkpoint.pt"
        if checkpoint.exists() or (self.folder / "log.csv").exists():
            state = load_checkpoint(checkpoint)
            changed = self.config.differences(state["config"])
            if changed:
                described = ", ".join(f"{name} {old!r} -> {new!r}" for name, (old, new) in changed.items())
                raise ValueError(
                    f"{self.folder}: expected the configuration of the run in this folder, got another: {described}"
                )
            require_same_data(self.folder, state.get("data"), self.data.facts())
            with reading(checkpoint, "a checkpoint of this run"):
                if state["step"] >= math.ceil(len(self.data.train) / self.config.batch_size):
                    raise ValueError(f"step: expected fewer than the steps of an epoch, got {state['step']}")
                for name, part in self._parts().items():
                    restore(part, state[name])
            self.epoch, self.step, self.sums = state["epoch"], state["step"], Counter(state["sums"])
            self.log.rows, self.log.layers = state["log"], state["layers"]
            if self.writes:
                self.log.write()
        else:
            if self.writes:
                write_json(self.folder / "config.json", asdict(self.config))
            if self.config.bits is not None:
                batches = (images.to(self.device) for images in calibration_batches(self.data.train))
                observe(self.task.networks["student"], batches)
        if self.writes and not (self.folder / "data.json").exists():  # older versions kept none
            write_json(self.folder / "data.json", self.data.facts())
        if self.config.compile:
            for network in self.task.networks.values():
                network.compile()
        self.model: nn.Module = self.task
        if distributed.world_size() > 1:
            ids = [self.device.index] if self.device.type == "cuda" else None
            self.model = DistributedDataParallel(self.task, device_ids=ids)

    def epochs(self, stop: StopRequest) -> None:
        """Trains the epochs that are left."""
        count = len(self.data.train)
        batches = math.ceil(count / self.config.batch_size)
        with tqdm(
            total=self.config.epochs * count,
            initial=int((self.epoch + self.step / batches) * count),
            desc=self.config.method,
            unit="img",
            unit_scale=True,
            disable=None if self.writes else True,
        ) as bar:
            while self.epoch < self.config.epochs:
                try:
                    row, layers = self._epoch(bar, stop)
                except FloatingPointError as error:
                    kept = "the last checkpoint is intact" if self.log.rows else "no epoch was finished"
                    raise FloatingPointError(
                        f"epoch {self.epoch + 1}: {error}; try a smaller --lr or --beta; {self.folder}: {kept}"
                    ) from None
                self.epoch, self.step, self.sums = self.epoch + 1, 0, Counter()
                self.log.append(row, layers)
                self._save()
                self._show(bar)
                if self.epoch < self.config.epochs:
                    self._answer(stop)

    def finish(self) -> dict[str, Any]:
        """Writes what a finished run leaves; returns the summary."""
        summary = self._summary()
        if self.writes:
            for name, network in self._tested().items():
                save_tensors(self.folder / f"{name}.pt", network.state_dict())
            write_json(self.folder / "summary.json", summary)
        self.log.close()
        return summary

    def _epoch(self, bar: tqdm, stop: StopRequest) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Trains and tests for one epoch, or what is left of it; returns its log row and those of the layers."""
        config, count = self.config, len(self.data.train)
        self._begin_epoch()
        batches = epoch_batches(count, config.batch_size, config.seed, self.epoch)
        left = batches[self.step :]
        # a batch is cut into parts, a part into the processes' shares
        parts = [[distributed.share(part) for part in batch.tensor_split(config.accumulate)] for batch in left]
        loader = iter(
            self.data.train.batches(
                [part for batch in parts for part in batch],
                self.epoch,
                seed=config.seed,
                workers=config.workers,
                pin_memory=self.device.type == "cuda",
            )
        )
        watched: dict[str, list[float]] = {}
        begin = time.perf_counter()
        for batch in left:
            self._seed(self.step)
            last = self.step == len(batches) - 1
            watched = self._step(batch, loader, diagnose=last)
            self.step += 1
            now = time.perf_counter()
            self.sums["seconds"] += now - begin
            begin = now
            bar.update(len(batch))
            if not last:  # behind the last step comes the epoch's checkpoint
                self._answer(stop)
        means = {name: value / count for name, value in self.sums.items() if name != "seconds"}
        seconds = self.sums["seconds"]
        tested = evaluate(
            self._tested(),
            self.data.test,
            self.device,
            amp=config.amp,
            channels_last=config.channels_last,
            workers=config.workers,
        )
        # weights that became NaN in the last step of an epoch show here, before they are saved
        _require_finite({name: value for name, value in tested.items() if name.endswith("loss")})
        extremes = {}
        if watched:
            extremes = {"gradient_ratio_max": max(watched["gradient_ratio"]), "var_yc_min": min(watched["var_yc"])}
        row = {
            "epoch": self.epoch + 1,
            "lr": self.optimizer.param_groups[0]["lr"],
            **means,
            **tested,
            **extremes,
            "images_per_second": count / seconds,
            "seconds": seconds,
        }
        layers = [
            {"epoch": self.epoch + 1, "layer": name, **{key: values[i] for key, values in watched.items()}}
            for i, name in enumerate(self.task.layer_names if watched else [])
        ]
        return row, layers

    def _begin_epoch(self) -> None:
        """Sets the learning rates; under --rifle re-draws the classifier."""
        config = self.config
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(config.lr, self.epoch, config.epochs)
            if group["name"] == "classifier":  # RIFLE: a cosine of its own for each period
                period = min(config.rifle, config.epochs)
                group["lr"] = learning_rate(config.lr, self.epoch % period, period)
        if config.rifle and self.step == 0 and self.epoch > 0 and self.epoch % config.rifle == 0:
            self._seed(-1)
            head = classifier(self.task.networks[self.role])[1]
            head.reset_parameters()
            for parameter in head.parameters():
                self.optimizer.state.pop(parameter, None)  # momentum of weights that are gone
        self.task.train()

    def _step(self, batch: torch.Tensor, loader, diagnose: bool) -> dict[str, list[float]]:
        """One optimizer step; adds to the sums, and returns the diagnosis of the last part if asked."""
        config, watched = self.config, {}
        self.optimizer.zero_grad()
        for i, part in enumerate(batch.tensor_split(config.accumulate)):
            images, labels = next(loader)
            images = to_device(images, self.device, config.channels_last)
            labels = labels.to(self.device, non_blocking=True)
            final = i == config.accumulate - 1
            with nullcontext() if final or self.model is self.task else self.model.no_sync():
                with torch.autocast(self.device.type, torch.bfloat16, enabled=config.amp):
                    losses: Losses = self.model(images, labels)
                values = torch.stack([term.detach() for term in losses.terms.values()]).tolist()
                terms = dict(zip(losses.terms, values, strict=True))
                _require_finite(terms)
                if diagnose and final:
                    watched = {name: value.tolist() for name, value in self.task.diagnose(losses).items()}
                (losses.total * (len(part) / len(batch))).backward()
            for name, value in terms.items():
                self.sums[name] += value * len(part)
            hits = torch.stack([correct(logits, labels) for logits in losses.logits.values()]).tolist()
            for role, hit in zip(losses.logits, distributed.global_sum(hits), strict=True):
                self.sums[f"{role}_train_accuracy"] += hit
        if config.clip is not None:
            rated = {m.weight for m in self.task.modules() if isinstance(m, AdaptiveRateLayer)}
            nn.utils.clip_grad_norm_([p for p in self.task.parameters() if p not in rated], config.clip)
        self.optimizer.step()
        if self.average is not None:
            self.average.update_parameters(self.task.networks[self.role])
        return watched

    def _answer(self, stop: StopRequest) -> None:
        """Between steps: saves a checkpoint when it is time, or when asked to stop, and then leaves."""
        signum = stop.agreed()
        due = time.monotonic() - self.saved_at > 60 * self.config.checkpoint_minutes
        if self.step and (signum or due):
            self._save()
        if signum:
            raise Interrupted(signum, f"{self.epoch} epochs and {self.step} steps are saved in {self.folder}")

    def _save(self) -> None:
        self.saved_at = time.monotonic()
        if not self.writes:
            return
        progress = {"epoch": self.epoch, "step": self.step, "sums": dict(self.sums)}
        parts = {name: part.state_dict() for name, part in self._parts().items()}
        log = {"log": self.log.rows, "layers": self.log.layers}
        facts = {"config": asdict(self.config), "data": self.data.facts()}
        save_checkpoint(self.folder / "checkpoint.pt", {**facts, **progress, **log, **parts})
        self.log.write()

    def _parts(self) -> dict[str, Any]:
        """What has a state_dict."""
        parts = {"task": self.task, "optimizer": self.optimizer}
        return parts if self.average is None else parts | {"average": self.average}

    def _tested(self) -> dict[str, nn.Module]:
        """The networks that are tested and saved, by name."""
        networks = dict(self.task.networks)
        return networks if self.average is None else networks | {f"{self.role}_ema": self.average.module}

    def _seed(self, step: int) -> None:
        """Makes random numbers (dropout, say) a function of seed, epoch, step and process."""
        entropy = np.random.SeedSequence([self.config.seed, self.epoch, step + 1, distributed.rank()])
        torch.manual_seed(int(entropy.generate_state(1)[0]))

    def _show(self, bar: tqdm) -> None:
        row = self.log.rows[-1]
        accuracies = {name: f"{100 * row[f'{name}_test_accuracy']:.2f} %" for name in self._tested()}
        bar.set_postfix(epoch=row["epoch"], **accuracies)
        if bar.disable and self.writes:  # not a terminal: a line an epoch in place of the bar
            shown = ", ".join(f"{name} {accuracy}" for name, accuracy in accuracies.items())
            kind = "validation" if self.data.held_out else "test"
            speed = f"{row['images_per_second']:.0f} img/s"
            print(f"{self.config.method}: epoch {row['epoch']}: {kind} accuracy {shown}, {speed}", flush=True)

    def _summary(self) -> dict[str, Any]:
        """The facts that a table of results needs; the accuracies are those of the last epoch, not the best."""
        config, rows = self.config, self.log.rows
        return {
            "dataset": self.data.name,
            "network": config.arch,
            "method": config.method,
            "seed": config.seed,
            "epochs": config.epochs,
            "train_images": len(self.data.train),
            "test_images": len(self.data.test),
            "test_is_validation": self.data.held_out,
            **{name: value for name, value in rows[-1].items() if name.endswith("_accuracy")},
            "images_per_second": round(sum(row["images_per_second"] for row in rows) / len(rows), 1),
            "hours": round(sum(row["seconds"] for row in rows) / 3600, 4),
            "threads": config.threads,
            "processes": distributed.world_size(),
            "torch": torch.__version__,
            "adderops": adderops.__version__,
            "command": config.command(),
        }


def _require_finite(losses: dict[str, float]) -> None:
    if not all(map(math.isfinite, losses.values())):
        described = ", ".join(f"{name} {value:.4g}" for name, value in losses.items())
        raise FloatingPointError(f"loss is not finite: {described}")
