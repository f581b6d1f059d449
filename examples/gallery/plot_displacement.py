r"""
Low displacement rank
=====================

What the displacement of Toeplitz, Hankel, Vandermonde and Cauchy matrices looks like, what happens to it in products
and inverses, and what it is good for: solving, fitting a spectrum, continuing a series. The page
:doc:`/displacement` explains the family.
"""

import math
import time
from typing import Any

import matplotlib.pyplot as plt
import torch

from structmat import Cauchy, CausalToeplitz, Circulant, Diagonal, Hankel, Shift, Toeplitz, Vandermonde
from structmat.linalg import GMRES, ConvergenceError, solve
from structmat.numeric import levinson_durbin, pade, polynomial_evaluate, polynomial_multiply
from structmat.testing import relative_error

double: Any = {"dtype": torch.float64}
generator = torch.Generator().manual_seed(0)

# %%
# Displacements
# -------------
#
# A M - M B for four matrices of full rank. Under two shifts only edges are left of a Toeplitz and of a Hankel matrix,
# whose displacement has rank 2; under a diagonal matrix and a shift only the last column of a Vandermonde matrix, and
# under two diagonals a matrix of ones of a Cauchy matrix: rank 1.

n = 24
i = torch.arange(n, **double)
up, down = Shift(n, 1.0, **double), Shift(n, -1.0, **double)
nodes = torch.cos(math.pi * (i + 0.5) / n)
s, t = i + 0.25, i - 0.25
matrices = {
    "Toeplitz": (up, Toeplitz(torch.randn(n, generator=generator, **double), torch.exp(-i / 8)), down),
    "Hankel": (up, Hankel(torch.sin(i / 2), torch.cos(i / 3)), down.mT),
    "Vandermonde": (Diagonal(nodes), Vandermonde(nodes, n), down),
    "Cauchy": (Diagonal(s), Cauchy(s, t), Diagonal(t)),
}


def displacement(A, M, B):
    """Dense, with the number of singular values that are not rounding."""
    D = (A @ M).to_dense() - (M @ B).to_dense()
    values = torch.linalg.svdvals(D)
    return D, int((values > 1e-12 * values[0]).sum())


def draw(ax, matrix, title):
    scale = 0.6 * float(matrix.abs().max())
    ax.imshow(matrix, cmap="RdBu", vmin=-scale, vmax=scale, interpolation="nearest")
    ax.set_title(title, fontsize=9)
    ax.set_xticks([])
    ax.set_yticks([])


figure, axes = plt.subplots(2, 4, figsize=(9.2, 5), layout="constrained")
for column, (name, (A, M, B)) in zip(axes.T, matrices.items(), strict=True):
    D, rank = displacement(A, M, B)
    draw(column[0], M.to_dense(), name)
    draw(column[1], D, f"displacement, rank {rank}")
    assert rank == (2 if name in ("Toeplitz", "Hankel") else 1)

# %%
# Products and inverses
# ---------------------
#
# Nothing is constant along the diagonals of T T or of the inverse of T. Their displacements are still of low rank, and
# the classes know the generators: ``displacement_rank`` is a bound that needs no search.

T, H = matrices["Toeplitz"][1], matrices["Hankel"][1]
M = T.to_ldr()
results: dict[str, Any] = {
    "T T": M @ T,
    "T H": M @ H,
    "inverse of T": T.inverse(),
    "T T + inverse": M @ T + T.inverse(),
}
figure, axes = plt.subplots(2, 4, figsize=(9.2, 5), layout="constrained")
for column, (name, R) in zip(axes.T, results.items(), strict=True):
    rank = R.compress(1e-11).displacement_rank
    draw(column[0], R.to_dense(), f"{name}\n{type(R).__name__}")
    draw(column[1], R.displacement().to_dense(), f"rank {rank}, bound {R.displacement_rank}")
    assert rank <= R.displacement_rank
assert relative_error((T.inverse() @ T).to_dense(), torch.eye(n, **double)) < 1e-10

# %%
# Solving large systems
# ---------------------
#
# Where entries decay, a circulant matrix is a good preconditioner, and ``solve`` iterates; random Toeplitz matrices are
# eliminated by their generators. Times of one thread; the residuals are those of the largest size.

kinds = {
    "decaying": lambda k: Toeplitz((1 + k) ** -1.1, 0.7 * (1 + k) ** -1.3),
    "random": lambda k: Toeplitz.from_diagonals(torch.randn(2 * len(k) - 1, generator=generator, **double), len(k)),
}
sizes = [256, 512, 1024, 2048]
threads = torch.get_num_threads()
torch.set_num_threads(1)


def seconds(function):
    """The better of two, and the result."""
    times = []
    for _ in range(2):
        start = time.perf_counter()
        result = function()
        times.append(time.perf_counter() - start)
    return min(times), result


figure, ax = plt.subplots(figsize=(6, 3.6), layout="constrained")
for name, make in kinds.items():
    ours, dense = [], []
    for size in sizes:
        S, b = make(torch.arange(size, **double)), torch.randn(size, generator=generator, **double)
        ours.append(seconds(lambda S=S, b=b: S.solve(b)))
        dense.append(seconds(lambda S=S, b=b: torch.linalg.solve(S.to_dense(), b)))
    residuals = [relative_error(S @ x, b) for _, x in (ours[-1], dense[-1])]
    print(f"{name:9} n = {sizes[-1]}: {ours[-1][0] * 1e3:6.1f} ms, dense {dense[-1][0] * 1e3:6.1f} ms;", end=" ")
    print("residuals", ", ".join(f"{r:.0e}" for r in residuals))
    assert residuals[0] < 1e-11
    ax.loglog(sizes, [spent for spent, _ in ours], marker=".", label=f"Toeplitz.solve, {name}")
ax.loglog(sizes, [spent for spent, _ in dense], "k--", marker=".", label="dense LU")
ax.set_xlabel("n")
ax.set_ylabel("seconds")
ax.legend(fontsize=8)
torch.set_num_threads(threads)

# %%
# The iterations by themselves, without a preconditioner and with T. Chan's:

k = torch.arange(1024, **double)
S, b = kinds["decaying"](k), torch.randn(1024, generator=generator, **double)
for name, aid in (("none", None), ("T. Chan's", Circulant.from_toeplitz(S))):
    _, info = solve(S, b, GMRES(preconditioner=aid), return_info=True)
    print(f"preconditioner {name:10} {info.iterations:3} iterations, residual {float(info.residuals):.0e}")
try:
    solve(S, b, GMRES(max_iterations=5))
except ConvergenceError as error:
    print(error)

# %%
# The spectrum of a signal
# ------------------------
#
# Noise through a filter with two resonances, 1 / a(z): a solve with a causal Toeplitz matrix. Durbin's recursion finds
# autoregressive models of all orders from the autocorrelation; its reflection coefficients say that four are enough.
# The model's spectrum is near to the true one, the periodogram is noise around it.

poles = [(0.97, 0.11), (0.95, 0.19)]
a = torch.ones(1, **double)
for radius, frequency in poles:
    pair = torch.tensor([1.0, -2 * radius * math.cos(2 * math.pi * frequency), radius**2], **double)
    a = polynomial_multiply(a, pair)
length, order = 2000, 12
taps = torch.cat([a, torch.zeros(length - len(a), **double)])
signal = CausalToeplitz(taps).solve(torch.randn(length, generator=generator, **double))
autocorrelation = torch.stack([signal[k:] @ signal[: length - k] / length for k in range(order + 1)])
model = levinson_durbin(autocorrelation, 4)
print("true coefficients  ", (-a[1:]).round(decimals=3).tolist())
print("fitted coefficients", model.coefficients.round(decimals=3).tolist(), f"variance {float(model.variance):.3f}")
assert relative_error(model.coefficients, -a[1:]) < 0.1

frequencies = torch.linspace(0, 0.5, 400, **double)
circle = torch.polar(torch.ones_like(frequencies), -2 * math.pi * frequencies)


def spectrum(coefficients, variance):
    return variance / polynomial_evaluate(coefficients.to(circle.dtype), circle).abs().square()


figure, (left, right) = plt.subplots(1, 2, figsize=(9.2, 3.4), width_ratios=(2, 1), layout="constrained")
periodogram = torch.fft.rfft(signal).abs().square() / length
left.semilogy(torch.linspace(0, 0.5, len(periodogram)), periodogram, color="0.8", lw=0.6, label="periodogram")
left.semilogy(frequencies, spectrum(a, 1.0), "k--", label="true")
fitted = torch.cat([torch.ones(1, **double), -model.coefficients])
left.semilogy(frequencies, spectrum(fitted, model.variance), label="autoregressive, order 4")
left.set_ylim(1e-3)
left.set_xlabel("frequency")
left.legend(fontsize=8)
right.stem(range(1, order + 1), levinson_durbin(autocorrelation).reflection.abs())
right.set_xlabel("order")
right.set_ylabel("|reflection coefficient|")

# %%
# Beyond the circle of convergence
# --------------------------------
#
# Thirteen coefficients of log(1 + z). The series diverges for z > 1; the Padé approximant of degrees (6, 6), a solve
# with a 6 x 6 Toeplitz matrix, is off by less than 0.001 up to z = 8.

k = torch.arange(1, 13, **double)
series = torch.cat([torch.zeros(1, **double), -((-1) ** k) / k])
p, q = pade(series, 6, 6)
z = torch.linspace(0, 8, 200, **double)
exact = torch.log1p(z)
approximant = polynomial_evaluate(p, z) / polynomial_evaluate(q, z)
figure, ax = plt.subplots(figsize=(6, 3.4), layout="constrained")
ax.plot(z, exact, "k--", label="log(1 + z)")
ax.plot(z, approximant, label="Padé (6, 6)")
ax.plot(z, polynomial_evaluate(series, z), label="series of 13 terms")
ax.set_ylim(-0.5, 3)
ax.set_xlabel("z")
ax.legend(fontsize=8)
print(f"largest error for z in [0, 8]: {float((approximant - exact).abs().max()):.1e}")
assert (approximant - exact).abs().max() < 1e-3
plt.show()
