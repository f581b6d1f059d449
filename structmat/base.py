"""The protocol: a structured matrix is a frozen value whose tensor fields are its factors.

A class derives from :class:`StructuredMatrix`, is decorated by :func:`matrix`, and defines ``shape``, ``_linear`` and
either ``mT`` (where the family is closed under transposition) or ``_linear_mT``. Everything else follows.
"""

from __future__ import annotations

import functools
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from structmat._autocast import autocast_dtype, match_bias
from structmat._checks import as_scalar, check_broadcast, check_same, check_tensor
from structmat.value import FactorValue, matrix, static

__all__ = ["LINEAR_STD", "StructuredMatrix", "autocast_dtype", "matrix", "static"]

#: Standard deviation of the outputs of a freshly initialised ``nn.Linear`` for inputs from N(0, 1).
LINEAR_STD = 3.0**-0.5


class StructuredMatrix(FactorValue):
    """An m x n matrix held as factors; the base class of every family (see the module's text for what to define).

    ``A.shape`` is ``(*batch, out, in)``, as ``nn.Linear.weight``. Products follow ``torch.matmul``: batch dimensions
    broadcast, dtypes and devices must agree. Inside an autocast region float32, float16 and bfloat16 operands are cast
    to the region's dtype as ``F.linear`` does; nowhere else is anything cast, padded or densified.

    Example:
        >>> import torch, structmat
        >>> A = structmat.Monarch.random((6, 10), nblocks=2)
        >>> A.linear(torch.ones(3, 10)).shape, (A @ torch.ones(10, 4)).shape, A.mT.shape
        (torch.Size([3, 6]), torch.Size([6, 4]), torch.Size([10, 6]))
    """

    # NumPy must hand `ndarray @ A` to __rmatmul__, not build an object array.
    __array_ufunc__ = None

    # ---------------------------------------------------------------- what a class defines
    def _linear(self, x: Tensor) -> Tensor:
        """``x @ A.mT`` for a checked x of shape (*batch, tokens, columns)."""
        raise NotImplementedError(f"{type(self).__name__} must define _linear")

    def _linear_bias(self, x: Tensor, bias: Tensor) -> Tensor:
        """``x @ A.mT + bias`` for a checked x and a bias of its dtype; classes whose kernels add it override."""
        return self._linear(x) + bias

    def _linear_mT(self, x: Tensor) -> Tensor:
        """``x @ A`` for a checked x of shape (*batch, tokens, rows)."""
        transposed = self.mT
        if getattr(transposed, "base", None) is self:
            raise NotImplementedError(f"{type(self).__name__} must define mT or _linear_mT")
        return transposed._linear(x)

    def _solve(self, b: Tensor) -> Tensor:
        """``A^-1 b`` for a checked b of shape (*batch, n, k)."""
        raise NotImplementedError(
            f"{type(self).__name__} has no direct solver; for a dense solve write torch.linalg.solve(A.to_dense(), b)"
        )

    def _solve_mT(self, b: Tensor) -> Tensor:
        """``A.mT^-1 b`` for a checked b of shape (*batch, n, k)."""
        transposed = self.mT
        if getattr(transposed, "base", None) is self:
            raise NotImplementedError(f"{type(self).__name__} has no direct solver for its transpose")
        return transposed._solve(b)

    def _scale(self, scalar: Tensor) -> StructuredMatrix:
        """``scalar * A``; closed families override."""
        from structmat.lazy import Scaled

        return Scaled(self, scalar)

    def _compose(self, other: StructuredMatrix) -> StructuredMatrix | None:
        """``A @ other`` in closed form, or None."""
        return None

    def _rcompose(self, other: StructuredMatrix) -> StructuredMatrix | None:
        """``other @ A`` in closed form, or None."""
        return None

    def _add(self, other: StructuredMatrix) -> StructuredMatrix | None:
        """``A + other`` in closed form, or None."""
        return None

    @property
    def flops(self) -> int:
        """Multiplications plus additions of one product with a vector, summed over the batch.

        Of a complex matrix, complex ones: about four times as many real operations.
        """
        raise NotImplementedError(f"{type(self).__name__} does not state its flops")

    @property
    def _solve_flops(self) -> int:
        """Operations of one solve with a vector, factorisation included."""
        raise NotImplementedError(f"{type(self).__name__} does not state the flops of a solve")

    def randomize_(self, std: float = LINEAR_STD, generator: torch.Generator | None = None) -> Self:
        """Fill the factors in place so that N(0, 1) inputs give outputs of standard deviation ``std``.

        Args:
            std: the outputs' standard deviation; the default is that of a fresh ``nn.Linear``.
            generator: source of randomness.

        Returns:
            The same value.
        """
        raise NotImplementedError(f"{type(self).__name__} cannot be initialised at random")

    def conj(self) -> Self:
        """The complex conjugate (the same value for a real matrix)."""
        # Of tensors and of nested matrices, which may have a rule of their own.
        return self._map_children(lambda c: c.conj()) if self.dtype.is_complex else self

    # ---------------------------------------------------------------- products
    def _prepare(self, name: str, x: Any, axis: int, size: int, vector: bool = False) -> tuple[Self, Tensor]:
        """Check an operand whose dimension ``axis`` (-1 or -2) must be ``size``; cast both inside autocast.

        With ``vector``, x is a batch of vectors (*batch, size) and comes back as rows (*batch, 1, size).
        """
        check_tensor(name, x, 1 if axis == -1 else 2)
        if x.shape[axis] != size:
            raise ValueError(
                f"{name} must have size {size} in dimension {axis} to meet a matrix of shape {tuple(self.shape)}, "
                f"got shape {tuple(x.shape)}"
                + ("; for vectors in the last dimension, use A.linear(X)" if axis == -2 and x.shape[-1] == size else "")
            )
        value, cast_to = self, autocast_dtype(x.device)
        if cast_to is not None:
            low = (torch.float32, torch.float16, torch.bfloat16)
            x = x.to(cast_to) if x.dtype in low else x
            value = self._to(None, cast_to) if self.dtype in low else self
        if x.dtype != value.dtype:
            raise TypeError(
                f"{name} has dtype {x.dtype} but the {type(self).__name__} has {value.dtype}; convert one of them "
                "with .to(dtype)"
            )
        if x.device != value.device:
            raise ValueError(
                f"{name} is on {x.device} but the {type(self).__name__} is on {value.device}; move one of them "
                "with .to(device)"
            )
        if vector:
            x = x.unsqueeze(-2)
        if value.ndim > 2 and x.ndim > 2:
            check_broadcast(name, x.shape[:-2], type(self).__name__, value.batch_shape)
        return value, x

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """``x @ A.mT + bias``: the matrix applied over the last dimension, as ``F.linear(x, weight, bias)``.

        Args:
            x: shape (n,) or (*batch, tokens, n), dtype and device of the matrix. Without batch dimensions in the
                matrix any leading dimensions do; with them they broadcast as in ``torch.matmul(x, A.mT)``.
            bias: shape (m,) and dtype of the matrix, or None. Inside an autocast region it is cast as x is.

        Returns:
            Shape (m,) or (*batch, tokens, m).

        Raises:
            ValueError: if the last dimension is not n, batches do not broadcast, or devices differ.
            TypeError: if x is not a tensor, or x or bias has another dtype.
        """
        value, x = self._prepare("x", x, -1, self.shape[-1])
        rows = x if x.ndim > 1 else x.unsqueeze(0)
        if bias is None:
            y = value._linear(rows)
        else:
            if bias.shape != self.shape[-2:-1]:
                raise ValueError(f"bias must have shape ({self.shape[-2]},), got {tuple(bias.shape)}")
            y = value._linear_bias(rows, match_bias(bias, rows))
        return y if x.ndim > 1 else y.squeeze(-2)

    def matvec(self, v: Tensor) -> Tensor:
        """``A v`` for v of shape (*batch, n); the result has shape (*batch, m)."""
        value, row = self._prepare("v", v, -1, self.shape[-1], vector=True)
        return value._linear(row).squeeze(-2)

    def matmul(self, X: Tensor) -> Tensor:
        """``A X`` for X of shape (*batch, n, k); the result has shape (*batch, m, k)."""
        value, X = self._prepare("X", X, -2, self.shape[-1])
        return value._linear(X.mT).mT

    def rmatvec(self, v: Tensor) -> Tensor:
        """``A^H v`` for v of shape (*batch, m), the adjoint product as in SciPy; the result has shape (*batch, n)."""
        return self.H.matvec(v)

    def rmatmul(self, X: Tensor) -> Tensor:
        """``A^H X`` for X of shape (*batch, m, k), the adjoint product; the result has shape (*batch, n, k)."""
        return self.H.matmul(X)

    @property
    def mT(self) -> StructuredMatrix:
        """The transpose over the last two dimensions, never through dense.

        It costs what the matrix costs. Of a rectangular sum or multiple the few additions or multiplications of the
        result differ, of a rectangular Kronecker product the sizes between the factors: ``A.mT.flops`` says.
        """
        from structmat.lazy import Transposed

        return Transposed(self)

    @property
    def T(self) -> StructuredMatrix:
        """The transpose of a matrix without batch dimensions."""
        if self.ndim != 2:
            raise ValueError(f".T is for matrices without batch dimensions, got shape {tuple(self.shape)}; use .mT")
        return self.mT

    @property
    def H(self) -> StructuredMatrix:
        """The conjugate transpose over the last two dimensions."""
        return self.mT.conj()

    # ---------------------------------------------------------------- entries
    def to_dense(self) -> Tensor:
        """The dense tensor of shape (*batch, m, n), which may share memory with the factors; costs n products."""
        return self._linear(torch.eye(self.shape[-1], dtype=self.dtype, device=self.device)).mT

    def diagonal(self) -> Tensor:
        """The main diagonal, shape (*batch, min(m, n)); unless the class says better, at the cost of n products."""
        count, n, step = min(self.shape[-2:]), self.shape[-1], 256
        columns = torch.arange(n, device=self.device)
        pieces = []
        for start in range(0, count, step):  # in pieces: never more than `step` rows of the dense matrix in memory
            rows = torch.arange(start, min(start + step, count), device=self.device)
            basis = (rows[:, None] == columns).to(self.dtype)
            pieces.append(self._linear(basis)[..., start : start + len(rows)].diagonal(dim1=-2, dim2=-1))
        return torch.cat(pieces, -1)

    def trace(self) -> Tensor:
        """The sum of the main diagonal, shape (*batch,)."""
        return self.diagonal().sum(-1)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self.to_dense().cpu().numpy(), dtype=dtype)

    def to_scipy(self) -> Any:
        """A ``scipy.sparse.linalg.LinearOperator`` on the CPU that shares the factors (no batch dimensions).

        Raises:
            ValueError: if the matrix has batch dimensions.
        """
        from structmat.linalg.scipy import linear_operator

        return linear_operator(self)

    # ---------------------------------------------------------------- solving
    def _check_square(self, what: str) -> None:
        if self.shape[-1] != self.shape[-2]:
            raise ValueError(f"{what} needs a square matrix, got shape {tuple(self.shape)}")

    def _check_factorisable(self, what: str) -> None:
        self._check_square(what)
        if self.dtype in (torch.float16, torch.bfloat16):
            raise TypeError(
                f"{what} needs float32, float64 or complex factors, got {self.dtype}; use .to(torch.float32)"
            )

    def solve(self, b: Tensor) -> Tensor:
        """``A^-1 b``; b is a vector or a stack of columns by the rule of ``torch.linalg.solve``.

        Args:
            b: shape (n,) or (*batch, n) where batch is exactly the matrix's, else (*batch, n, k).

        Returns:
            The solution, of b's shape (with broadcast batch).

        Raises:
            ValueError: if the matrix is not square, not invertible by its structure, or sizes differ.
            TypeError: if dtypes differ, or the dtype has no factorisation (float16, bfloat16).
            NotImplementedError: if the class has no direct solver.
        """
        self._check_factorisable("solve")
        check_tensor("b", b, 1)
        vector = b.ndim == 1 or (b.ndim == self.ndim - 1 and b.shape == self.shape[:-1])
        columns = b.unsqueeze(-1) if vector else b
        if columns.shape[-2] != self.shape[-1]:
            raise ValueError(f"b must have {self.shape[-1]} rows, got shape {tuple(b.shape)}")
        check_same("b", b, "the matrix", torch.empty(0, dtype=self.dtype, device=self.device))
        if columns.ndim > 2 and self.ndim > 2:
            check_broadcast("b", columns.shape[:-2], type(self).__name__, self.batch_shape)
        x = self._solve(columns)
        return x.squeeze(-1) if vector else x

    def inverse(self) -> StructuredMatrix:
        """The inverse: in the same family where that is closed, else an operator that solves."""
        from structmat.lazy import Inverse

        self._check_square("inverse")
        return Inverse(self)

    def slogdet(self) -> tuple[Tensor, Tensor]:
        """Sign (or phase) and logarithm of the absolute value of the determinant, each of shape (*batch,)."""
        raise NotImplementedError(f"{type(self).__name__} has no structured determinant")

    def logdet(self) -> Tensor:
        """``log(det A)`` as ``torch.logdet``: NaN for a negative real determinant, complex for a complex matrix."""
        sign, logabs = self.slogdet()
        if self.dtype.is_complex:
            return logabs + sign.log()
        return torch.where(sign < 0, torch.full_like(logabs, torch.nan), logabs)

    # ---------------------------------------------------------------- operators
    def __matmul__(self, other: Any) -> Any:
        from structmat import lazy

        if isinstance(other, StructuredMatrix):
            return lazy.compose(self, other)
        if isinstance(other, np.ndarray):
            raise TypeError(
                "A @ ndarray: use torch.from_numpy(x) for a tensor, or A.to_scipy() @ x for NumPy in and out"
            )
        if not isinstance(other, Tensor):
            return NotImplemented
        return self.linear(other) if other.ndim == 1 else self.matmul(other)

    def __rmatmul__(self, other: Any) -> Any:
        if isinstance(other, np.ndarray):
            raise TypeError("ndarray @ A: use torch.from_numpy(x) for a tensor, or A.mT.to_scipy() @ x.T")
        return self.mT.linear(other) if isinstance(other, Tensor) else NotImplemented

    def __add__(self, other: Any) -> Any:
        from structmat import lazy

        if isinstance(other, StructuredMatrix):
            return lazy.add(self, other)
        if isinstance(other, Tensor):
            raise TypeError("a structured matrix plus a tensor is dense: write A.to_dense() + tensor, or Dense(tensor)")
        return NotImplemented

    def __radd__(self, other: Any) -> Any:
        # sum([A, B]) starts from the integer 0.
        return self if isinstance(other, int) and other == 0 else self.__add__(other)

    def __neg__(self) -> StructuredMatrix:
        return self * -1

    def __sub__(self, other: Any) -> Any:
        return self + (-other) if isinstance(other, StructuredMatrix) else self.__add__(other)

    def __rsub__(self, other: Any) -> Any:
        return (-self).__radd__(other)

    def __mul__(self, other: Any) -> StructuredMatrix:
        return self._scale(as_scalar(other, self.dtype, self.device))

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> StructuredMatrix:
        return self._scale(as_scalar(other, self.dtype, self.device).reciprocal())

    # ---------------------------------------------------------------- torch's functions
    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        # Only these two. Handling Tensor.matmul as well makes a compiled `A @ x` return `x @ A`.
        kwargs = kwargs or {}
        if func is torch.matmul and not kwargs:
            a, b = args
            return a.__matmul__(b) if isinstance(a, StructuredMatrix) else b.__rmatmul__(a)
        if func is F.linear:
            return _f_linear(*args, **kwargs)
        name = getattr(func, "__name__", str(func))
        raise TypeError(
            f"torch function {name!r} is not defined for structured matrices: it would need the dense entries; "
            "call .to_dense() first, or use the methods of the matrix"
        )


@functools.wraps(F.linear)
def _f_linear(input: Any, weight: Any, bias: Tensor | None = None) -> Tensor:
    if not isinstance(weight, StructuredMatrix):
        raise TypeError("F.linear takes a structured matrix as weight only")
    return weight.linear(input, bias)
