"""Distillation from Python, with networks, data and optimizer of your own."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import Dataset

from adderops.distill.batches import LoaderBatches
from adderops.distill.build import MovingAverage, sgd
from adderops.distill.checkpoint import require_same_configuration
from adderops.distill.config import Options
from adderops.distill.evaluate import evaluate
from adderops.distill.interrupt import StopRequest, stop_request
from adderops.distill.lock import own
from adderops.distill.loop import Loop
from adderops.distill.methods import Distillation, LabelLoss, PKKDTask
from adderops.distill.options import check_values
from adderops.distill.schedule import make_schedule
from adderops.distill.trainer import Callback, Run

DEFAULT_OPTIMIZER = partial(sgd, lr=0.1, weight_decay=5e-4, nesterov=True)


class Distiller:
    """Trains a student by kernel based knowledge distillation (PKKD) from a teacher of any architecture.

    `PKKDTask` has the losses.  The teacher is trained along with the student, on the labels alone, or frozen.
    Adder layers take steps of a fixed size with every optimizer, see `adderops.optim`.

    Args:
        teacher, student: modules that give logits (N, classes) for images.
        layers: convolutions to match: {student layer: teacher layer}, or names that both networks have.  By default
            all between the first convolution and the classifier, by relative depth.  Where the two layers of a pair
            differ in channels, trained 1x1 maps lead to a common width; where they differ in height or width, the
            larger output is averaged over areas.
        features: what matches the layers: 'none', '1x1', 'kernel' or 'kernel+1x1'.
        alpha: weight of the cross entropy with the labels in the student's loss.
        beta: weight of L_mid, the distillation loss of the matched layers.
        temperature: of the softmax of both logits; None: the teacher's logits are not imitated.
        frozen: the teacher is not trained and stays in evaluation mode.
        optimizer: an optimizer that holds the parameters to train (those of the matching are added to it), or a
            function of a list of parameter groups that returns one.  By default SGD: lr 0.1, Nesterov momentum 0.9,
            weight decay 5e-4.
        schedule: a schedule of that optimizer, or a function of the optimizer that returns one.  By default each `fit`
            follows a cosine to 0.
        schedule_per_step: the schedule advances after each step instead of each epoch.
        label_smoothing: share of each label that is spread evenly over all classes.
        class_weights: (classes), in the cross entropy with the labels.
        mix: changes (images, labels) of a batch, for example `torchvision.transforms.v2.MixUp(num_classes=10)`.
        accumulate: number of parts of a batch that go through the networks one after the other.
        clip: largest norm of the gradient of all parameters except adder weights.
        ema: decay per step of a moving average of the student: `average`.
        amp: 'bfloat16' or 'float16' (with a gradient scaler); None: float32.
        reestimate_batchnorm: number of training images on which BatchNorm statistics are re-estimated before each test,
            and four times as many at the end; 0: keep the running averages, which lag behind adder layers.
        device: where to train; by default the student's device.
        seed: of all random numbers.

    Attributes:
        task: the `PKKDTask`; `task.networks` has 'teacher' and 'student'.
        optimizer: the optimizer.
        average: the moving average of the student, or None.

    Raises:
        ValueError: layers that cannot be matched, an optimizer without the networks' parameters, or an argument out of
            range.

    Source: PKKD, arXiv 2009.13044.

    >>> from torch.utils.data import DataLoader, TensorDataset
    >>> from adderops.models import lenet5, resnet20
    >>> data = TensorDataset(torch.randn(8, 1, 32, 32), torch.arange(8))
    >>> distiller = Distiller(resnet20("cnn", in_channels=1), lenet5("adder"))
    >>> history = distiller.fit(DataLoader(data, batch_size=4, shuffle=True), epochs=2, quiet=True)
    >>> [row["epoch"] for row in history], len(history[0]) > 5
    ([1, 2], True)
    """

    def __init__(
        self,
        teacher: nn.Module,
        student: nn.Module,
        *,
        layers: Mapping[str, str] | Iterable[str] | None = None,
        features: str = "kernel+1x1",
        alpha: float = 1.0,
        beta: float = 0.1,
        temperature: float | None = 4.0,
        frozen: bool = False,
        optimizer: Optimizer | Callable[[list[dict[str, Any]]], Optimizer] = DEFAULT_OPTIMIZER,
        schedule: LRScheduler | Callable[[Optimizer], LRScheduler] | None = None,
        schedule_per_step: bool = False,
        label_smoothing: float = 0.0,
        class_weights: Tensor | None = None,
        mix: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
        accumulate: int = 1,
        clip: float | None = None,
        ema: float | None = None,
        amp: str | None = None,
        reestimate_batchnorm: int = 512,
        device: torch.device | str | None = None,
        seed: int = 0,
    ) -> None:
        settings: dict[str, Any] = {
            "features": features,
            "alpha": alpha,
            "beta": beta,
            "temperature": temperature,
            "label_smoothing": label_smoothing,
            "accumulate": accumulate,
            "clip": clip,
            "ema": ema,
            "amp": amp,
            "reestimate_batchnorm": reestimate_batchnorm,
            "seed": seed,
        }
        check_values(Options, "Distiller", settings)
        if isinstance(schedule, LRScheduler) and schedule.optimizer is not optimizer:
            raise ValueError("Distiller: schedule: expected one of the optimizer given, got one of another")
        self.device = torch.device(device) if device is not None else next(student.parameters()).device
        distillation = Distillation(
            teacher="frozen" if frozen else "progressive",
            features=features,
            logits=temperature is not None,
            alpha=alpha,
            beta=beta,
            temperature=temperature or Distillation.temperature,
        )
        label_loss = LabelLoss(label_smoothing, class_weights)
        with _random_numbers_kept(self.device):
            torch.manual_seed(seed)  # of the maps between layers of different widths
            self.task = PKKDTask(teacher, student, distillation, layers, label_loss).to(self.device)
        self.optimizer = self._prepare(optimizer)
        self.average = None
        if ema is not None:
            self.average = MovingAverage(student, ema)
        self._schedule, self._per_step, self._accumulate = schedule, schedule_per_step, accumulate
        self._loop: dict[str, Any] = {"average": self.average, "mix": mix}
        self._loop |= {name: settings[name] for name in ("clip", "amp", "reestimate_batchnorm", "seed")}
        self._identity = settings | {"frozen": frozen}

    def fit(
        self,
        loader: Iterable[tuple[Tensor, Tensor]],
        epochs: int,
        *,
        test: Iterable[tuple[Tensor, Tensor]] | None = None,
        test_every: int = 1,
        patience: int | None = None,
        folder: Path | str | None = None,
        checkpoint_minutes: float = 10.0,
        on_step: Callback | None = None,
        on_epoch: Callback | None = None,
        quiet: bool = False,
    ) -> list[dict[str, Any]]:
        """Trains the networks in-place and leaves them in evaluation mode.

        Where the folder holds a checkpoint of the same training, it resumes from there.

        Random numbers of torch, also those of the loader and its data set, depend on seed, epoch and step only, so a
        resumed training ends with the same bits as an uninterrupted one.  The global random state is left alone.

        Args:
            loader: (images, labels) to train on: a `DataLoader`, or anything else that can be iterated repeatedly.
            epochs: number of passes over it, including those before an interruption.
            test: (images, labels) to test on.
            test_every: test after every so many epochs, and after the last.
            patience: stop when the student's accuracy on `test` has not risen for so many epochs.
            folder: gets checkpoint.pt, log.csv and layers.csv once per epoch, student_best.pt, and at the end
                student.pt and teacher.pt, each written atomically; created if missing.
            checkpoint_minutes: minutes between checkpoints within an epoch.
            on_step, on_epoch: called with a `Progress` after each step and each epoch.
            quiet: show nothing.

        Returns:
            One row per epoch: losses, training and test accuracies, learning rate, seconds.

        Raises:
            ValueError: the folder holds another training or a damaged checkpoint, or a batch is not (images, labels).
            BlockingIOError: another process trains in the folder.
            FloatingPointError: a loss became infinite or NaN; the last checkpoint stays.
            Interrupted: SIGTERM or Ctrl-C where there is a folder; after a checkpoint.
        """
        if isinstance(loader, Dataset):
            raise ValueError("Distiller.fit: loader: expected batches, got a Dataset: put it into a DataLoader")
        given = {"epochs": epochs, "test_every": test_every, "patience": patience}
        check_values(Options, "Distiller.fit", given | {"checkpoint_minutes": checkpoint_minutes})
        if patience is not None and test is None:
            raise ValueError("Distiller.fit: patience: expected images to test on, got none")
        build = self._schedule or partial(make_schedule, epochs=epochs)
        schedule = build if isinstance(build, LRScheduler) else build(self.optimizer)
        loop = Loop(
            self.task,
            self.optimizer,
            schedule,
            LoaderBatches(loader, self._accumulate, self._loop["seed"]),
            epochs,
            test=test,
            test_every=test_every,
            patience=patience,
            device=self.device,
            per_step=self._per_step,
            **self._loop,
        )
        path = None if folder is None else Path(folder)
        run = Run(loop, path, checkpoint_minutes=checkpoint_minutes, quiet=quiet)
        identity = {"config": self._identity | {"epochs": epochs}}

        def check(state: dict[str, Any]) -> None:
            require_same_configuration(run.folder or Path(), _differences(identity["config"], state["config"]))

        # without a folder there is nothing to save, and Ctrl-C is the caller's
        owned: AbstractContextManager[Any] = nullcontext() if path is None else own(path)
        interrupts = nullcontext(StopRequest()) if path is None else stop_request()
        try:
            with owned, interrupts as stop, _random_numbers_kept(self.device):
                run.resume(check)
                if run.epochs(stop, identity, on_step, on_epoch):
                    loop.refresh_batchnorm(last=True)
                run.save_networks()
        finally:
            self.task.eval().release()
        return loop.rows

    def evaluate(self, loader: Iterable[tuple[Tensor, Tensor]]) -> dict[str, float]:
        """Returns loss and accuracy of each network on (images, labels), by name: `student_test_accuracy` and so on."""
        networks = dict(self.task.networks) | ({} if self.average is None else {"student_ema": self.average.module})
        return evaluate(networks, loader, self.device, amp=self._loop["amp"])

    def _prepare(self, optimizer: Optimizer | Callable[[list[dict[str, Any]]], Optimizer]) -> Optimizer:
        """Builds the optimizer, or adds the parameters of the matching to the given one."""
        match = self.task.match
        own = [p for p in match.parameters() if p.requires_grad] if match is not None else []
        trained = {
            role: [p for p in network.parameters() if p.requires_grad] for role, network in self.task.networks.items()
        }
        if not isinstance(optimizer, Optimizer):
            return optimizer([{"params": [*trained["teacher"], *trained["student"], *own]}])
        held = {p for group in optimizer.param_groups for p in group["params"]}
        for role, parameters in trained.items():
            if parameters and held.isdisjoint(parameters):
                remedy = ", or frozen=True" if role == "teacher" else ""
                raise ValueError(f"Distiller: optimizer: expected one with parameters of the {role}{remedy}, got none")
        if own and held.isdisjoint(own):
            optimizer.add_param_group({"params": own, "weight_decay": 0.0})
        return optimizer


def _random_numbers_kept(device: torch.device) -> Any:
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])


def _differences(own: dict[str, Any], other: Any) -> dict[str, tuple[Any, Any]]:
    other = other if isinstance(other, dict) else {}
    return {name: (other.get(name), value) for name, value in own.items() if other.get(name) != value}
