"""Converted and fused networks in two processes: SyncBatchNorm's protocol, DistributedDataParallel, FSDP2."""

import os

import pytest
import torch
import torch.distributed as dist
from torch import nn

import cuda_cnn

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="needs torch.distributed with gloo"
)
RANKS = 2
SPLITS = {"uneven": (3, 5), "one process without images": (8, 0)}


def images(dtype=torch.float64):
    return torch.randn(8, 3, 5, 6, generator=torch.Generator().manual_seed(1), dtype=dtype)


def network():
    torch.manual_seed(2)
    stem = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2))
    return nn.Sequential(
        stem, nn.Conv2d(4, 6, 1), nn.LocalResponseNorm(3), nn.Flatten(), nn.Linear(12, 2)
    ).double()


def sync_batch_norm(rank, split, affine):
    start = sum(split[:rank])
    x = images()[start : start + split[rank]].requires_grad_()
    norm = cuda_cnn.nn.SyncBatchNorm(3, momentum=0.3, affine=affine).double()
    if affine:
        nn.init.uniform_(norm.weight), nn.init.uniform_(norm.bias)
        for p in norm.parameters():
            dist.broadcast(p.data, 0)
    y = norm(x)
    (y * (1 + torch.arange(y.numel()).view_as(y) % 7 + start)).square().sum().backward()
    grads = [p.grad for p in norm.parameters()]
    state = [b.double().clone() for b in norm.buffers()]
    parameters = [p.detach() for p in norm.parameters()]
    second = ""
    try:
        (dx,) = torch.autograd.grad(norm(x).square().sum(), x, create_graph=True)
        dx.sum().backward()
    except NotImplementedError as error:
        second = str(error)
    dist.barrier()
    return {
        "y": y.detach(),
        "dx": x.grad,
        "grads": grads,
        "state": state,
        "parameters": parameters,
        "second": second,
    }


def two_steps(wrapped, rank):
    optimiser = torch.optim.SGD(wrapped.parameters(), lr=0.1)
    for _ in range(2):
        optimiser.zero_grad()
        wrapped(images()[4 * rank : 4 * rank + 4]).square().mean().backward()
        optimiser.step()
    state = wrapped.state_dict()
    return {k.removeprefix("module."): getattr(v, "full_tensor", lambda v=v: v)() for k, v in state.items()}


def data_parallel(rank, form):
    """Two steps of SGD: on torch's layers, on layers converted (and fused) under the wrapper, on some reverted."""
    wrapped = nn.parallel.DistributedDataParallel(network())
    changed = 0
    if form != "torch":
        changed = len(cuda_cnn.convert(wrapped, strict=True).changed)
    if form == "reverted":
        cuda_cnn.revert(wrapped)
    if form == "fused":
        assert len(cuda_cnn.fuse(wrapped.module).fused) == 4
    return {"state": two_steps(wrapped, rank), "changed": changed}


def fully_sharded(rank, form):
    from torch.distributed.fsdp import fully_shard

    model = network()
    if form != "torch":
        cuda_cnn.convert(model)
    if form == "fused":
        cuda_cnn.fuse(model)
    fully_shard(model[0])
    fully_shard(model)
    left = []
    if form == "converted":
        layer = fully_shard(cuda_cnn.nn.Conv2d(2, 2, 1))
        left = [entry.reason for entry in cuda_cnn.revert(layer).left]
    return {"state": two_steps(model, rank), "left": left}


def worker(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=RANKS)
    results = {}
    for name, split in SPLITS.items():
        results["sync", name] = sync_batch_norm(rank, split, affine=name == "uneven")
    for form in ("torch", "converted", "reverted", "fused"):
        results["ddp", form] = data_parallel(rank, form)
    for form in ("torch", "converted", "fused"):
        results["fsdp", form] = fully_sharded(rank, form)
    torch.save(results, f"{folder}/{rank}")
    dist.destroy_process_group()


def test_in_two_processes(tmp_path, monkeypatch):
    """One test: starting the processes takes longer than all that they do."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    torch.multiprocessing.spawn(worker, (os.fspath(tmp_path),), nprocs=RANKS)
    results = [torch.load(tmp_path / str(rank), weights_only=False) for rank in range(RANKS)]
    for name in SPLITS:
        check_sync_batch_norm([r["sync", name] for r in results], name)
    for form in ("converted", "reverted", "fused"):
        check_data_parallel(results, form)
    check_fully_sharded(results)


def check_sync_batch_norm(parts, name):
    """As torch's BatchNorm2d has it for the images of both processes together."""
    x = images().requires_grad_()
    norm = nn.BatchNorm2d(3, momentum=0.3, affine=name == "uneven").double()
    for p, given in zip(norm.parameters(), parts[0]["parameters"], strict=True):
        p.data.copy_(given)
    ys, loss = norm(x).split(SPLITS[name]), 0
    for rank, y in enumerate(ys):
        loss = (
            loss
            + (y * (1 + torch.arange(y.numel()).view_as(y) % 7 + sum(SPLITS[name][:rank]))).square().sum()
        )
    loss.backward()
    close = {"rtol": 1e-10, "atol": 1e-10}
    torch.testing.assert_close(torch.cat([p["y"] for p in parts]), torch.cat(ys).detach(), **close)
    torch.testing.assert_close(torch.cat([p["dx"] for p in parts]), x.grad, **close)
    for i, p in enumerate(norm.parameters()):
        torch.testing.assert_close(sum(part["grads"][i] for part in parts), p.grad, **close)
    for part in parts:
        for ours, torchs in zip(part["state"], norm.buffers(), strict=True):
            torch.testing.assert_close(ours, torchs.double(), **close)
        assert "second derivative" in part["second"]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_sync_batch_norm_of_one_process_is_batch_norm(training):
    sync, plain = cuda_cnn.nn.SyncBatchNorm(3).train(training), nn.BatchNorm2d(3).train(training)
    torch.testing.assert_close(sync(images(torch.float32)), plain(images(torch.float32)))
    torch.testing.assert_close(sync.state_dict(), plain.state_dict())
    with pytest.raises(ValueError, match="at least 2D input"):
        sync(torch.ones(3))


def test_convert_sync_batchnorm_then_convert():
    model = nn.SyncBatchNorm.convert_sync_batchnorm(network())
    cuda_cnn.convert(model)
    assert type(model[0][1]) is cuda_cnn.nn.SyncBatchNorm


def check_data_parallel(results, form):
    assert results[0]["ddp", form]["changed"] == 5
    for result in results:
        ours, torchs = result["ddp", form]["state"], result["ddp", "torch"]["state"]
        torch.testing.assert_close(ours, torchs, rtol=1e-10, atol=1e-12)
    weights = [r["ddp", form]["state"]["1.weight"] for r in results]
    assert torch.equal(*weights) and not torch.equal(weights[0], network()[1].weight)


def check_fully_sharded(results):
    for result in results:
        for form in ("converted", "fused"):
            ours, torchs = result["fsdp", form]["state"], result["fsdp", "torch"]["state"]
            torch.testing.assert_close(ours, torchs, rtol=1e-10, atol=1e-12)
            assert not torch.equal(ours["1.weight"], network()[1].weight)
        assert "fully_shard" in result["fsdp", "converted"]["left"][0]
