"""The training loop, the same for every task: one optimizer step per batch, one row per epoch.  It touches no files."""

import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torch.optim.swa_utils import AveragedModel

from adderops.batchnorm import reestimate_batchnorm
from adderops.distill import distributed
from adderops.distill.batches import Batches, Part, seed_of
from adderops.distill.checkpoint import restore
from adderops.distill.data import ImageSet
from adderops.distill.evaluate import autocast, evaluate, to_device
from adderops.distill.graph import StepGraph
from adderops.distill.methods import Losses, Task
from adderops.distill.speed import Trajectory
from adderops.distill.sums import Sums, sums_of
from adderops.models import mark_adder_weights
from adderops.optim import AdaptiveRateLayer

# Before the last test, BatchNorm statistics are estimated on so many times more images: statistics of 512 images cost a
# converged network some tenths of a point, of 2048 images nothing (docs/distill.md).
LAST = 4


@dataclass
class Progress:
    """The state of a training after an optimizer step, for callbacks.

    Attributes:
        epoch: counted from 1.
        step: number of optimizer steps in this epoch so far.
        images: number of images in this step, over all processes.
        networks: by role.
        optimizer: of all networks.
        row: after the last step of an epoch, its row of the history; otherwise None.
        improved: names of the networks whose test accuracy in this epoch is their best so far.
        sums: of losses and hits, over the images of this step.
    """

    epoch: int
    step: int
    images: int
    networks: nn.ModuleDict
    optimizer: torch.optim.Optimizer
    sums: Sums
    row: dict[str, Any] | None = None
    improved: list[str] = field(default_factory=list)
    stopped: bool = False

    @cached_property
    def losses(self) -> dict[str, float]:
        """Means over the images of this step, by name; also the training accuracies.  Reading them waits for a GPU."""
        return {name: value / self.images for name, value in self.sums.read().items()}

    def stop(self) -> None:
        """Ends the training after this step."""
        self.stopped = True


@dataclass(eq=False)
class Loop:
    """Trains the networks of a task; iterating over it yields a `Progress` after each optimizer step.

    On a GPU a step waits for nothing: the losses stay there, and are read, and found to be finite or not, at the end of
    an epoch and before each checkpoint.  On the CPU they are checked in each step, before it changes a weight.

    `state_dict()`, called between two steps, is all that a loop built alike needs to continue with the same bits: every
    random number depends on seed, epoch, step and process only.

    Args:
        task: holds the networks and turns a batch into losses.
        optimizer: of the task's parameters.
        schedule: of the optimizer's learning rates.
        batches: to train on.
        epochs: number of epochs.
        test: images to test on; None: no tests.
        device: of the networks.
        per_step: the schedule advances after each step instead of each epoch.
        average: moving average of the main network.
        mix: changes (images, labels) of a batch, for example by mixup; its labels may be shares (N, classes).
        on_epoch_begin: called with the number of finished epochs before the first step of each epoch.
        seed, amp, clip, channels_last, workers, test_every, patience, reestimate_batchnorm, cuda_graph: the options of
            the same names, see `Options`.

    Raises:
        ValueError: `cuda_graph` where a step cannot be one.
        FloatingPointError: during iteration or in `require_finite`: a loss, a weight or a statistic became infinite or
            NaN.
    """

    task: Task
    optimizer: torch.optim.Optimizer
    schedule: LRScheduler
    batches: Batches
    epochs: int
    test: ImageSet | Iterable[tuple[Tensor, Tensor]] | None = None
    device: torch.device = torch.device("cpu")
    per_step: bool = False
    average: AveragedModel | None = None
    mix: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None
    on_epoch_begin: Callable[[int], None] | None = None
    seed: int = 0
    amp: str | None = None
    clip: float | None = None
    channels_last: bool = False
    workers: int = 0
    test_every: int = 1
    patience: int | None = None
    reestimate_batchnorm: int = 0
    cuda_graph: bool = False

    def __post_init__(self) -> None:
        self.epoch, self.step = 0, 0  # finished epochs, and steps of the next one
        self.sums = Sums.of({}, self.device)  # of losses and hits in this epoch
        self.images, self.seconds = 0, 0.0  # of this epoch
        self.rows: list[dict[str, Any]] = []  # of the finished epochs
        self.layers: list[dict[str, Any]] = []
        self.best: dict[str, dict[str, Any]] = {}  # accuracy and epoch by network
        self.trajectory = Trajectory(dict(self.task.networks), self.optimizer)
        self.graph: StepGraph | None = None
        if self.cuda_graph:
            if self.device.type != "cuda" or distributed.world_size() > 1:
                got = f"{distributed.world_size()} processes" if self.device.type == "cuda" else self.device.type
                raise ValueError(f"cuda_graph: expected one process that trains on a GPU, got {got}")
            self.graph = StepGraph(self._train_on, self.optimizer, self.device)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.amp == "float16")

    # --- state ---

    def state_dict(self) -> dict[str, Any]:
        sums = {**self.sums.read(), "images": self.images, "seconds": self.seconds} if self.step else {}
        progress = {"epoch": self.epoch, "step": self.step, "sums": sums}
        log = {"log": self.rows, "layers": self.layers, "best": self.best}
        return progress | log | {name: part.state_dict() for name, part in self._parts().items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from a `state_dict()`.

        Raises:
            ValueError, RuntimeError, KeyError: the state of other networks or of another optimizer.
        """
        for name, part in self._parts().items():
            if name in state:
                saved = state[name]
                # a checkpoint from before adder weights were marked
                restore(part, mark_adder_weights(saved, part) if isinstance(part, nn.Module) else saved)
        self.epoch, self.step, sums = state["epoch"], state["step"], dict(state["sums"])
        self.images, self.seconds = sums.pop("images", 0), sums.pop("seconds", 0.0)
        self.sums = Sums.of(sums, self.device)
        self.rows, self.layers, self.best = state["log"], state["layers"], state.get("best", {})
        if "trajectory" not in state:  # of an older version: it begins here, and the rows before have none
            self.rows = [{**row, **dict.fromkeys(self.trajectory.columns())} for row in self.rows]
        if "schedule" not in state:  # of an older version, which had none
            for _ in range(self.epoch - (not self.step)):
                self._move_schedule()

    def _parts(self) -> dict[str, Any]:
        """Returns all that has a state_dict."""
        parts: dict[str, Any] = {"task": self.task, "optimizer": self.optimizer, "schedule": self.schedule}
        parts |= {"trajectory": self.trajectory}
        if self.average is not None:
            parts["average"] = self.average
        if self.scaler.is_enabled():
            parts["scaler"] = self.scaler
        return parts

    @property
    def tested(self) -> dict[str, nn.Module]:
        """The networks that are tested and saved, by name."""
        networks: dict[str, nn.Module] = dict(self.task.networks)
        return networks if self.average is None else networks | {f"{self.task.main}_ema": self.average.module}

    @property
    def finished(self) -> bool:
        if self.epoch >= self.epochs:
            return True
        if self.patience is None or self.step or not self.best or self.rows[-1][f"{self.task.main}_test_loss"] is None:
            return False
        # of the main network or its average, whichever improved last
        return self.epoch - max(of_network["epoch"] for of_network in self.best.values()) >= self.patience

    # --- epochs ---

    def __iter__(self) -> Iterator[Progress]:
        model: nn.Module = self.task
        if distributed.world_size() > 1:
            ids = [self.device.index] if self.device.type == "cuda" else None
            model = DistributedDataParallel(self.task, device_ids=ids)
        while not self.finished:
            yield from self._epoch(model)

    def _epoch(self, model: nn.Module) -> Iterator[Progress]:
        """Trains for one epoch, or the rest of it, and tests."""
        self._begin_epoch()
        begin = time.perf_counter()
        for parts, last in self.batches.steps(self.epoch, self.step):
            torch.manual_seed(seed_of(self.seed, self.epoch, self.step + 1, distributed.rank()))
            sums, watched = self._step(model, parts, diagnose=last)
            images = sum(part.count for part in parts)
            self.sums += sums
            self.images += images
            self.step += 1
            progress = Progress(self.epoch + 1, self.step, images, self.task.networks, self.optimizer, sums)
            if last:
                self.require_finite()  # waits for the step, whose time counts
            self.seconds += time.perf_counter() - begin
            if last:
                progress.row, of_layers, progress.improved = self._end_epoch(watched)
                self.rows.append(progress.row)
                self.layers.extend(of_layers)
                self.epoch, self.step = self.epoch + 1, 0
                self.sums, self.images, self.seconds = Sums.of({}, self.device), 0, 0.0
            yield progress
            begin = time.perf_counter()

    def _begin_epoch(self) -> None:
        if self.step == 0:
            if self.epoch > 0 and not self.per_step:
                self._move_schedule()
            if self.on_epoch_begin is not None:
                torch.manual_seed(seed_of(self.seed, self.epoch, 0, distributed.rank()))
                self.on_epoch_begin(self.epoch)
        self.task.train()

    def _move_schedule(self) -> None:
        with warnings.catch_warnings():  # a resumed loop, or a scaler that skips its first step
            warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
            if isinstance(self.schedule, ReduceLROnPlateau):
                column = f"{self.task.main}_test_loss"
                values = [row[column] for row in self.rows if row.get(column) is not None]
                self.schedule.step(values[-1] if values else math.inf)
            else:
                self.schedule.step()

    def _step(self, model: nn.Module, parts: list[Part], diagnose: bool) -> tuple[Sums, dict[str, list[float]]]:
        """Makes one optimizer step; returns its sums and, if asked for, the last part's diagnosis."""
        watched: dict[str, list[float]] = {}
        on_device = map(self._on_device, parts)
        if self.graph is None or diagnose:
            with self.graph.rates() if self.graph is not None else nullcontext():
                sums, watched = self._train(model, on_device, len(parts), diagnose)
        else:
            [part] = on_device
            sums = self.graph(part.images, part.labels)
        if self.per_step:
            self._move_schedule()
        if self.average is not None:
            self.average.update_parameters(self.task.networks[self.task.main])
        return sums, watched

    def _on_device(self, part: Part) -> Part:
        images = to_device(part.images, self.device, self.channels_last)
        labels = part.labels.to(self.device, non_blocking=True)
        if self.mix is not None:
            images, labels = self.mix(images, labels)
        return replace(part, images=images, labels=labels)

    def _train(
        self, model: nn.Module, parts: Iterable[Part], count: int, diagnose: bool = False
    ) -> tuple[Sums, dict[str, list[float]]]:
        """Forward, losses, backward and optimizer of `count` parts; on a GPU only a diagnosis waits for it."""
        watched: dict[str, list[float]] = {}
        sums = Sums.of({}, self.device)
        self.optimizer.zero_grad()
        for i, part in enumerate(parts):
            final = i == count - 1
            # the processes exchange gradients once per step, in its last part
            with model.no_sync() if isinstance(model, DistributedDataParallel) and not final else nullcontext():
                with autocast(self.device, self.amp):
                    losses: Losses = model(part.images, part.labels)
                terms = torch.stack([term.detach() for term in losses.terms.values()])
                if self.device.type == "cpu":
                    require_finite(dict(zip(losses.terms, terms.tolist(), strict=True)))
                if diagnose and final:
                    watched = {name: value.tolist() for name, value in self.task.diagnose(losses).items()}
                self.scaler.scale(losses.total * part.share).backward()
            sums += sums_of(losses, terms, part.labels, part.count)
        self.scaler.unscale_(self.optimizer)
        if self.clip is not None:
            rated = {m.weight for m in self.task.modules() if isinstance(m, AdaptiveRateLayer)}
            nn.utils.clip_grad_norm_([p for p in self.task.parameters() if p not in rated], self.clip)
        with self.trajectory.step():
            self.scaler.step(self.optimizer)
        self.scaler.update()
        return sums, watched

    def _train_on(self, images: Tensor, labels: Tensor) -> Sums:
        """`_train` on a whole batch in one process."""
        return self._train(self.task, [Part(images, labels, len(images), 1.0)], 1)[0]

    def require_finite(self) -> None:
        """Raises FloatingPointError if a loss of this epoch was infinite or NaN, and waits for a GPU."""
        means = {name: value / self.images for name, value in self.sums.read().items()}
        require_finite({name: value for name, value in means.items() if not name.endswith("_accuracy")})

    def _end_epoch(self, watched: dict[str, list[float]]) -> tuple[dict[str, Any], list[dict[str, Any]], list[str]]:
        """Tests when due; returns the rows of epoch and layers, and the names of the networks at their best so far."""
        epoch, count = self.epoch + 1, self.batches.images or self.images
        means = {name: value / count for name, value in self.sums.read().items()}
        tested, improved = self._test(epoch)
        extremes = {
            f"{name}_{extreme.__name__}": extreme(watched[name])
            for name, extreme in self.task.extremes.items()
            if name in watched
        }
        row = {
            "epoch": epoch,
            "lr": self.optimizer.param_groups[0]["lr"],
            **means,
            **tested,
            **extremes,
            **self.trajectory.columns(),
            "images_per_second": count / self.seconds,
            "seconds": self.seconds,
        }
        layers = [
            {"epoch": epoch, "layer": name, **{key: values[i] for key, values in watched.items()}}
            for i, name in enumerate(self.task.layer_names if watched else [])
        ]
        return rounded(row), list(map(rounded, layers)), improved

    def _test(self, epoch: int) -> tuple[Mapping[str, float | None], list[str]]:
        """Tests when due; returns the columns, None where not due, and the networks at their best so far."""
        # a weight that became NaN in the last step of an epoch must not be saved
        for name, parameter in self.task.named_parameters():
            if not parameter.isfinite().all():
                raise FloatingPointError(f"weight is not finite: {name}")
        last = epoch == self.epochs
        due = last or epoch % self.test_every == 0
        if last or (due and self.test is not None):
            self.refresh_batchnorm(last)
        if self.test is None:
            return {}, []
        if not due:
            return dict.fromkeys(f"{name}_test_{what}" for name in self.tested for what in ("loss", "accuracy")), []
        tested = evaluate(
            self.tested,
            self.test,
            self.device,
            amp=self.amp,
            channels_last=self.channels_last,
            workers=self.workers,
        )
        require_finite({name: value for name, value in tested.items() if name.endswith("loss")})
        improved = []
        for name in self.tested:
            accuracy = tested[f"{name}_test_accuracy"]
            if name.startswith(self.task.main) and accuracy > self.best.get(name, {"accuracy": -1})["accuracy"]:
                self.best[name] = {"accuracy": accuracy, "epoch": epoch}
                improved.append(name)
        return tested, improved

    def refresh_batchnorm(self, last: bool = False) -> None:
        """Re-estimates the statistics of every BatchNorm in training on training images, the same on all processes.

        Args:
            last: before the last test, on `LAST` times as many images.
        """
        if not self.reestimate_batchnorm:
            return
        self.task.train()
        if self.average is not None:
            self.average.train()
        for network in self.tested.values():
            if not network.training:  # a frozen teacher
                continue
            batches = self.batches.calibration(self.reestimate_batchnorm * (LAST if last else 1))
            try:
                with distributed.alone(), autocast(self.device, self.amp):
                    reestimate_batchnorm(
                        network, (to_device(images, self.device, self.channels_last) for images in batches)
                    )
            except ValueError as error:
                raise FloatingPointError(f"statistic of BatchNorm is not finite: {error}") from error
            distributed.average_buffers(network)


def rounded(row: dict[str, Any]) -> dict[str, Any]:
    """Returns the row with numbers rounded to six digits."""
    return {name: float(f"{value:.6g}") if isinstance(value, float) else value for name, value in row.items()}


def require_finite(losses: Mapping[str, float]) -> None:
    """Raises FloatingPointError where a loss is infinite or NaN."""
    if not all(map(math.isfinite, losses.values())):
        described = ", ".join(f"{name} {value:.4g}" for name, value in losses.items())
        raise FloatingPointError(f"loss is not finite: {described}")
