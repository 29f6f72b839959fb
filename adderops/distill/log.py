"""The log of a run: rows that are part of its checkpoint, as CSV files and, on request, for TensorBoard."""

from pathlib import Path
from typing import Any

from adderops.distill.checkpoint import write_csv


class Log:
    """Rows an epoch (log.csv) and rows an epoch and matched layer (layers.csv).

    The files are written again from the rows, so that a continued run has each of them once.

    Attributes:
        rows, layers: of the epochs done, as the training loop keeps them.
    """

    def __init__(self, folder: Path, tensorboard: bool = False) -> None:
        self.folder = folder
        self.rows: list[dict[str, Any]] = []
        self.layers: list[dict[str, Any]] = []
        self._board = None
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ModuleNotFoundError as missing:
                raise ModuleNotFoundError(
                    "--tensorboard needs tensorboard: install the extra `adderops[distill]`"
                ) from missing
            self._board = SummaryWriter
        self._writer = None

    def show(self, row: dict[str, Any], layers: list[dict[str, Any]]) -> None:
        """Gives the rows of an epoch to TensorBoard, if it was asked for."""
        if self._board is not None:
            # what a run that was killed had written beyond its checkpoint is purged
            self._writer = self._writer or self._board(self.folder / "tensorboard", purge_step=row["epoch"])
            for name, value in row.items():
                if name != "epoch" and value is not None:
                    self._writer.add_scalar(name, value, row["epoch"])
            for of_layer in layers:
                for name, value in of_layer.items():
                    if name not in ("epoch", "layer"):
                        self._writer.add_scalar(f"{name}/{of_layer['layer']}", value, row["epoch"])
            self._writer.flush()

    def write(self) -> None:
        write_csv(self.folder / "log.csv", self.rows)
        if self.layers:
            write_csv(self.folder / "layers.csv", self.layers)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
