"""Calibration, projection in its metric and compression in order on a GPU agree with the CPU."""

import copy

import pytest
import torch
from torch import nn

import structmat
from structmat import surgery
from structmat.testing import relative_error

pytestmark = pytest.mark.gpu


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(48, 96), nn.GELU(), nn.Linear(96, 96), nn.GELU(), nn.Linear(96, 10)).double()


def data():
    g = torch.Generator().manual_seed(0)
    return [torch.randn(64, 48, generator=g, dtype=torch.float64) * torch.logspace(0, -1, 48) for _ in range(4)]


@pytest.mark.parametrize("gradients", [False, True])
def test_moments(gradients):
    loss = {"gradients": True, "loss_fn": lambda y, _: y.square().sum()} if gradients else {}
    host = surgery.calibrate(network(), data(), **loss)
    device = surgery.calibrate(network().cuda(), data(), **loss)
    for name in host:
        assert device[name].inputs.is_cuda
        assert relative_error(device[name].inputs.cpu(), host[name].inputs) <= 1e-12
        if gradients:
            assert relative_error(device[name].outputs.cpu(), host[name].outputs) <= 1e-12


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize(
    "config",
    [
        structmat.LowRankConfig(rank=5),
        structmat.BlockDiagonalConfig(nblocks=5),
        structmat.MonarchConfig(nblocks=(5, 4), ratio=0.5),
        structmat.BlockSparseConfig(block=8, ratio=0.5),
        structmat.PixelflyConfig(block=8, max_stride=2, rank=3),
        structmat.LDRConfig(rank=3),
    ],
    ids=lambda config: config.structure,
)
def test_projections(config, gradients):
    g = torch.Generator().manual_seed(0)
    W = torch.randn(48, 56, generator=g, dtype=torch.float64)
    x, y = torch.randn(300, 56, generator=g) * torch.logspace(0, 1, 56), torch.randn(300, 48, generator=g)
    moments = structmat.Moments.of(x.double(), y.double() if gradients else None)
    host, device = structmat.project(W, config, moments), structmat.project(W.cuda(), config, moments)
    assert device.matrix.device.type == "cuda"
    # L-BFGS takes other paths where sums are rounded otherwise.
    bound = 0.05 if config.structure == "ldr" else 1e-6
    assert host.calibrated_error is not None and device.calibrated_error is not None
    assert abs(device.calibrated_error - host.calibrated_error) <= bound * host.calibrated_error


def test_compression_in_order():
    config, host = structmat.MonarchConfig(nblocks=4, ratio=0.5), network()
    device = copy.deepcopy(host).cuda()
    for model in (host, device):
        surgery.compress_(model, config, calibration=surgery.calibrate(model, data()), compensate=data())
    x = torch.cat(data())
    assert relative_error(device(x.cuda()).cpu(), host(x)) <= 1e-6


@pytest.mark.slow
def test_a_large_layer():
    """4096 x 11008, a projection of Llama's shape: its calibrated error is below the plain one's."""
    g = torch.Generator("cuda").manual_seed(0)
    W = torch.randn(4096, 11008, generator=g, device="cuda")
    x = torch.randn(16384, 11008, generator=g, device="cuda") * torch.logspace(0, -2, 11008, device="cuda")
    result = structmat.project(W, structmat.MonarchConfig(nblocks=4, ratio=0.5), structmat.Moments.of(x))
    assert result.calibrated_error is not None and result.plain_calibrated_error is not None
    assert result.calibrated_error < 0.9 * result.plain_calibrated_error
