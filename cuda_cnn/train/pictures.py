"""Pictures of a trained network, as PNG files: curves, confusion, filters, feature maps, what F6 draws."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from ..models.rbf import DRAWING_SHAPE
from .data import Data
from .evaluation import Evaluation

__all__ = ["confusion", "curves", "f6_drawings", "feature_maps", "filters", "layer_outputs", "worst"]

DOTS_PER_INCH = 120
MOST_WRITTEN_OUT = 30  # classes of a confusion matrix that has room for names and counts


def curves(history: list[dict], path: str | Path) -> Path:
    """Loss, and accuracy in training and in the test, over the epochs."""
    figure = _figure(9, 3.4)
    loss, accuracy = figure.subplots(1, 2)
    epochs = [row["epoch"] for row in history]
    loss.plot(epochs, [row["train_loss"] for row in history], color="tab:blue")
    loss.set(xlabel="epoch", ylabel="training loss", yscale="log")
    for key, label, colour in (
        ("train_accuracy", "training", "tab:blue"),
        ("test_accuracy", "test", "tab:orange"),
    ):
        accuracy.plot(epochs, [100 * row[key] for row in history], label=label, color=colour)
    accuracy.set(xlabel="epoch", ylabel="accuracy, %")
    accuracy.legend()
    for axes in (loss, accuracy):
        axes.grid(alpha=0.3)
    return _save(figure, path)


def confusion(result: Evaluation, classes: list[str], path: str | Path) -> Path:
    """How often each class (row) was taken for each other one (column)."""
    counts = result.confusion()
    figure = _figure(5, 4.6)
    axes = figure.subplots()
    shades = counts / counts.sum(1, keepdim=True).clamp(min=1)
    axes.imshow(shades.numpy(), cmap="Blues", vmin=0, vmax=1)
    written = counts.nonzero().tolist() if len(classes) <= MOST_WRITTEN_OUT else []
    for row, column in written:
        colour = "white" if shades[row, column] > 0.5 else "black"
        axes.text(column, row, int(counts[row, column]), ha="center", va="center", color=colour, fontsize=8)
    if len(classes) <= MOST_WRITTEN_OUT:
        axes.set_xticks(range(len(classes)), classes, rotation=90 if max(map(len, classes)) > 2 else 0)
        axes.set_yticks(range(len(classes)), classes)
    axes.set(xlabel="predicted", ylabel="written", title=f"test accuracy {result.accuracy:.2%}")
    return _save(figure, path)


def worst(result: Evaluation, data: Data, path: str | Path, count: int = 20, columns: int = 10) -> Path:
    """The test pictures that are most clearly mistaken, each with the class it was taken for and its own."""
    indices = result.worst(count)
    rows, titles = [], []
    for i in indices:
        taken, right = int(result.scores[i].argmax()), int(result.labels[i])
        rows.append((_shown(data.test[i][0]), "gray_r", None, None))
        titles.append(f"{data.classes[taken]}, not {data.classes[right]}")
    cut = range(0, max(len(rows), 1), columns)
    figure = _grid([rows[i : i + columns] for i in cut], "" if rows else "no mistake")
    for axes, title in zip((a for a in figure.axes if a.images), titles, strict=True):
        axes.set_title(title, fontsize=7)
    return _save(figure, path)


def _shown(image: Tensor) -> Tensor:
    """A picture (C, H, W) as imshow takes it: H×W, or H×W×3 with its levels stretched to 0 … 1."""
    image = image.detach().cpu().float()
    if len(image) != 3:
        return image[0]
    low, high = image.amin(), image.amax()
    return ((image - low) / (high - low).clamp(min=1e-6)).permute(1, 2, 0)


def filters(weight: Tensor, path: str | Path, title: str = "") -> Path:
    """The filters of a convolution, (K, C, R, S): a row for each input map up to three, a column a filter."""
    weight = weight.detach().cpu().float()[:, :3]
    limit = weight.abs().max().item() or 1.0
    grid = [[(f[c], "gray_r", -limit, limit) for f in weight] for c in range(weight.size(1))]
    return _save(_grid(grid, title), path)


def feature_maps(
    model: nn.Module, image: Tensor, layers: list[str], path: str | Path, columns: int = 16
) -> Path:
    """The input picture and the first maps of each named layer; one row a layer. image: (1, C, H, W)."""
    rows = [[(_shown(image[0]), "gray_r", None, None)]]
    for maps in layer_outputs(model, image, layers):
        if maps.dim() != 4:
            raise ValueError(
                f"a layer with maps (N, C, H, W) is needed, got an output of shape {list(maps.shape)}"
            )
        rows.append([(m.cpu(), "gray_r", None, None) for m in maps[0][:columns]])
    return _save(_grid(rows, "", labels=["input", *layers]), path)


def f6_drawings(model: nn.Module, data: Data, path: str | Path) -> Path:
    """For each class: a test picture, what the network draws for it on F6, and the target."""
    model.eval()
    device = next(model.parameters()).device
    images = torch.cat([first_of_class(data, k) for k in range(len(data.classes))])
    with torch.no_grad():
        drawn = model.forward_f6(images.to(device)).cpu()
    rows = [
        [(image[0], "gray_r", None, None) for image in images],
        [(d.reshape(DRAWING_SHAPE), "gray_r", -1, 1) for d in drawn],
        [(b.cpu().reshape(DRAWING_SHAPE), "gray_r", -1, 1) for b in model.rbf.bitmaps],
    ]
    return _save(_grid(rows, "", labels=["written", "drawn on F6", "target"]), path)


def first_of_class(data: Data, index: int) -> Tensor:
    """(1, C, H, W): the first test picture of a class. Raises ValueError where the test has none."""
    for image, label in data.test:
        if int(label) == index:
            return image[None]
    raise ValueError(f"{data.name}: no test picture of class {data.classes[index]!r}")


@torch.no_grad()
def layer_outputs(model: nn.Module, image: Tensor, layers: list[str]) -> list[Tensor]:
    """What each named layer gives for `image`. Raises ValueError for a layer that is not there."""
    outputs: dict[str, Tensor] = {}
    known = dict(model.named_modules())
    for name in layers:
        if name not in known:
            raise ValueError(f"no layer {name!r}; there are {', '.join(filter(None, known))}")

    def keep(name: str, output: Tensor) -> None:
        outputs[name] = output

    hooks = [known[n].register_forward_hook(lambda m, i, output, n=n: keep(n, output)) for n in layers]
    try:
        model.eval()
        model(image.to(next(model.parameters()).device))
    finally:
        for hook in hooks:
            hook.remove()
    return [outputs[name] for name in layers]


def _grid(rows: list[list[tuple]], title: str, labels: list[str] | None = None):
    """Small pictures, (values, colour map, least, most) each, in rows."""
    columns = max(1, *map(len, rows))
    figure = _figure(0.75 * columns + 1, 0.95 * len(rows) + 0.3)
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for r in range(len(rows)):
        for c in range(columns):
            axes[r][c].set_xticks([])
            axes[r][c].set_yticks([])
            axes[r][c].set_frame_on(False)
        for c, (values, colours, least, most) in enumerate(rows[r]):
            axes[r][c].imshow(values.numpy(), cmap=colours, vmin=least, vmax=most)
        if labels:
            axes[r][0].set_ylabel(labels[r], rotation=0, ha="right", va="center")
    if title:
        figure.suptitle(title, fontsize=9)
    return figure


def _figure(width: float, height: float):
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install 'cuda-cnn[train]'") from error
    return Figure(figsize=(width, height), layout="constrained")


def _save(figure, path: str | Path) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DOTS_PER_INCH)
    return path
