"""Orthonormal bases of many small matrices."""

import pytest
import torch

from structmat.projection import bases


@pytest.mark.parametrize("device", ["cpu", "elsewhere", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
@pytest.mark.parametrize("shape", [(3, 5, 1), (2, 3, 6, 3), (4, 2, 3), (2, 1, 1), (0, 4, 2)])
def test_thin_qr(shape, dtype, device, monkeypatch):
    """What runs on other devices than a CPU is run on a CPU, too."""
    M = torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(0))
    if shape[-1] > 1:
        M[0:1, ..., 1] = M[0:1, ..., 0] * (2 + 1e-17)  # dependent columns
    M[1:2] = 0
    if device == "elsewhere":
        monkeypatch.setattr(torch.linalg, "qr", None)
        monkeypatch.setattr(bases, "_HAS_LAPACK", ())
    M = M.to("cuda" if device == "cuda" else "cpu")
    Q, R = bases.thin_qr(M)
    if device == "cpu":
        Q, R = (bases.pad(t, shape[-1], d) for t, d in ((Q, -1), (R, -2)))
    assert torch.linalg.vector_norm(Q @ R - M) <= 1e-14 * torch.linalg.vector_norm(M)
    assert torch.equal(R, R.triu())
    gram = Q.mH @ Q  # a projector: columns are orthonormal or zero
    assert torch.linalg.vector_norm(gram @ gram - gram) <= 1e-14 * max(1, gram.numel())
