"""The triangular matrix of a factored polynomial basis: Kronecker-structured stages, one for every digit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn.functional import pad

from structmat._checks import check_int
from structmat.base import StructuredMatrix, matrix, static
from structmat.matrices.block_diagonal import BlockDiagonal
from structmat.matrices.butterfly import Butterfly
from structmat.matrices.causal._echo import echo
from structmat.matrices.causal._evaluation import evaluation
from structmat.matrices.displacement._convolution import LinAlgError, values_visible, working
from structmat.matrices.monarch_p import check_radix
from structmat_kernels.kronecker_sparse import kronecker_sparse

SCHEMES = ("fourier", "chebyshev")


def no_autocast(x: Tensor) -> torch.autocast:
    """A region for x's device without autocast, which knows no meta device."""
    return torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False)


@matrix
class CausalBasis(StructuredMatrix):
    """The lower triangular n x n matrix L of a polynomial basis that factors over the digits of its index.

    ``q_j(Z) = prod_a phi_{j_a | j_<a}(Y_a)`` in mixed radix, digit 0 least significant, w_a = n_0 ... n_{a-1}. Of
    scheme "fourier", Y_a = Z^(w_a), phi_i is a combination of the powers Y_a^d with d >= i, and column j of L has q_j's
    coefficients: valuation j. Of scheme "chebyshev", Y_a = T_{w_a}(Z), phi_i is a combination of tau_d(Y_a), d <= i,
    with tau_0 = 1 and tau_d = 2 T_d, and L has the coefficients of q_j in the tau_i(Z), backwards: entry (t, s) is that
    of tau_{offset + n - 1 - t} in q_{offset + n - 1 - s}. Where n + offset is less than N = prod n_a, L is a diagonal
    block of the N x N matrix, and blocks are read at the values of the top digit that occur in it. All blocks the
    identity give L = I of scheme "fourier".

    A product takes one small block product a digit, at most N sum_a n_a multiplications in all. Solves multiply by the
    inverses of the blocks, which are computed once for all vectors. Of the blocks only the lower ("fourier") or the
    upper triangle ("chebyshev") is read, as in ``torch.linalg.solve_triangular``. See the page on causal Monarch maps.

    Args:
        stages: for digit a a :class:`BlockDiagonal` or a tensor of its blocks [j_<a, d, j_a]: shape
            (*batch, prod_{b<a} n_b, n_a, n_a), all of the same batch.
        scheme: "fourier" or "chebyshev".
        n: size, N - offset by default.
        offset: of scheme "chebyshev", the smallest index; 0 of the other.

    Raises:
        TypeError: if dtypes differ or n is not an integer.
        ValueError: if a stage has another number of blocks, blocks are not square, batches or devices differ,
            n + offset exceeds N, or the scheme is unknown.

    Example:
        >>> import torch, structmat
        >>> B = structmat.CausalBasis((torch.eye(2)[None], torch.tensor([[1.0, 0.0], [0.5, 1.0]]).expand(2, 2, 2)))
        >>> B.to_dense()
        tensor([[1.0000, 0.0000, 0.0000, 0.0000],
                [0.0000, 1.0000, 0.0000, 0.0000],
                [0.5000, 0.0000, 1.0000, 0.0000],
                [0.0000, 0.5000, 0.0000, 1.0000]])
    """

    stages: tuple[BlockDiagonal, ...]
    scheme: str = static(default="fourier")
    n: int = static(default=None)
    offset: int = static(default=0)

    def __post_init__(self) -> None:
        if self.scheme not in SCHEMES:
            raise ValueError(f"scheme must be one of {SCHEMES}, got {self.scheme!r}")
        if not isinstance(self.stages, (tuple, list)) or not self.stages:
            raise TypeError(f"stages must be a non-empty tuple of block-diagonal matrices, got {self.stages!r}")
        stages = tuple(s if isinstance(s, BlockDiagonal) else BlockDiagonal(s) for s in self.stages)
        object.__setattr__(self, "stages", stages)
        count, first = 1, stages[0].blocks
        for a, s in enumerate(stages):
            k, q, p = s.blocks.shape[-3:]
            if q != p or k != count or s.shape[-2:] != (k * q, k * p):
                raise ValueError(
                    f"stage {a} must have {count} uncropped square blocks, one for every value of the lower digits, "
                    f"got blocks of shape {tuple(s.blocks.shape)}"
                )
            if s.dtype != first.dtype:
                raise TypeError(f"stage {a} has dtype {s.dtype} but stage 0 has {first.dtype}")
            if s.device != first.device or s.batch_shape != stages[0].batch_shape:
                raise ValueError(
                    f"stages must share batch and device, got {tuple(s.batch_shape)} on {s.device} in stage {a} and "
                    f"{tuple(stages[0].batch_shape)} on {first.device} in stage 0"
                )
            count *= p
        check_int("offset", self.offset, 0)
        if self.offset and self.scheme == "fourier":
            raise ValueError(f'offset must be 0 of scheme "fourier", got {self.offset}')
        n = check_int("n", count - self.offset if self.n is None else self.n)
        if n + self.offset > count:
            raise ValueError(
                f"n + offset must be at most the product of the radices {self.radix}, {count}, got {n} + {self.offset}"
            )
        object.__setattr__(self, "n", n)

    @property
    def radix(self) -> tuple[int, ...]:
        """``(n_0, ..., n_{p-1})``."""
        return tuple([s.blocks.shape[-1] for s in self.stages])

    @property
    def points(self) -> int:
        """The product of the radices."""
        return math.prod(self.radix)

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.stages[0].blocks.shape[:-3], self.n, self.n))

    def triangles(self) -> list[Tensor]:
        """The blocks of every digit without the triangle that is not read."""
        return [self._triangle(s.blocks) for s in self.stages]

    def _triangle(self, blocks: Tensor) -> Tensor:
        return blocks.tril() if self.scheme == "fourier" else blocks.triu()

    @property
    def places(self) -> tuple[int, int]:
        """First and last plus one of the values that the top digit of offset, ..., offset + n - 1 has.

        Of its blocks no other rows and columns are read.
        """
        lower = self.points // self.radix[-1]
        return self.offset // lower, -(-(self.offset + self.n) // lower)

    def _blocks(self) -> list[Tensor]:
        """Of every digit; of the top one the rows and columns that are read."""
        first, last = self.places
        blocks = [s.blocks for s in self.stages]
        return [*blocks[:-1], blocks[-1][..., first:last, first:last]]

    # ---------------------------------------------------------------- products
    def _stages(self, x: Tensor, transposed: bool, inverse: bool) -> Tensor:
        """Digit by digit over the last dimension: S_0 S_1 ... S_{p-1} or what is asked for of it."""
        blocks = self._blocks()
        for b in blocks if transposed != inverse else reversed(blocks):
            if inverse:  # once for all vectors; it reads the triangle only, and has no half precision
                wide = working(b)
                eye = torch.eye(b.shape[-1], dtype=wide.dtype, device=b.device)
                b = torch.linalg.solve_triangular(wide, eye, upper=self.scheme == "chebyshev").to(b.dtype)
            else:
                b = self._triangle(b)
            b = b.mT if transposed else b
            width = b.shape[-1] * b.shape[-3]
            rows = x.unflatten(-1, (x.shape[-1] // width, width)).flatten(-3, -2)  # higher digits are more tokens
            rows = kronecker_sparse(rows, b.unsqueeze(-4))
            x = rows.unflatten(-2, (-1, x.shape[-1] // width)).flatten(-2)
        return x

    def _apply(self, x: Tensor, transposed: bool = False, inverse: bool = False) -> Tensor:
        """L, its transpose or their inverses times every row of x, shape (*batch, tokens, n)."""
        if inverse:
            self._check_diagonal()
        batch = len(self.batch_shape)
        lead = x.shape[: max(x.ndim - 2 - batch, 0)]
        with no_autocast(x):  # which casts one stage's result and not the next stage
            if not lead:
                return self._rows(x, transposed, inverse)
            # Dimensions that the blocks do not have are tokens: a matmul would copy the blocks for each of them.
            first, last = tuple(range(len(lead))), tuple(range(batch, batch + len(lead)))
            rows = x.movedim(first, last).flatten(batch, batch + len(lead))
            y = self._rows(rows, transposed, inverse)
            return y.unflatten(batch, (*lead, x.shape[-2])).movedim(last, first)

    def _rows(self, x: Tensor, transposed: bool, inverse: bool) -> Tensor:
        backwards, (first, last) = self.scheme == "chebyshev", self.places
        radix, lower = (*self.radix[:-1], last - first), self.points // self.radix[-1]
        # A diagonal block of a triangular matrix: zeros go in, what comes out besides is dropped.
        before = self.offset - first * lower
        after = (last - first) * lower - before - self.n
        x = x.flip(-1) if backwards else x
        x = pad(x, (before, after)) if before or after else x
        if not backwards:
            x = self._stages(x, transposed, inverse)
        elif transposed == inverse:
            x = echo(self._stages(x, transposed, inverse), radix, transposed, inverse)
        else:
            x = self._stages(echo(x, radix, transposed, inverse), transposed, inverse)
        x = x[..., before : before + self.n]
        return x.flip(-1) if backwards else x

    def _check_diagonal(self) -> None:
        if values_visible(self.stages[0].blocks):
            for a, b in enumerate(self._blocks()):
                if bool((b.diagonal(dim1=-2, dim2=-1) == 0).any()):
                    raise LinAlgError(f"the blocks of stage {a} have a zero on their diagonal: the basis is singular")

    def _linear(self, x: Tensor) -> Tensor:
        return self._apply(x)

    def _linear_mT(self, x: Tensor) -> Tensor:
        return self._apply(x, transposed=True)

    def _solve(self, b: Tensor) -> Tensor:
        return self._apply(b.mT, inverse=True).mT

    def _solve_mT(self, b: Tensor) -> Tensor:
        return self._apply(b.mT, transposed=True, inverse=True).mT

    def diagonal(self) -> Tensor:
        found = torch.ones((), dtype=self.dtype, device=self.device)
        for s in self.stages:  # (*batch, j_<a, j_a) to the index j_<a + w_a j_a
            blocks = s.blocks.diagonal(dim1=-2, dim2=-1)
            found = (blocks.mT * found.unflatten(-1, (1, -1)) if found.ndim else blocks.mT * found).flatten(-2)
        found = found[..., self.offset : self.offset + self.n]
        return found.flip(-1) if self.scheme == "chebyshev" else found

    def slogdet(self) -> tuple[Tensor, Tensor]:
        self._check_factorisable("slogdet")
        diagonal = self.diagonal()
        return diagonal.sgn().prod(-1), diagonal.abs().log().sum(-1)

    @property
    def flops(self) -> int:
        radix = [b.shape[-1] for b in self._blocks()]
        points = math.prod(radix)
        adds = points * (len(radix) - 1) if self.scheme == "chebyshev" else 0
        return math.prod(self.batch_shape) * (2 * points * sum(radix) + adds)

    @property
    def _solve_flops(self) -> int:
        return self.flops + sum([b.numel() * b.shape[-1] for b in self._blocks()])  # which are inverted

    # ---------------------------------------------------------------- as polynomials
    def evaluation(self) -> Butterfly:
        """M, the values of q_0, ..., q_{N-1} at the nodes, a Monarch matrix of order p (see :func:`MonarchP`).

        Of scheme "chebyshev", at the N roots of T_N. Of scheme "fourier", at the 2 N roots of unity of order 2 N: the
        top digit has twice its values, and phi_i(Y) = Y^i for the new ones, which products of the others need not know.
        """
        blocks = self.triangles()
        if self.scheme == "fourier":
            top = pad(blocks[-1], (0, blocks[-1].shape[-1], 0, blocks[-1].shape[-1]))
            one = torch.arange(top.shape[-1], device=top.device) >= blocks[-1].shape[-1]
            blocks[-1] = top + torch.diag(one.to(top.dtype))
        return evaluation(blocks, self.scheme)

    def condition_bound(self) -> Tensor:
        """A bound of the spectral condition number of L, shape (*batch,): the product of those of the blocks' stages.

        At the cost of the singular values of the blocks. Of scheme "chebyshev" times that of the change of basis.
        """
        self._check_factorisable("condition_bound")
        blocks = self._blocks()
        ranges = [torch.linalg.svdvals(self._triangle(b)) for b in blocks]
        bound = math.prod([v[..., 0].amax(-1) / v[..., -1].amin(-1) for v in ranges])
        if self.scheme == "chebyshev":
            for a in range(1, len(blocks)):
                bound = bound * 2 * math.prod([b.shape[-1] for b in blocks[a:]])
        return bound  # pyright: ignore[reportReturnType]

    # ---------------------------------------------------------------- construction
    @classmethod
    def identity(
        cls,
        radix: Sequence[int],
        scheme: str = "fourier",
        n: int | None = None,
        offset: int = 0,
        *,
        batch: tuple[int, ...] = (),
        dtype: torch.dtype | None = None,
        device: Any = None,
    ) -> Self:
        """The basis all of whose blocks are the identity: powers of Z, or products of Chebyshev polynomials."""
        stages, count = [], 1
        for r in check_radix(radix):
            eye = torch.eye(r, dtype=dtype, device=device)
            stages.append(BlockDiagonal(eye.repeat(*batch, count, 1, 1)))
            count *= r
        return cls(tuple(stages), scheme, n, offset)  # pyright: ignore[reportArgumentType]
