r"""
Run a layer by its kernels
==========================

A structured layer is called in one way on every device. On a CUDA device that has them its product runs as Triton
kernels, everywhere else as plain PyTorch, which is the definition. This page runs a Monarch layer, checks values and
gradients against the dense product in double precision, shows the switch between the two implementations, and draws
from measured files how fast the kernels are, and where a dense layer is faster.

The page was built on the device that the first lines print; the script runs unchanged on another one.
"""

import csv
import json
from pathlib import Path

import matplotlib.pyplot as plt
import torch

from structmat import Monarch
from structmat.nn import MonarchLinear
from structmat.testing import TOLERANCES, relative_error
from structmat_kernels.backend import use_triton
from structmat_kernels.monarch import monarch

# %%
# The same call everywhere
# ------------------------
#
# ``A.linear(x, bias)`` is ``F.linear(x, W, bias)`` for the dense matrix W of A, without making W. Which implementation
# runs depends on the device and the dtype: the kernels take bfloat16, float16 and float32 on CUDA. The errors are
# relative Frobenius errors, :math:`\|y - y_{64}\|_F / \|y_{64}\|_F`, against the dense product in double precision.

device = "cuda" if torch.cuda.is_available() else "cpu"
print(torch.cuda.get_device_name() if device == "cuda" else "no CUDA device: plain PyTorch runs")
torch.manual_seed(0)
A = Monarch.random((1000, 768), nblocks=32, device=device, dtype=torch.float64)
x = torch.randn(256, 768, device=device, dtype=torch.float64)
bias = torch.randn(1000, device=device, dtype=torch.float64)


def dense_linear(A, x, bias):
    """The product by the dense matrix, in double precision."""
    return x.double() @ A.to(torch.float64).to_dense().mT + bias.double()


for dtype in (torch.float64, torch.float32, torch.bfloat16):
    operands = A.to(dtype), x.to(dtype), bias.to(dtype)
    y = operands[0].linear(*operands[1:])
    error = relative_error(y, dense_linear(*operands))
    assert y.dtype == dtype and error <= TOLERANCES[dtype]
    which = "Triton kernels" if use_triton(None, operands[1]) else "plain PyTorch"
    print(f"{dtype!s:15} {which:14} error {error:.1e}")

# %%
# The switch
# ----------
#
# The operations beneath take plain tensors and ``backend=``. ``"auto"``, the default, runs the kernels where they can
# run and the definition elsewhere; ``"torch"`` always runs the definition; ``"triton"`` raises where the kernels
# cannot run, and says why. The environment variable ``STRUCTMAT_BACKEND`` replaces the default, and is read once, when
# the package is imported: ``STRUCTMAT_BACKEND=torch python train.py`` turns every kernel off in a program that knows
# nothing of backends.

A, x, bias = A.to(torch.float32), x.float(), bias.float()
exact = dense_linear(A, x, bias)
for backend in ("auto", "torch", "triton"):
    try:
        y = monarch(x, A.left, A.right, A.nrows, bias, backend=backend)
    except ValueError as refusal:
        print(f"{backend:6} refused: {refusal}")
    else:
        error = relative_error(y, exact)
        assert error <= TOLERANCES[torch.float32]
        print(f"{backend:6} error {error:.1e}")

# %%
# Gradients
# ---------
#
# They reach the input, both factors and the bias, by kernels where the product ran by kernels. The reference is the
# gradient through the dense matrix of the same factors, in double precision.

names = ("x", "left", "right", "bias")
tensors = [t.requires_grad_() for t in (x, A.left, A.right, bias)]
doubles = [t.detach().double().requires_grad_() for t in tensors]
cotangent = torch.randn_like(exact, dtype=torch.float32)


def gradients(tensors, product, cotangent):
    """Gradients of a product of a Monarch matrix, given by its factors."""
    x, left, right, bias = tensors
    y = product(Monarch(left, right, A.nrows, A.ncols), x, bias)
    return torch.autograd.grad(y, tensors, cotangent)


found = gradients(tensors, Monarch.linear, cotangent)
expected = gradients(doubles, dense_linear, cotangent.double())
for name, f, e in zip(names, found, expected, strict=True):
    error = relative_error(f, e)
    assert error <= TOLERANCES[torch.float32]
    print(f"{name:6} {tuple(f.shape)!s:14} error {error:.1e}")

# %%
# Compiled
# --------
#
# A module compiles without a break of the graph, kernels included: they are operations that ``torch.compile`` knows.
# The backend ``"aot_eager"`` traces forward and backward and needs no compiler; without ``backend=`` Inductor generates
# code for the rest of a network around them.

layer = MonarchLinear(768, 1000, nblocks=32, device=device)
compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
inputs, parameters = x.detach(), tuple(layer.parameters())
results = {}
for name, module in (("eager", layer), ("compiled", compiled)):
    y = module(inputs)
    results[name] = [y.detach(), *torch.autograd.grad(y.square().mean(), parameters)]
difference = max(relative_error(c, e) for c, e in zip(results["compiled"], results["eager"], strict=True))
assert difference <= TOLERANCES[torch.float32]
print(f"largest difference of compiled and eager outputs and gradients: {difference:.1e}")

# %%
# Is it faster?
# -------------
#
# Not always. The figure is drawn from the results that are committed with the library, measured by
# ``benchmarks/kernels.py``: GPU time of square layers in bfloat16 over that of ``F.linear`` in the same dtype, by the
# number T of tokens. Below the line a dense layer is faster.

here = Path.cwd()  # anywhere in a checkout
root = next(folder for folder in (here, *here.parents) if (folder / "benchmarks" / "results").is_dir())
path = root / "benchmarks" / "results" / "kernels-h100-all.csv"
facts = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
with path.open(newline="", encoding="utf-8") as file:
    rows = [r for r in csv.DictReader(file) if (r["operation"], r["dtype"], r["status"]) == ("linear", "bf16", "ok")]

structures = {"Monarch sqrt(n) blocks": ("tab:blue", "o"), "Monarch 4 blocks": ("tab:red", "s")}
directions = {"forward": "forward", "forward+backward": "forward and backward"}
fig, axes = plt.subplots(1, 2, figsize=(11, 4.6), sharey=True, layout="constrained")
for ax, (direction, title) in zip(axes, directions.items(), strict=True):
    for name, (color, marker) in structures.items():
        for tokens, style in ((8192, "-"), (32768, ":")):
            points = sorted(
                (int(r["inputs"]), float(r["speedup"]))
                for r in rows
                if (r["alternative"], r["direction"], int(r["tokens"])) == (name, direction, tokens)
                and r["inputs"] == r["outputs"]
            )
            assert len(points) > 1
            label = f"{name.replace('sqrt(n)', '√n')}, T = {tokens}"
            ax.plot(*zip(*points, strict=True), style, color=color, marker=marker, markersize=5, label=label)
    ax.axhline(1, color="black", linewidth=1)
    ax.set_xscale("log", base=2)
    ax.set_yscale("log", base=2)
    ax.xaxis.set_major_formatter("{x:.0f}")
    ax.yaxis.set_major_formatter("{x:g}")
    ax.set_title(title)
    ax.set_xlabel("n")
    ax.grid(alpha=0.3)
bottom, top = axes[0].get_ylim()
for ax in axes:
    ax.axhspan(bottom, 1, color="0.92", zorder=0)
axes[0].set(ylabel="speed-up over dense", ylim=(bottom, top))
axes[1].text(0.98, 0.03, "slower than dense", transform=axes[1].transAxes, ha="right", fontsize=9)
fig.legend(*axes[0].get_legend_handles_labels(), ncols=2, loc="outside lower center", frameon=False)
fig.suptitle(f"{facts['device']}, torch {facts['torch']}, triton {facts['triton']}", fontsize=10)
plt.show()

# %%
# A dense layer is one large matrix product, which is what a GPU is made for. A Monarch layer saves arithmetic, much of
# it at large n and little at small n. Where it does not save enough, use a dense layer. All measurements below the
# line, with those of T = 4096, which the figure leaves out:

for r in sorted(rows, key=lambda r: (r["alternative"], int(r["inputs"]), int(r["tokens"]), r["direction"])):
    if r["alternative"] in structures and float(r["speedup"]) < 1:
        print(f"{r['alternative']:22}  n = {r['inputs']}  T = {r['tokens']:5}  {r['direction']:16}  {r['speedup']}")

# %%
# Speed alone is no reason for a Monarch layer. A low-rank layer with as many parameters stands beside each of them in
# the same file, and is two plain matrix products:

times = {(r["alternative"], r["inputs"], r["tokens"], r["direction"]): float(r["p50_us"]) for r in rows}
pairs = [(t, times["low rank, as large as " + k[0], *k[1:]]) for k, t in times.items() if k[0] in structures]
print(f"the low-rank layer takes less time in {sum(low < ours for ours, low in pairs)} of {len(pairs)} cases")

# %%
# The figure counts the time of the GPU. A plain eager call from Python takes host time besides, which a CUDA graph
# saves. Where it was measured, in microseconds, forward:

print(f"{'':22} {'n':>6} {'T':>6} {'GPU':>8} {'eager':>8}")
for r in rows:
    if r["eager_us"] and r["direction"] == "forward" and r["alternative"] in ("dense", *structures):
        sizes = f"{r['inputs']:>6} {r['tokens']:>6}"
        print(f"{r['alternative']:22} {sizes} {float(r['p50_us']):8.1f} {float(r['eager_us']):8.1f}")

# %%
# All measurements are on the page :doc:`/benchmarks`; how the kernels work is on the page :doc:`/kernels`.
