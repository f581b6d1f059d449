"""Conditioning, fits to given convolutions, and the layer."""

import pytest
import torch
from torch import nn

from structmat import CausalMonarch, CausalToeplitz
from structmat.matrices.causal import fit_causal_monarch
from structmat.nn.causal_monarch import FLOOR, CausalMonarchConv
from structmat.testing import assert_close

TOL = 1e-12


@pytest.mark.parametrize("scheme", ["fourier", "chebyshev"])
def test_conditioning(scheme, make):
    C, _ = make(scheme, 7, (3, 5), size=2.0)
    report = C.conditioning()
    for part, cond, bound in zip((C.output, C.kernel, C.input), report.cond, report.bound, strict=True):
        assert_close(cond, torch.linalg.cond(part.to_dense()), TOL)
        assert 1 <= cond <= bound
    if scheme == "fourier":  # the transform is unitary up to a factor
        whole = CausalMonarch.from_blocks([C.output.triangles()], C.output.points)
        M = whole.output.evaluation().to_dense()[:, : whole.n]
        assert_close(torch.linalg.cond(M), whole.conditioning().cond[0], TOL)
    assert CausalMonarch.identity(7, scheme="fourier").conditioning().bound[0] == 1


@pytest.mark.parametrize(("scheme", "radix"), [("fourier", (3, 2)), ("chebyshev", (2, 6))])
def test_fit_finds_a_member(scheme, radix, make):
    C, _ = make(scheme, 6, radix, size=1.0)
    k, u = torch.randn(2, 40, 6, dtype=torch.float64)
    fit = fit_causal_monarch(k, u, C.conv(k, u), radix, scheme=scheme, steps=100)
    assert fit.error < 1e-3 and fit.plain_error > 0.05
    assert_close(fit.matrix.conv(k, u), C.conv(k, u), 1.01 * fit.error + 1e-12)


def test_fit_of_matrices_is_never_worse_than_plain():
    torch.manual_seed(0)
    k, W = torch.randn(3, 5), torch.randn(3, 5, 5).tril()
    fit = fit_causal_monarch(k[:, None], torch.eye(5), W.mT.contiguous(), (2, 3), shared=True, steps=30)
    assert fit.matrix.dtype == torch.float32
    plain = CausalToeplitz(k).to_dense()
    assert abs(fit.plain_error - ((plain - W).norm() / W.norm()).item()) < 1e-6
    found = torch.stack([fit.matrix.toeplitz(v).to_dense() for v in k])
    assert abs(fit.error - ((found - W).norm() / W.norm()).item()) < 1e-5
    assert fit.error < fit.plain_error == pytest.approx(fit.start_error)
    assert found.triu(1).norm() < 1e-4
    none = fit_causal_monarch(k[:, None], torch.eye(5), plain.mT.contiguous(), (2, 3), steps=5)
    assert none.error < 1e-6
    with pytest.raises(ValueError, match="y must be finite and not zero"):
        fit_causal_monarch(k, k, torch.zeros(3, 5))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_fit_reports_the_error_of_what_it_returns(dtype, make):
    """Coefficients are rounded to the dtype of the samples, which costs more than it may have won."""
    torch.manual_seed(0)
    for change in (0.3, 3e-3, 1e-6):
        C, _ = make("fourier", 6, (3, 2), size=change)
        k, u = torch.randn(2, 40, 6, dtype=torch.float64)
        k, u, y = (v.to(dtype) for v in (k, u, C.conv(k, u)))
        fit = fit_causal_monarch(k, u, y, (3, 2), steps=20)
        k, u, y = k.double(), u.double(), y.double()
        measured = ((fit.matrix.to(torch.float64).conv(k, u) - y).norm() / y.norm()).item()
        assert fit.error == pytest.approx(measured, rel=1e-6)
        assert fit.error <= fit.plain_error
    with pytest.raises(ValueError, match="must be finite"):
        fit_causal_monarch(k * torch.nan, u, y)


@pytest.mark.parametrize("diagonal", ["unit", "softplus"])
@pytest.mark.parametrize("scheme", ["fourier", "chebyshev"])
def test_module(scheme, diagonal, upper):
    torch.manual_seed(0)
    layer = CausalMonarchConv(7, channels=3, order=2, scheme=scheme, diagonal=diagonal, dtype=torch.float64)
    start = CausalMonarch.identity(7, layer.radix, scheme=scheme, dtype=torch.float64)
    u, k = torch.randn(4, 3, 7, dtype=torch.float64), torch.randn(3, 7, dtype=torch.float64)
    assert_close(layer(u, k), start.conv(k, u), TOL)
    target = torch.randn(4, 3, 7, dtype=torch.float64)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    before = nn.functional.mse_loss(layer(u, k), target)
    for _ in range(20):
        optimizer.zero_grad()
        nn.functional.mse_loss(layer(u, k), target).backward()
        optimizer.step()
    assert nn.functional.mse_loss(layer(u, k), target) < before
    assert all(p.abs().sum() > 0 for p in layer.parameters())
    C = layer.map()
    one = CausalMonarch.from_blocks([[b[0] for b in p.triangles()] for p in (C.output, C.kernel, C.input)], 7, scheme)
    assert upper(one.conv, 7) <= TOL
    least = min(b.diagonal(dim1=-2, dim2=-1).min().item() for b in C.output.triangles())
    assert least == 1 if diagonal == "unit" else least >= FLOOR
    other = CausalMonarchConv(7, channels=3, order=2, scheme=scheme, diagonal=diagonal, dtype=torch.float64)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(u, k), layer(u, k))
    layer.reset_parameters()
    assert_close(layer(u, k), start.conv(k, u), TOL)


def test_module_arguments():
    assert len(list(CausalMonarchConv(6, shared=True, order=3).parameters())) == 3
    with pytest.raises(ValueError, match="diagonal must be"):
        CausalMonarchConv(6, diagonal="free")
    with pytest.raises(ValueError, match="at least n = 6"):
        CausalMonarchConv(6, radix=(2, 2))
    with pytest.raises(ValueError, match="dtype must be floating point"):
        CausalMonarchConv(6, dtype=torch.complex64)


def test_module_has_no_parameters_that_are_not_read():
    layer = CausalMonarchConv(60, radix=(10, 12), scheme="chebyshev", dtype=torch.float64)
    # 60 indices have 6 values of the top digit, 59, ..., 118 have 7.
    assert [p.shape[-1] for basis in layer.strict for p in basis] == [45, 21, 45, 15, 45, 15]
    torch.manual_seed(0)
    for p in layer.parameters():
        nn.init.normal_(p, std=0.1)
    layer(*torch.randn(2, 60, dtype=torch.float64)).square().sum().backward()
    assert all((p.grad != 0).any() for p in layer.parameters())
    assert [
        p.shape[-1]
        for basis in CausalMonarchConv(60, radix=(10, 12), scheme="chebyshev", shared=True).strict
        for p in basis
    ] == [45, 66]
