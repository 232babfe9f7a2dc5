"""A run's numbers over the epochs: log.csv, and TensorBoard's files."""

from __future__ import annotations

from pathlib import Path

from .checkpoint import write_atomic

__all__ = ["LOG_FILE", "TensorBoard", "write_csv"]

LOG_FILE = "log.csv"


def write_csv(folder: str | Path, history: list[dict]) -> None:
    """One line an epoch, under the names of the columns."""
    rows = [history[0].keys(), *(row.values() for row in history)] if history else []
    table = "".join(",".join(map(str, row)) + "\n" for row in rows)
    write_atomic(Path(folder) / LOG_FILE, lambda file: file.write(table.encode()))


class TensorBoard:
    """Writes each epoch's numbers for `tensorboard --logdir FOLDER`; from `epoch` on, what is there is replaced.

    Raises ImportError where tensorboard is not installed.
    """

    def __init__(self, folder: str | Path, epoch: int = 0):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError("--tensorboard needs tensorboard: pip install 'cuda-cnn[train]'") from error
        self.writer = SummaryWriter(str(folder), purge_step=epoch + 1)

    def __enter__(self) -> TensorBoard:
        return self

    def __exit__(self, *exception) -> None:
        self.writer.close()

    def __call__(self, row: dict) -> None:
        for name, value in row.items():
            if name != "epoch":
                self.writer.add_scalar(name, value, row["epoch"])
