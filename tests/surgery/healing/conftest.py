"""Small pairs of a compressed and a dense model, and batches for them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import structmat
from structmat import surgery

CONFIGS = {
    "monarch": structmat.MonarchConfig(nblocks=4, ratio=0.5),
    "lowrank": structmat.LowRankConfig(ratio=0.5),
}


@pytest.fixture(params=CONFIGS.values(), ids=CONFIGS)
def config(request):
    return request.param


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    return request.param


@pytest.fixture
def mlp():
    """A function that returns compressed and dense perceptron; the last layer stays dense."""

    def make(config, device="cpu", dtype=torch.float32, dropout=0.0):
        torch.manual_seed(0)
        layers = [nn.Linear(32, 64), nn.Tanh(), nn.Dropout(dropout), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 8)]
        dense = nn.Sequential(*layers).to(device, dtype)
        compressed = copy.deepcopy(dense)
        surgery.compress_(compressed, {"[03]": config}, progress=False)
        return compressed, dense

    return make


@pytest.fixture
def inputs():
    """A function that returns batches for the perceptron, correlated: what layers see decides which error counts."""

    def make(count=8, device="cpu", dtype=torch.float32):
        generator = torch.Generator().manual_seed(1)
        mix = torch.randn(32, 32, generator=generator) @ torch.diag(torch.logspace(0, -2, 32)) / 2
        return [(torch.randn(16, 32, generator=generator) @ mix).to(device, dtype) for _ in range(count)]

    return make


@pytest.fixture
def language():
    """A function that returns compressed and dense model of a kind, and batches with padding."""
    transformers = pytest.importorskip("transformers")
    common = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}

    def make(kind, config):
        torch.manual_seed(0)
        if kind == "bert":
            settings = transformers.BertConfig(**common, intermediate_size=64, initializer_range=0.2)
            dense = transformers.BertForMaskedLM(settings)
        else:
            settings = transformers.GPT2Config(
                vocab_size=50, n_embd=32, n_layer=2, n_head=2, n_positions=16, initializer_range=0.2
            )
            dense = transformers.GPT2LMHeadModel(settings)
        compressed = copy.deepcopy(dense)
        surgery.compress_(compressed, {"bert.*": config, "transformer.*": config}, progress=False)
        generator, batches = torch.Generator().manual_seed(2), []
        for _ in range(4):
            mask = torch.ones(3, 9, dtype=torch.int64)
            mask[1, 6:] = 0
            batches.append({"input_ids": torch.randint(50, (3, 9), generator=generator), "attention_mask": mask})
        return compressed, dense, batches

    return make


@pytest.fixture
def snapshot():
    """A function that copies parameters, buffers, flags, modes, gradients and hooks of a model."""

    def take(model):
        return {
            "state": {name: t.clone() for name, t in model.state_dict().items()},
            "flags": {name: (p.requires_grad, p.grad) for name, p in model.named_parameters()},
            "modes": {name: m.training for name, m in model.named_modules()},
            "forward": [name for name, m in model.named_modules() if "forward" in vars(m)],
        }

    return take
