"""M2-GPT trained on two processes equals M2-GPT trained on one.

Slow: two processes import transformers afresh. tests/nn/test_distributed.py checks the layers in the default suite.
"""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from structmat.models.m2 import M2GPTConfig, M2GPTForCausalLM
from structmat.testing import relative_error

pytestmark = pytest.mark.slow

STEPS, BATCH, LENGTH = 3, 4, 12


def build():
    torch.manual_seed(0)
    size = {"hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 24, "filter_width": 8}
    return M2GPTForCausalLM(M2GPTConfig(vocab_size=30, max_position_embeddings=LENGTH, **size)).double()


def train(model, batches):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for tokens in batches:
        optimizer.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()


def data():
    return torch.randint(30, (STEPS, BATCH, LENGTH), generator=torch.Generator().manual_seed(1))


def worker(rank, world, init_file, folder):
    dist.init_process_group("gloo", rank=rank, world_size=world, init_method=f"file://{init_file}")
    try:
        torch.set_num_threads(1)
        mine = data().chunk(world, dim=1)[rank]
        for kind in ("ddp", "fsdp2"):  # in one pair of processes: most of their time they import transformers
            model = build()
            if kind == "ddp":
                wrapped = nn.parallel.DistributedDataParallel(model)
            else:
                from torch.distributed.fsdp import fully_shard

                mesh = dist.device_mesh.init_device_mesh("cpu", (world,))
                for layer in model.model.layers:
                    fully_shard(layer, mesh=mesh)
                wrapped = fully_shard(model, mesh=mesh)
            train(wrapped, mine)
            full = {k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in model.state_dict().items()}
            if rank == 0:
                torch.save(full, folder / f"{kind}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    mp.spawn(worker, args=(2, folder / "init", folder), nprocs=2)
    return folder


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes_equal_one(kind, trained):
    start = build()
    single = copy.deepcopy(start)
    train(single, data())
    got, initial = torch.load(trained / f"{kind}.pt", weights_only=True), start.state_dict()
    for name, expected in single.named_parameters():
        assert relative_error(got[name], expected.detach()) <= 1e-10, name
        assert not torch.equal(initial[name], expected), f"{name} was not trained: the comparison proves nothing"
