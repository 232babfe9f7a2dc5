"""One step of training: what a batch of pictures does to a network, under a recipe's options."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils._pytree import tree_map

from ..models.registry import nearest
from .diagnose import NonFiniteError, first_non_finite
from .evaluation import scores
from .optimisation import make_loss, make_optimizer
from .recipes import Recipe
from .workers import Workers, synchronise_batch_norm

__all__ = ["Step"]

PRECISIONS = {"bfloat16": torch.bfloat16, "float16": torch.float16}


class Step:
    """step(images, labels, of_all): forward, loss, backward, the optimiser's step, the running average.

    model: the network as it is trained. trained: as it is to be used, the running average of its weights where
    the recipe asks for one. The network's `device` and layout are set here.
    """

    def __init__(self, recipe: Recipe, model: nn.Module, device: torch.device, workers: Workers):
        self.recipe, self.device, self.workers = recipe, device, workers
        self.layout = torch.channels_last if recipe.channels_last else torch.preserve_format
        if not hasattr(model, "devices"):  # AlexNet's towers have their own
            model.to(device)
        self.model = model.to(memory_format=self.layout)
        self.loss = make_loss(recipe, model)
        self.optimizer = make_optimizer(model.parameters(), recipe)
        self.scaler = torch.amp.GradScaler(device.type, enabled=recipe.precision == "float16")
        self.average = None
        if recipe.average:
            update = get_ema_multi_avg_fn(recipe.average)
            self.average = AveragedModel(model, multi_avg_fn=update, use_buffers=True)
        if recipe.compile:
            known = torch.compiler.list_backends(exclude_tags=())
            if recipe.compile not in known:
                raise ValueError(
                    f"compile: unknown backend {recipe.compile!r}{nearest(recipe.compile, known)}"
                )
            model.compile(backend=recipe.compile)
        self.network = DistributedDataParallel(model) if workers.count > 1 else model
        if recipe.sync_batch_norm:  # afterwards: it refuses torch's class on a CPU, where ours works
            synchronise_batch_norm(model)

    @property
    def trained(self) -> nn.Module:
        return self.average.module if self.average else self.model

    def __call__(self, images: Tensor, labels: Tensor, of_all: int | None = None) -> tuple[float, int, int]:
        """(sum of the losses, right answers, pictures), each of all workers.

        of_all: the size of the whole batch, of which this worker has a part (default: this is the whole).
        The recipe's `accumulate` cuts the part again; the gradient is that of the mean over the whole batch.

        Raises NonFiniteError(loss, where it comes from), before the weights change, where it is NaN or infinite.
        """
        images = images.to(self.device, memory_format=self.layout)
        labels = labels.to(self.device)
        self.optimizer.zero_grad(set_to_none=True)
        sums = torch.zeros(3, dtype=torch.float64, device=self.device)
        of_all = of_all or len(labels)
        pieces = min(self.recipe.accumulate, of_all // self.workers.count)  # as many for every worker
        for i in range(pieces):
            piece, answers = (t.tensor_split(pieces)[i] for t in (images, labels))
            # DistributedDataParallel takes the mean over the workers, hence their number.
            share = len(answers) * self.workers.count / of_all
            with self._sums_gradients(i == pieces - 1):
                loss, right = self._forward(piece, answers)
                self.scaler.scale(loss * share).backward()
            count = torch.full_like(right, len(answers))
            sums += torch.stack([loss.detach().double() * count, right, count])
        mine = sums[0].clone()
        loss_sum, right, count = self.workers.sum(sums).tolist()
        if not math.isfinite(loss_sum):
            # On every worker, as layers may exchange sums; layer by layer, whatever was compiled.
            with self._mixed(), torch.compiler.set_stance("force_eager"):
                where = first_non_finite(self.model, images)
            raise NonFiniteError(loss_sum, "another worker's pictures" if mine.isfinite() else where)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.average:
            self.average.update_parameters(self.model)
        return loss_sum, int(right), int(count)

    def _forward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The mean loss, and the number of right answers."""
        with self._mixed():
            output = self.network(images)
        if self.recipe.precision != "float32":
            output = tree_map(Tensor.float, output)
        right = (scores(self.model, output).argmax(1) == labels).sum().double()
        return self.loss(output, labels), right

    def _mixed(self) -> AbstractContextManager:
        full = self.recipe.precision == "float32"
        return nullcontext() if full else torch.autocast(self.device.type, PRECISIONS[self.recipe.precision])

    def _sums_gradients(self, last: bool) -> AbstractContextManager:
        """Workers exchange gradients once a step, with the last piece."""
        return nullcontext() if last or self.workers.count == 1 else self.network.no_sync()

    def state(self) -> dict:
        """Weights as they are to be used; and what `restore` needs to go on."""
        state = {
            "weights": self.trained.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }
        if self.average:
            state |= {"raw_weights": self.model.state_dict(), "averaged": int(self.average.n_averaged)}
        return state

    def restore(self, state: dict) -> None:
        """Raises KeyError, RuntimeError or ValueError where `state` is another network's."""
        self.trained.load_state_dict(state["weights"])
        if self.average:
            self.model.load_state_dict(state["raw_weights"])
            self.average.n_averaged.fill_(state["averaged"])
        self.optimizer.load_state_dict(state["optimizer"])
        if state.get("scaler"):
            self.scaler.load_state_dict(state["scaler"])
