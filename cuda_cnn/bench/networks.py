"""Whole networks: inference, and a training step (forward, loss, backward), in every form, with peak memory.

The loss is the mean square of the outputs and dropout is switched off, so that all forms compute the same numbers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from ..models.registry import create_model
from . import report
from .cases import UnavailableError, WrongResultError
from .devices import Device
from .forms import FORMS, build, outputs_of
from .layer_times import profile_step
from .results import Results, key
from .run import Settings, StoppedError
from .settings import LAYOUTS, TOLERANCE, check_equal, dtype_of, precision
from .shapes import input_size
from .stats import ratio, spread
from .timing import Call, interleave

__all__ = ["network", "plan", "steps", "step_of", "table"]

PASSES = ("infer", "train")
# A form may be as far from float64 as this, or as so many times torch's own distance: deep networks amplify rounding.
TIMES_TORCH = 4.0


def plan(models: tuple[str, ...], settings: Settings, device: Device) -> list[dict]:
    wanted = [p for p in PASSES if p in settings.passes] or list(PASSES)
    for dtype in settings.dtypes:
        check_equal(dtype, device.kind)
    return [
        {
            "model": name,
            "pass": direction,
            "dtype": dtype,
            "layout": layout,
            "batch": settings.batch,
            "input": list(input_size(name)),
            "threads": torch.get_num_threads(),
        }
        for name in models
        for dtype in settings.dtypes
        for layout in settings.layouts
        for direction in wanted
    ]


def steps(
    models: tuple[str, ...], settings: Settings, device: Device, results: Results, deadline: float
) -> tuple[int, Iterator[dict]]:
    """How many rows there are to come, and their generator."""
    items = [row for row in plan(models, settings, device) if key(row) not in results.keys("networks")]

    def measured() -> Iterator[dict]:
        for row in items:
            if time.monotonic() > deadline:
                raise StoppedError
            with precision(row["dtype"]), device.context():
                row.update(network(row, settings, device))
            results.add("networks", row)
            yield {"line": "  ".join(_cells(row))}

    return len(items), measured()


def network(row: dict, settings: Settings, device: Device) -> dict:
    """Times, peak memory and error of each form; × is the time of eager torch over the form's."""
    training = row["pass"] == "train"
    torch.manual_seed(0)
    model = create_model(row["model"]).train(training)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model = model.to(device.torch_device, memory_format=LAYOUTS[row["layout"]])
    x = torch.randn(row["batch"], *row["input"], generator=torch.Generator().manual_seed(1))
    x = x.to(device.torch_device).contiguous(memory_format=LAYOUTS[row["layout"]])
    exact = _answer(build("torch", model.double(), training), x.double(), training)
    model, x = model.to(dtype_of(row["dtype"])), x.to(dtype_of(row["dtype"]))
    found: dict = {"times": {}, "ratios": {}, "absent": {}, "wrong": {}}
    nets: dict[str, nn.Module] = {}
    runs: dict[str, Callable[[], object]] = {}
    errors: dict[str, float] = {}
    for form in sorted(settings.forms, key=lambda form: form != "torch"):  # whose error bounds the others'
        try:
            net = build(form, model, training, device.kind)
            errors[form] = _distance(_answer(net, x, training), exact)
            _check(row, form, errors)
            nets[form], runs[form] = net, step_of(net, x, training)
        except UnavailableError as reason:
            found["absent"][form] = str(reason)
        except WrongResultError as reason:
            found["wrong"][form] = str(reason)
    clock = device.clock("e2e")
    calls = {form: Call(run) for form, run in runs.items()}
    times = interleave(calls, settings.seconds * len(calls), clock, settings.rounds)
    for form, run in runs.items():
        middle = spread(times[form])
        curve = device.memory(run)
        found["times"][form] = {
            "seconds": list(middle[:3]),
            "rounds": middle.count,
            "error": errors[form],
            "memory": max((held for _, held in curve), default=0),
            "curve": _thinned(curve),
            "by_kind": _by_kind(nets[form], form, run, device),
        }
    if "torch" in times:
        found["ratios"] = {
            form: list(ratio(times[form], times["torch"])) for form in times if form != "torch"
        }
    return found


def step_of(net: Callable[[Tensor], object], x: Tensor, training: bool) -> Callable[[], object]:
    """One inference, or one training step without the optimiser."""
    if not training:

        def infer() -> object:
            with torch.no_grad():
                return net(x)

        return infer

    def train() -> None:
        for parameter in net.parameters():
            parameter.grad = None
        _loss(net(x)).backward()

    return train


def _loss(y: object) -> Tensor:
    return sum(
        t.float().square().mean() if t.dtype != torch.float64 else t.square().mean() for t in outputs_of(y)
    )


def _answer(net, x: Tensor, training: bool) -> list[Tensor]:
    """The outputs; in training the gradients of all parameters too, end to end. Running statistics stay as they are:
    each form has its own."""
    if not training:
        with torch.no_grad():
            return outputs_of(net(x))
    y = net(x)
    for parameter in net.parameters():
        parameter.grad = None
    _loss(y).backward()
    gradients = [p.grad.flatten() for p in net.parameters() if p.grad is not None]
    return [t.detach() for t in outputs_of(y)] + [torch.cat(gradients)]


def _distance(found: list[Tensor], exact: list[Tensor]) -> float:
    """|found − exact| over |exact|, Euclidean, the worst of the tensors."""
    return max(
        ((f.double() - e).norm() / e.norm().clamp(min=1e-30)).item()
        for f, e in zip(found, exact, strict=True)
    )


def _check(row: dict, form: str, errors: dict[str, float]) -> None:
    limit = max(TOLERANCE[row["dtype"]], TIMES_TORCH * errors.get("torch", 0.0))
    if not errors[form] <= limit:
        raise WrongResultError(
            f"{row['model']} {row['pass']} as {form}: distance {errors[form]:.1e} from float64, "
            f"expected at most {limit:.1e}"
        )


def _by_kind(net: nn.Module, form: str, run: Callable[[], object], device: Device) -> dict[str, float]:
    """Seconds by kind of layer. Hooks would undo a fused network, and a compiled one has none: kind of operator."""
    layered = net if form in ("torch", "cuda_cnn") else None
    return profile_step(layered, run, 2, cuda=device.torch_device.type == "cuda").by_kind()


def _thinned(curve: list[tuple[float, int]], points: int = 120) -> list[list[float]]:
    """At most so many points of (second, bytes), the highest of each stretch."""
    stride = max(1, len(curve) // points)
    stretches = (curve[i : i + stride] for i in range(0, len(curve), stride))
    return [[round(when, 6), held] for when, held in (max(s, key=lambda p: p[1]) for s in stretches)]


def _cells(row: dict) -> tuple[str, ...]:
    cells = [row["model"], row["pass"], row["dtype"]]
    for form in dict.fromkeys((*FORMS, *row["times"])):
        if form in row["times"]:
            times = row["times"][form]
            ratios = row["ratios"].get(form)
            against = f" {ratios[0]:.2f}× ({ratios[3]:.2f}–{ratios[4]:.2f})" if ratios else ""
            cells.append(f"{report.duration(times['seconds'][0])}{against}, {report.size(times['memory'])}")
        elif form in row["absent"]:
            cells.append("not available")
        else:
            cells.append("WRONG, not timed" if form in row["wrong"] else "")
    return tuple(cells)


def table(rows: list[dict]) -> str:
    """Times, × eager torch with the interval of the median, peak memory above what was held before the step."""
    forms = dict.fromkeys((*FORMS, *(form for row in rows for form in row["times"])))
    lines = [(*cells, *[""] * (3 + len(forms) - len(cells))) for cells in map(_cells, rows)]
    text = report.plain(("network", "pass", "dtype", *forms), lines)
    reasons = {**{k: v for row in rows for k, v in {**row["absent"], **row["wrong"]}.items()}}
    return "\n".join([text, *(f"{form}: {reason}" for form, reason in reasons.items())])
