"""Run every kernel once on small awkward shapes, for a memory checker, and compare it with its reference.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 1 python benchmarks/memcheck.py

Without the caching allocator each tensor is an allocation of its own, so that an access past its end is seen.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from structmat_kernels.block_diagonal import block_diagonal
from structmat_kernels.block_sparse import BlockLayout, block_sparse
from structmat_kernels.fft_conv import fft_conv
from structmat_kernels.gated_gelu import gated_gelu
from structmat_kernels.hadamard import hadamard
from structmat_kernels.kronecker_merge import kronecker_merge
from structmat_kernels.kronecker_sparse import kronecker_sparse
from structmat_kernels.monarch import monarch, monarch_transposed
from structmat_kernels.short_conv import short_conv
from structmat_kernels.transpose import transpose

BOUND = {torch.float32: 5e-6, torch.float16: 3e-3, torch.bfloat16: 2e-2}


def cases(draw):
    """Name, function of (backend, *operands) and operands."""
    for l, s, r, k, q, p, m, n, T in (
        (16, 16, 16, 16, 16, 16, 256, 256, 300),
        (32, 32, 32, 32, 32, 32, 1024, 1000, 270),
        (6, 50, 20, 4, 30, 33, 299, 131, 70),
        (3, 7, 6, 2, 9, 5, 20, 9, 1),
        (64, 20, 40, 64, 40, 40, 1279, 2555, 133),
        (2, 150, 140, 2, 140, 130, 290, 255, 37),
        (2, 150, 140, 2, 140, 130, 290, 255, 170),
        (3, 150, 140, 6, 70, 40, 440, 235, 170),
    ):
        factors = draw(l, s, r) * r**-0.5, draw(k, q, p) * p**-0.5  # outputs of size one
        name = f"monarch {(l, s, r, k, q, p)}, {T} tokens"
        yield name, lambda b, x, L, R, m=m: monarch(x, L, R, m, backend=b), (draw(T, n), *factors)
        yield (
            name + ", bias and GELU",
            lambda b, x, L, R, c, m=m: monarch(x, L, R, m, c, "gelu", backend=b),
            (
                draw(T, n),
                *factors,
                draw(m),
            ),
        )
        yield (
            name + ", transposed",
            lambda b, y, L, R, n=n: monarch_transposed(y, L, R, n, backend=b),
            (
                draw(T, m),
                *factors,
            ),
        )
    for a, d, q, p in ((3, 40, 2, 2), (2, 17, 5, 3), (1, 20, 40, 33), (5, 1, 70, 61)):
        operands = draw(75, a * p * d), draw(a, d, q, p)
        yield f"kronecker {(a, d, q, p)}", lambda b, x, w: kronecker_sparse(x, w, backend=b), operands
    for mirror in (False, True):
        shapes = [(2, 3, 5, 14), (10, 7, 1, 2), (10, 2, 2, 1)]
        shapes = [(d, b, c, a) for a, b, c, d in shapes] if mirror else shapes
        yield (
            f"kronecker merge, mirror {mirror}",
            lambda b, *values, mirror=mirror: kronecker_merge(values, mirror, backend=b),
            tuple(draw(*shape) for shape in shapes),
        )
    for k, q, p in ((7, 5, 3), (3, 65, 100)):
        yield (
            f"block diagonal {(k, q, p)}",
            lambda b, x, w: block_diagonal(x, w, backend=b),
            (
                draw(75, k * p - 1),
                draw(k, q, p),
            ),
        )
    for n in (1, 64, 2048, 4096, 8192):
        yield f"hadamard {n}", lambda b, x, n=n: hadamard(x, scale=n**-0.5, backend=b), (draw(67, n),)
    for shape in ((67, 2), (3, 130), (9, 4098)):
        yield f"gated gelu {shape}", lambda b, x: gated_gelu(x, backend=b), (draw(*shape),)
    for shape in ((3, 67, 5), (1, 130, 64), (2, 8, 200)):
        yield (
            f"transpose {shape}",
            lambda b, x, y: transpose(x, y, backend=b),
            (draw(*shape), draw(*shape)),
        )
    for block in (16, 23, 64):
        mask = torch.rand(5, 7, generator=torch.Generator().manual_seed(block)) < 0.4
        shape = (5 * block - 3, 7 * block - 5)
        layout = BlockLayout.from_mask(mask, block, shape=shape).to(draw.device)
        operands = draw(75, shape[1]), draw(layout.nnz, block, block), draw(shape[0], 9), draw(9, shape[1])
        yield (
            f"block sparse {block}",
            lambda b, x, w, u, v, z=layout: block_sparse(x, w, z, u=u, v=v, backend=b),
            operands,
        )
    # Every radix, filters longer and shorter than the input, with a skip term, gates or neither.
    for batch, channels, n, taps, behind in (
        (1, 1, 1, 1, 0),
        (3, 2, 37, 3, 36),
        (5, 1, 250, 400, 0),
        (7, 2, 501, 17, 600),
        (2, 3, 1023, 1025, 0),
        (3, 1, 1999, 500, 1999),
        (5, 2, 4001, 4001, 0),
    ):
        name = f"long convolution {(batch, channels, n, taps, behind)}"
        u, k, skip = draw(batch, channels, n), draw(channels, taps) * taps**-0.5, draw(channels)
        rest = (draw(channels, behind) * behind**-0.5,) if behind else ()
        yield name, lambda b, u, k, *rev: fft_conv(u, k, *rev, backend=b), (u, k, *rest)
        gates = draw(batch, channels, n), draw(batch, channels, n)
        yield (
            name + ", gates",
            lambda b, u, k, skip, *more: fft_conv(u, k, more[2] if more[2:] else None, skip, *more[:2], backend=b),
            (u, k, skip, *gates, *rest),
        )
    for batch, channels, n, taps in ((2, 3, 1, 4), (3, 65, 77, 3), (2, 7, 1999, 8), (1, 130, 600, 1)):
        x, w, bias = draw(batch, channels, n), draw(channels, taps), draw(channels)
        name = f"short convolution {(batch, channels, n, taps)}"
        yield name, lambda b, x, w: short_conv(x, w, backend=b), (x, w)
        yield name + ", bias", lambda b, x, w, c: short_conv(x, w, c, backend=b), (x, w, bias)
        yield (
            name + ", channels last",
            lambda b, x, w, c: short_conv(x.mT, w, c, backend=b),
            (x.mT.contiguous(), w, bias),
        )


class Draw:
    """Seeded normal tensors."""

    def __init__(self, device: str, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator).to(self.device, self.dtype)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    names = [str(dtype).removeprefix("torch.") for dtype in BOUND]
    parser.add_argument("--dtype", nargs="+", default=names, choices=names, help="(default: all)")
    args = parser.parse_args()
    wrong = 0
    for dtype in (getattr(torch, name) for name in args.dtype):
        bound = BOUND[dtype]
        for name, function, operands in cases(Draw(args.device, dtype)):
            found, expected = (
                differentiated(lambda *t, b=b, f=function: f(b, *t), [t.to(d) for t in operands])
                for b, d in (("triton", dtype), ("torch", torch.float64))
            )
            pairs = zip(found, expected, strict=True)
            error = max(((f.double() - e).norm() / e.norm().clamp_min(1e-30)).item() for f, e in pairs)
            if not error <= bound:
                wrong += 1
                print(f"wrong: {dtype} {name}: {error:.1e}")
        print(f"{dtype}: done", flush=True)
    raise SystemExit(wrong > 0)


def differentiated(function, operands: list[Tensor]) -> list[Tensor]:
    """The value and the gradients for a fixed cotangent."""
    leaves = [t.detach().requires_grad_() for t in operands]
    y = function(*leaves)
    cotangent = torch.linspace(-1, 1, y.numel(), device=y.device).sin().reshape(y.shape).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, leaves, cotangent)]


if __name__ == "__main__":
    main()
