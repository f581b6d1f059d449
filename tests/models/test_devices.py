"""Models on the CPU and on a CUDA device against the same model on the CPU: mixed precision, CUDA graphs, surgery."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

import structmat
from structmat import surgery
from structmat.models import GPT, MLPMixer, VisionTransformer
from structmat.testing import relative_error
from structmat_kernels.block_sparse import flat_butterfly_mask

CONFIGS = {
    "dense": None,
    "monarch": structmat.MonarchConfig(nblocks=4),
    "pixelfly": structmat.PixelflyConfig(block=8, max_stride=2, rank=4),
    "butterfly": structmat.ButterflyConfig(),
    "lowrank": structmat.LowRankConfig(ratio=0.5),
}
SIZE = {"dim": 32, "depth": 2}
MODELS = {
    "mixer": lambda **k: MLPMixer(16, 4, 10, channels=2, **SIZE, **k),
    "vit": lambda **k: VisionTransformer(16, 4, 10, channels=2, heads=2, **SIZE, **k),
    "gpt": lambda **k: GPT(11, 16, heads=2, **SIZE, **k),
}
every_config = pytest.mark.parametrize("config", list(CONFIGS)[1:])


def make(name, structure=None, **options):
    torch.manual_seed(0)
    return MODELS[name](structure=CONFIGS.get(structure), **options)


def example(name, seed=1, length=13):
    generator = torch.Generator().manual_seed(seed)
    if name == "gpt":
        return tuple(torch.randint(11, (2, 5, length), generator=generator))
    return torch.randn(5, 2, 16, 16, generator=generator), torch.randint(10, (5,), generator=generator)


def loss_of(model, x, y):
    return F.cross_entropy(model(x).flatten(0, -2).float(), y.flatten())


def gradients(model):
    return torch.cat([p.grad.cpu().double().flatten() for p in model.parameters()])


@pytest.mark.parametrize("name", MODELS)
@every_config
def test_mixed_precision(name, config, device):
    """Forward and backward in a bfloat16 region against float32 on the CPU."""
    exact = make(name, config)
    model, (x, y) = copy.deepcopy(exact).to(device), example(name)
    loss_of(exact, x, y).backward()
    with torch.autocast(device, torch.bfloat16):
        out = model(x.to(device))
        loss = loss_of(model, x.to(device), y.to(device))
    loss.backward()
    assert out.dtype == torch.bfloat16
    assert relative_error(out.float().cpu(), exact(x)) <= 2e-2
    assert all(p.grad.dtype == torch.float32 and p.grad.device.type == device for p in model.parameters())
    got, expected = (gradients(m) for m in (model, exact))
    assert relative_error(got, expected) <= 2e-2


@every_config
@pytest.mark.parametrize("where", ["cpu", "meta", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_built_under_a_default_device(config, where):
    """Layouts and masks are made on the CPU, parameters and tables where torch makes tensors."""
    mask = flat_butterfly_mask(4, 4, max_stride=2)
    with torch.device(where):
        model = make("gpt", config, attention_mask=mask)
        assert model(torch.zeros(2, 16, dtype=torch.long)).shape == (2, 16, 11)
    assert {t.device.type for t in (*model.parameters(), *model.buffers())} == {where}
    state = make("gpt", config).state_dict()
    model = model.to_empty(device="cpu")
    model.load_state_dict(state)
    assert torch.equal(
        model(example("gpt")[0]), load(make("gpt", config, attention_mask=mask), state)(example("gpt")[0])
    )


def load(model, state):
    model.load_state_dict(state)
    return model


def train_step(model, optimizer, x, y):
    optimizer.zero_grad()
    loss_of(model, x, y).backward()
    optimizer.step()


def capture(step):
    """A CUDA graph of the step, as a function; the steps that warm it up are taken, the captured one is not."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


@pytest.mark.parametrize("length", [16, 13])
def test_training_step_in_a_graph(device, length):
    """Steps replayed on new data in the same memory are the steps taken one by one."""
    model = make("gpt", "pixelfly", attention_mask=torch.eye(8).bool()).to(device)
    start, twin = copy.deepcopy(model), copy.deepcopy(model)
    optimizer, other = (torch.optim.SGD(m.parameters(), lr=0.5, momentum=0.9) for m in (model, twin))
    x, y = (t.to(device) for t in example("gpt", length=length))

    def step():
        train_step(model, optimizer, x, y)

    if device == "cuda":
        step = capture(step)
        with torch.no_grad():
            for p, q in zip(model.parameters(), start.parameters(), strict=True):
                p.copy_(q)
                optimizer.state[p]["momentum_buffer"].zero_()
    for seed in range(3):
        fresh = [t.to(device) for t in example("gpt", seed, length)]
        x.copy_(fresh[0])
        y.copy_(fresh[1])
        step()
        train_step(twin, other, *fresh)
    before = dict(start.named_parameters())
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert relative_error(p, q) <= 1e-4, name
        assert not torch.equal(p, before[name]), name


def on(model, device):
    return all(t.device.type == device for t in (*model.parameters(), *model.buffers()))


@every_config
def test_compress_and_densify(config, device):
    """The projection is the one of the CPU, and three forms of one model give the same outputs."""
    here, x = make("gpt"), example("gpt")[0]
    there = copy.deepcopy(here).to(device)
    reports = [surgery.compress_(m, {"blocks.*": CONFIGS[config]}, progress=False) for m in (here, there)]
    assert on(there, device) and len(reports[1].compressed) == 8
    for expected, row in zip(*(report.compressed for report in reports), strict=True):
        # Of Pixelfly matrices the sweeps end where they gain less than 1e-4.
        assert row.params_after == expected.params_after and row.error == pytest.approx(expected.error, rel=1e-3)
    with torch.no_grad():
        out = there(x.to(device)).cpu()
        assert relative_error(out, copy.deepcopy(there).cpu()(x)) <= 1e-5
        surgery.densify_(there)
        assert on(there, device) and not any(isinstance(m, structmat.nn.StructuredLinear) for m in there.modules())
        assert relative_error(there(x.to(device)).cpu(), out) <= 1e-5


@every_config
def test_replace(config, device):
    model = make("gpt").to(device)
    assert len(surgery.replace_(model, {"blocks.*": CONFIGS[config]}).compressed) == 8
    assert on(model, device)
    loss_of(model, *(t.to(device) for t in example("gpt"))).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("config", ["monarch", "pixelfly"])
def test_carry_optimizer(config, device):
    """Structured steps, then dense ones with the momentum carried over, against float64 on the CPU."""
    models = make("gpt", config).double(), make("gpt", config).to(device)
    for model in models:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        batch = [t.to(model.tokens.device) for t in example("gpt")]
        for _ in range(3):
            train_step(model, optimizer, *batch)
        with surgery.carry_optimizer(model, optimizer):
            surgery.densify_(model)
        buffer = optimizer.state[model.blocks[0].mlp.fc1.weight]["momentum_buffer"]
        assert buffer.device == model.tokens.device and buffer.abs().sum() > 0
        for _ in range(3):
            train_step(model, optimizer, *batch)
    for (name, expected), p in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert relative_error(p.cpu(), expected) <= 1e-4, name
