"""The log of a run: rows from its checkpoint as CSV files and, with --tensorboard, as TensorBoard events."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from adderops.distill.checkpoint import write_csv

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class Log:
    """log.csv, one row per epoch, and layers.csv, one row per epoch and matched layer.

    Both files are rewritten from the rows each time, so that a resumed run has each row once.

    Args:
        folder: of the files.
        tensorboard: write TensorBoard events, too.

    Raises:
        ModuleNotFoundError: TensorBoard is not installed.
    """

    def __init__(self, folder: Path, tensorboard: bool = False) -> None:
        self.folder = folder
        self._board: type[SummaryWriter] | None = None
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter as Board
            except ModuleNotFoundError as missing:
                raise ModuleNotFoundError(
                    "--tensorboard needs tensorboard: install the extra `adderops[distill]`"
                ) from missing
            self._board = Board
        self._writer: SummaryWriter | None = None

    def show(self, row: dict[str, Any], layers: list[dict[str, Any]]) -> None:
        """Gives the rows of an epoch to TensorBoard, if it was asked for."""
        if self._board is None:
            return
        # what a killed run wrote after its last checkpoint is purged
        writer = self._writer = self._writer or self._board(self.folder / "tensorboard", purge_step=row["epoch"])
        for name, value in row.items():
            if name != "epoch" and value is not None:
                writer.add_scalar(name, value, row["epoch"])
        for of_layer in layers:
            for name, value in of_layer.items():
                if name not in ("epoch", "layer"):
                    writer.add_scalar(f"{name}/{of_layer['layer']}", value, row["epoch"])
        writer.flush()

    def write(self, rows: list[dict[str, Any]], layers: list[dict[str, Any]]) -> None:
        """Writes the rows of all epochs so far."""
        write_csv(self.folder / "log.csv", rows)
        if layers:
            write_csv(self.folder / "layers.csv", layers)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
