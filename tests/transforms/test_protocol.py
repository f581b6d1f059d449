"""Transforms are structured matrices like all others: the public checks, on one of each construction.

Selections, a cosine and a Haar transform are in the market; these are the ones that not all of its dtypes fit.
"""

import pytest
import torch

from structmat import transforms as tf
from structmat.testing import CHECKS, Entry, check_all

REAL = (torch.float64, torch.float32, torch.complex128)
COMPLEX = (torch.complex128, torch.complex64)
SKIP = ("solve", "initialisation", "state_dict")  # inverses are transforms of their own; nothing here is trained

ENTRIES = [
    Entry("dft", lambda dtype, device: tf.dft(12, dtype=dtype, device=device), dtypes=COMPLEX),
    Entry("dct-1", lambda dtype, device: tf.dct(5, 1, dtype=dtype, device=device), dtypes=REAL),
    Entry("czt", lambda dtype, device: tf.czt(5, 7, dtype=dtype, device=device), dtypes=COMPLEX),
    Entry("toeplitz", lambda dt, dev: tf.toeplitz(torch.randn(5, dtype=dt, device=dev), [1, 2, 3]), dtypes=REAL),
    Entry("conv2d", lambda dt, dev: tf.conv2d((2, 3), torch.randn(2, 1, 2, 2, dtype=dt, device=dev)), dtypes=REAL),
    Entry("daubechies", lambda dtype, device: tf.daubechies(12, 2, dtype=dtype, device=device), dtypes=REAL),
]


@pytest.mark.parametrize("entry", ENTRIES, ids=repr)
def test_checks(entry):
    # The check of conversions makes matrices real ones of other precision, which complex transforms refuse.
    skip = (*SKIP, "conversion") if entry.dtypes == COMPLEX else SKIP
    check_all(entry, only=[name for name in CHECKS if name not in skip])
    if entry.dtypes == COMPLEX:
        A = entry(torch.complex128)
        assert A.to(torch.complex64).to_dense().dtype == torch.complex64
        with pytest.raises(TypeError, match="imaginary"):
            A.to(torch.float32)


def test_large_primes_compile_and_differentiate():
    A = tf.dct(131, dtype=torch.float64)
    x = torch.randn(2, 3, 131, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    compiled = torch.compile(lambda v: A.linear(v), fullgraph=True, backend="aot_eager")
    (grad,) = torch.autograd.grad(compiled(x).sum(), x)
    assert torch.allclose(grad, A.mT.linear(torch.ones_like(x)), atol=1e-11)
