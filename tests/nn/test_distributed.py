"""DDP and FSDP2 on two processes take the same training steps as one process: gloo on the CPU, NCCL on two GPUs."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from structmat.nn import BlockDiagonalLinear, LowRankLinear, MonarchLinear, PixelflyLinear
from structmat.testing import relative_error

STEPS, BATCH = 5, 8
PRECISION = {"cpu": torch.float64, "cuda": torch.float32}  # the kernels have no float64


def build(device="cpu"):
    torch.manual_seed(0)
    # gamma is a single number, so that FSDP2 leaves one process without a share of it; at rank 0 the low-rank factors
    # have no entries, and no gradient.
    return nn.Sequential(
        MonarchLinear(24, 48),
        nn.GELU(),
        LowRankLinear(48, 37, rank=5),
        nn.GELU(),
        PixelflyLinear(37, 37, block=8, max_stride=2, rank=0),
        nn.GELU(),
        PixelflyLinear(37, 37, block=8, max_stride=1, rank=3),
        nn.GELU(),
        BlockDiagonalLinear(37, 6, nblocks=3),
    ).to(device, PRECISION[device.split(":")[0]])


def data(device="cpu"):
    generator = torch.Generator().manual_seed(1)
    batches = torch.randn(STEPS, BATCH, 24, generator=generator, dtype=torch.float64)
    return batches.to(device, PRECISION[device.split(":")[0]])


def train(model, batches):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for x in batches:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def worker(rank, world, kind, init_file, out_file, device_type="cpu"):
    backend, device = ("gloo", "cpu") if device_type == "cpu" else ("nccl", f"cuda:{rank}")
    if device_type == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group(backend, rank=rank, world_size=world, init_method=f"file://{init_file}")
    try:
        torch.set_num_threads(1)
        model = build(device)
        if kind == "ddp":
            wrapped = nn.parallel.DistributedDataParallel(model)
        else:
            from torch.distributed.fsdp import fully_shard

            mesh = dist.device_mesh.init_device_mesh(device_type, (world,))
            for layer in model:
                if any(True for _ in layer.parameters()):
                    fully_shard(layer, mesh=mesh)
            wrapped = fully_shard(model, mesh=mesh)
        train(wrapped, data(device).chunk(world, dim=1)[rank])
        full = {k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in model.state_dict().items()}
        if rank == 0:
            torch.save(full, out_file)
        dist.barrier()
    finally:
        dist.destroy_process_group()


def ragged():
    """Sizes that the blocks do not divide: the deviations of the blocks differ."""
    return MonarchLinear(50, 370), LowRankLinear(370, 370, rank=50), BlockDiagonalLinear(370, 640, nblocks=3)


def meta_worker(rank, world, init_file, out_file):
    """FSDP2's way to make a model too large for one device: shard on meta, materialise, initialise."""
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", rank=rank, world_size=world, init_method=f"file://{init_file}")
    try:
        torch.manual_seed(0)
        mesh = dist.device_mesh.init_device_mesh("cpu", (world,))
        with torch.device("meta"):
            layers = [
                MonarchLinear(50, 370),
                LowRankLinear(370, 370, rank=50),
                BlockDiagonalLinear(370, 640, nblocks=3),
            ]
        for layer in layers:
            fully_shard(layer, mesh=mesh)
            layer.to_empty(device="cpu")
            layer.reset_parameters()
        full = [{n: p.full_tensor() for n, p in layer.named_parameters()} for layer in layers]
        if rank == 0:
            torch.save(full, out_file)
        dist.barrier()
    finally:
        dist.destroy_process_group()


def test_sharded_on_meta_then_initialised(tmp_path):
    torch.manual_seed(0)
    out = tmp_path / "state.pt"
    mp.spawn(meta_worker, args=(2, tmp_path / "init", out), nprocs=2)
    for layer, state in zip(ragged(), torch.load(out, weights_only=True), strict=True):
        layer.load_state_dict(state)
        with torch.no_grad():
            std = layer.weight().linear(torch.randn(2048, layer.in_features)).std().item()
        assert abs(std * 3**0.5 - 1) <= 0.1, f"{type(layer).__name__}: {std:.4f}"


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_two_processes_equal_one(device, kind, tmp_path):
    if device == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    out = tmp_path / "state.pt"
    mp.spawn(worker, args=(2, kind, tmp_path / "init", out, device), nprocs=2)
    start = build(device)
    single = copy.deepcopy(start)
    train(single, data(device))
    got, initial = torch.load(out, weights_only=True, map_location=device), start.state_dict()
    # AdamW divides gradients by their own size: float32's rounding of the small ones is seen in the parameters.
    bound = 1e-6 if device == "cpu" else 1e-4
    for name, expected in single.named_parameters():
        assert relative_error(got[name], expected.detach()) <= bound, name
        assert relative_error(initial[name], expected.detach()) > 1e-3, (
            f"{name} was not trained: the comparison proves nothing"
        )
