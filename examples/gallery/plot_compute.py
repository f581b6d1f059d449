r"""
Compute with structured matrices
================================

Structured matrices multiply, compose, transpose, solve and invert as matrices do, and nothing is made dense on the
way. This page fits a Gaussian random field on a grid through a Kronecker product, with gradients, and then checks a
product of structured factors against the dense computation.
"""

import math
import time

import matplotlib.pyplot as plt
import torch

from structmat import Dense, Diagonal, Kronecker, Monarch, Permutation

torch.set_default_dtype(torch.float64)

# %%
# A covariance on a grid
# ----------------------
#
# The field lives on a grid of 48 x 64 points. Its covariance is a product of one kernel for the rows and one for the
# columns, so that the covariance matrix of all 3072 points is the Kronecker product of two small ones. Kernel:
# :math:`e^{-|s - t| / \ell}` with one length :math:`\ell` for each direction.


def covariance(lengths, sizes):
    """Covariance of a field on a grid of the given sizes: a Kronecker product of dense matrices."""
    factors = []
    for length, size in zip(lengths, sizes, strict=True):
        t = torch.arange(float(size))
        factors.append(Dense(torch.exp(-(t[:, None] - t).abs() / length)))
    return Kronecker(tuple(factors))


sizes, true_lengths = (48, 64), torch.tensor([4.0, 12.0])
C = covariance(true_lengths, sizes)
print(f"{C.shape[0]} x {C.shape[1]} in {C.num_params:,} numbers in place of {math.prod(C.shape):,}")

# %%
# A sample is a root of the covariance times white noise. The root of a Kronecker product is the product of the roots.

root = Kronecker(tuple(Dense(torch.linalg.cholesky(f.weight)) for f in C.factors))
field = root @ torch.randn(C.shape[1], generator=torch.Generator().manual_seed(0))

# %%
# The likelihood
# --------------
#
# The log-likelihood of a field f needs a solve and a determinant,
# :math:`-\tfrac12 (f^T C^{-1} f + \log \det C + n \log 2 \pi)`. The same function serves the structured and the dense
# matrix: ``Dense`` is a structured matrix too.


def log_likelihood(C, f):
    """Log-density of f under the normal distribution of covariance C."""
    return -0.5 * (f @ C.solve(f) + C.logdet() + len(f) * math.log(2 * math.pi))


start = time.perf_counter()
structured = log_likelihood(C, field)
structured_seconds = time.perf_counter() - start

D = Dense(C.to_dense())
start = time.perf_counter()
dense = log_likelihood(D, field)
dense_seconds = time.perf_counter() - start

assert abs(structured - dense) < 1e-12 * abs(dense)
print(f"structured {structured:.9f} in {1e3 * structured_seconds:.1f} ms")
print(f"dense      {dense:.9f} in {1e3 * dense_seconds:.1f} ms")

# %%
# Everything is differentiable, so the lengths can be estimated by following the gradient of the likelihood. The
# matrix is a value: it is rebuilt from the lengths in every evaluation.

log_lengths = torch.tensor([0.0, 0.0], requires_grad=True)
optimizer = torch.optim.LBFGS([log_lengths], line_search_fn="strong_wolfe")


def closure():
    optimizer.zero_grad()
    loss = -log_likelihood(covariance(log_lengths.exp(), sizes), field) / len(field)
    loss.backward()
    return loss


optimizer.step(closure)
fitted = log_lengths.exp().detach()
print(f"true lengths {true_lengths.tolist()}, fitted to one sample {[round(v, 2) for v in fitted.tolist()]}")

# %%
# The likelihood of both lengths, 24 x 24 evaluations in one batch: leading dimensions of the factors are batch
# dimensions of the matrix.

grid = torch.logspace(math.log10(2), math.log10(30), 24)
batch = covariance((grid[:, None, None, None], grid[None, :, None, None]), sizes)
print(f"a batch of matrices: {tuple(batch.shape)}")
quadratic = (field * batch.solve(field.expand(24, 24, -1))).sum(-1)
surface = -0.5 * (quadratic + batch.logdet() + len(field) * math.log(2 * math.pi)) / len(field)

# %%
# How the time grows with the size of the grid, for one solve and one determinant. The dense computation ends where
# the matrix no longer fits into a few seconds.

sides, times = [8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256], {"structured": [], "dense": []}
for side in sides:
    C_side = covariance(true_lengths, (side, side))
    f = torch.ones(side * side)
    for name in times:
        if name == "dense" and side > 48:
            continue
        A = Dense(C_side.to_dense()) if name == "dense" else C_side
        log_likelihood(A, f)
        start = time.perf_counter()
        log_likelihood(A, f)
        times[name].append(time.perf_counter() - start)

fig, axes = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
axes[0].imshow(field.view(sizes), cmap="viridis")
axes[0].set_title("the field: lengths 4 (down) and 12 (across)", fontsize=10)
below = surface - surface.max()
contours = axes[1].contourf(grid, grid, below, levels=[-0.4, -0.2, -0.1, -0.05, -0.02, -0.01, 0], extend="min")
axes[1].plot(*true_lengths.flip(0), "w*", markersize=13, markeredgecolor="k", label="true")
axes[1].plot(*fitted.flip(0), "rx", markersize=9, label="fitted by gradient")
axes[1].set(xlabel="length across", ylabel="length down", ylim=(2, 20))
axes[1].set_title("log-likelihood per point, below its maximum", fontsize=10)
axes[1].legend(loc="upper right")
fig.colorbar(contours, ax=axes[1])
for (name, values), marker in zip(times.items(), "os", strict=True):
    axes[2].loglog([side**2 for side in sides[: len(values)]], values, marker=marker, label=name)
axes[2].set(xlabel="points of the grid", ylabel="seconds")
axes[2].set_title("one solve and one determinant", fontsize=10)
axes[2].grid(alpha=0.3)
axes[2].legend()
plt.show()

# %%
# Products
# --------
#
# ``@`` of two structured matrices is a structured matrix. Where the family is closed the factors are multiplied
# (``Diagonal @ Diagonal`` is a ``Diagonal``); elsewhere the product keeps its factors, and a solve or a determinant
# goes through them one by one.

generator = torch.Generator().manual_seed(2)
n = 1024
M = Monarch.random((n, n), nblocks=32, generator=generator)
D = Diagonal(1 + torch.rand(n, generator=generator))
P = Permutation.random((n, n), generator=generator)
A = M @ D @ P @ D.inverse()
print(A)
print("factors:", ", ".join(type(factor).__name__ for factor in A.factors))
print(f"{A.num_params:,} parameters and {A.flops:,} operations a product; dense {n * n:,} and {2 * n * n:,}")

# %%
# Each operation against the dense one, as a relative error in Frobenius norm. The error of a solve or an inverse is up
# to rounding error times condition number, in the structured as in the dense computation.

W = A.to_dense()
x = torch.randn(n, 3, generator=generator)


def error(found, reference):
    """Relative Frobenius error."""
    return (torch.linalg.vector_norm(found - reference) / torch.linalg.vector_norm(reference)).item()


errors = {
    "A @ x": error(A @ x, W @ x),
    "A.mT @ x": error(A.mT @ x, W.mT @ x),
    "(A @ A) @ x": error((A @ A) @ x, W @ (W @ x)),
    "(2 * A - M) @ x": error((2 * A - M) @ x, 2 * (W @ x) - M.to_dense() @ x),
    "A.solve(x)": error(A.solve(x), torch.linalg.solve(W, x)),
    "A.inverse() @ x": error(A.inverse() @ x, torch.linalg.inv(W) @ x),
    "A.slogdet()": error(A.slogdet()[1], torch.linalg.slogdet(W)[1]),
    "A.diagonal()": error(A.diagonal(), W.diagonal()),
}
for name, value in errors.items():
    print(f"{name:16} {value:.1e}")
print(f"condition number {torch.linalg.cond(W):.1e}")

# %%
# A solve with the sum of two structured matrices has no direct method, and the library does not fall back on a dense
# one: it says so.

try:
    (A + M).solve(x)
except NotImplementedError as refusal:
    print(refusal)

# %%
# An iterative method then does it. ``to_scipy`` hands any structured matrix to SciPy's.

from scipy.sparse.linalg import gmres

S = Diagonal(torch.full((n,), 4.0)) + M
solution, info = gmres(S.to_scipy(), x[:, 0].numpy(), rtol=1e-12)
assert info == 0
print(f"gmres: error {error(torch.from_numpy(solution), torch.linalg.solve(S.to_dense(), x[:, 0])):.1e}")

torch.set_default_dtype(torch.float32)  # as it was: other examples may run after this one
