"""DDP and FSDP2 with gloo on two processes take the same training steps as one process."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from structmat.nn import BlockDiagonalLinear, LowRankLinear, MonarchLinear
from structmat.testing import relative_error

STEPS, BATCH = 5, 8


def build():
    torch.manual_seed(0)
    return nn.Sequential(
        MonarchLinear(24, 48),
        nn.GELU(),
        LowRankLinear(48, 37, rank=5),
        nn.GELU(),
        BlockDiagonalLinear(37, 6, nblocks=3),
    ).double()


def data():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(STEPS, BATCH, 24, generator=generator, dtype=torch.float64)


def train(model, batches):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for x in batches:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def worker(rank, world, kind, init_file, out_file):
    dist.init_process_group("gloo", rank=rank, world_size=world, init_method=f"file://{init_file}")
    try:
        torch.set_num_threads(1)
        model = build()
        if kind == "ddp":
            wrapped = nn.parallel.DistributedDataParallel(model)
        else:
            from torch.distributed.fsdp import fully_shard

            mesh = dist.device_mesh.init_device_mesh("cpu", (world,))
            for layer in model:
                if any(True for _ in layer.parameters()):
                    fully_shard(layer, mesh=mesh)
            wrapped = fully_shard(model, mesh=mesh)
        train(wrapped, data().chunk(world, dim=1)[rank])
        full = {k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in model.state_dict().items()}
        if rank == 0:
            torch.save(full, out_file)
        dist.barrier()
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes_equal_one(kind, tmp_path):
    out = tmp_path / "state.pt"
    mp.spawn(worker, args=(2, kind, tmp_path / "init", out), nprocs=2)
    start = build()
    single = copy.deepcopy(start)
    train(single, data())
    got, initial = torch.load(out, weights_only=True), start.state_dict()
    for name, expected in single.state_dict().items():
        assert relative_error(got[name], expected) <= 1e-6, name
        assert relative_error(initial[name], expected) > 1e-3, f"{name} was not trained: the comparison proves nothing"
