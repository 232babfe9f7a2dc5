"""Progress of a training run in the terminal: a bar with loss and accuracy, and a line for each epoch."""

from __future__ import annotations

from ..terminal import progress_bar

__all__ = ["Progress"]


class Progress:
    """A rich progress bar where rich is installed and the output is a terminal, plain lines elsewhere."""

    def __init__(self, silent: bool = False):
        self.silent, self.bar, self.task = silent, None, None

    def __enter__(self) -> Progress:
        if not self.silent:
            self.bar = progress_bar(_columns, transient=True)
        if self.bar:
            self.bar.start()
        return self

    def __exit__(self, *exception) -> None:
        if self.bar:
            self.bar.stop()

    def start(self, epoch: int, epochs: int, steps: int, done: int) -> None:
        self.epochs = epochs
        if self.bar:
            total = {"total": epochs * steps, "completed": epoch * steps + done}
            if self.task is None:
                self.task = self.bar.add_task("train", loss=float("nan"), accuracy=0.0, **total)
            self.bar.update(self.task, description=f"epoch {epoch + 1}/{epochs}", **total)

    def step(self, loss: float, accuracy: float) -> None:
        if self.bar:
            self.bar.update(self.task, advance=1, loss=loss, accuracy=accuracy)

    def end_epoch(self, row: dict) -> None:
        line = (
            f"epoch {row['epoch']:3d}/{self.epochs}  loss {row['train_loss']:8.4f}  "
            f"train {row['train_accuracy']:7.2%}  test {row['test_accuracy']:7.2%}"
        )
        if self.bar:
            self.bar.console.print(line, highlight=False)
        elif not self.silent:
            print(line, flush=True)


def _columns(rich) -> tuple:
    counts = rich.TextColumn("loss {task.fields[loss]:.4f}  accuracy {task.fields[accuracy]:.2%}")
    return rich.TextColumn("{task.description}"), rich.BarColumn(), counts, rich.TimeRemainingColumn()
