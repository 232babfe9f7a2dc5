"""cuDNN's fastest plan for a convolution, found by trying all of them (`nvidia-cudnn-frontend`, where installed).

Written against its 1.x Python interface; it needs a GPU, and every result is verified like any other rival's.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .devices import Device
from .shapes import Layer

__all__ = ["best_plan", "missing"]

TRIALS = 3
WORKSPACE_BYTES = 1 << 30


def missing(layer: Layer, direction: str, layout: str, device: Device) -> str:
    """Why there is no plan to be had; empty where there is."""
    if device.kind != "cuda" or device.torch_device.type != "cuda":
        return "cudnn needs a GPU"
    if importlib.util.find_spec("cudnn") is None:
        return "nvidia-cudnn-frontend is not installed"
    if layer.op != "conv2d" or direction == "full":
        return "cudnn: single convolutions only"
    if layer.args["bias"] and direction == "forward":
        return "cudnn: convolutions without bias only"
    return "" if layout == "channels_last" else "cudnn: channels_last only"


def best_plan(layer: Layer, direction: str, operands: list[Tensor], dtype: str) -> Callable[[], Tensor]:
    """The call of the fastest plan. operands: x, w, dy; strict float32 takes no plan on tensor cores."""
    import cudnn

    handle = cudnn.create_handle()
    types = {torch.float32: "FLOAT", torch.bfloat16: "BFLOAT16", torch.float16: "HALF"}
    graph = cudnn.pygraph(
        handle=handle,
        io_data_type=getattr(cudnn.data_type, types[operands[0].dtype]),
        intermediate_data_type=cudnn.data_type.FLOAT,
        compute_data_type=cudnn.data_type.FLOAT,
    )
    bindings, out = _describe(graph, layer, direction, operands)
    graph.validate()
    graph.build_operation_graph()
    graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.B])
    if dtype == "float32":
        notes = cudnn.numerical_note
        graph.deselect_numeric_notes([notes.TENSOR_CORE, notes.DOWN_CONVERT_INPUTS])
    graph.deselect_workspace_greater_than(WORKSPACE_BYTES)
    graph.check_support()
    graph.build_plans(cudnn.build_plan_policy.ALL)
    plans = [_plan(graph, i, bindings, out, handle) for i in range(graph.get_execution_plan_count())]
    timed = [(seconds, plan) for plan in plans if (seconds := _seconds(plan)) is not None]
    if not timed:
        raise RuntimeError(f"cudnn: no plan runs {direction} of {layer}")
    return min(timed, key=lambda pair: pair[0])[1]


def _describe(
    graph: Any, layer: Layer, direction: str, operands: list[Tensor]
) -> tuple[dict[Any, Tensor], Tensor]:
    """The graph's one node; which memory each of its tensors is, and the result's."""
    x, w, dy = operands
    pairs = {name: [layer.args[name]] * 2 for name in ("padding", "stride")}
    geometry = {**pairs, "dilation": [1, 1]}
    inputs, like = {"forward": ((x, w), dy), "dgrad": ((dy, w), x), "wgrad": ((x, dy), w)}[direction]
    first, second = (graph.tensor_like(t) for t in inputs)
    if direction == "forward":
        node = graph.conv_fprop(image=first, weight=second, **geometry)
    elif direction == "dgrad":
        node = graph.conv_dgrad(loss=first, filter=second, **geometry)
    else:
        node = graph.conv_wgrad(image=first, loss=second, **geometry)
    out = torch.empty_like(like)
    node.set_output(True).set_dim(list(out.shape)).set_stride(list(out.stride()))
    return {first: inputs[0], second: inputs[1], node: out}, out


def _plan(graph: Any, index: int, bindings: dict, out: Tensor, handle: Any) -> Callable[[], Tensor]:
    size = max(1, graph.get_workspace_size_plan_at_index(index))
    workspace = torch.empty(size, dtype=torch.uint8, device=out.device)

    def run() -> Tensor:
        import cudnn

        cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream().cuda_stream)
        graph.execute_plan_at_index(bindings, workspace, index, handle=handle)
        return out

    return run


def _seconds(plan: Callable[[], Tensor]) -> float | None:
    """How long a few runs take; None for a plan that was deselected or does not run."""
    try:
        plan()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(TRIALS):
            plan()
        end.record()
        end.synchronize()
    except RuntimeError:
        return None
    return begin.elapsed_time(end)
