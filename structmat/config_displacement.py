"""The config of matrices of low displacement rank."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch
from torch import Tensor

from structmat._checks import check_int
from structmat.base import StructuredMatrix
from structmat.config import Config
from structmat.matrices import HankelLike, ToeplitzLike

_KINDS: dict[str, Any] = {"toeplitz": ToeplitzLike, "hankel": HankelLike}


@dataclasses.dataclass(frozen=True)
class LDRConfig(Config):
    """Toeplitz-like and Hankel-like matrices; see :class:`structmat.LDR`.

    Args:
        kind: "toeplitz", "hankel", or "best" for a projection that tries both (random ones are Toeplitz-like).
        rank: the displacement rank, or
        max_params: a budget, or
        ratio: a budget as a share of dense; exactly one of the three.
        sweeps: of alternating least squares in a projection.

    Example:
        >>> import torch, structmat
        >>> structmat.LDRConfig(ratio=0.1).resolve(384, 384)
        {'rank': 19}
        >>> i = torch.arange(64.0)
        >>> W = torch.exp(-(i[:, None] - i).abs() / 9) * (1 + 0.01 * i)  # hardly a Toeplitz matrix
        >>> found = structmat.project(W, structmat.LDRConfig(kind="best", rank=4))
        >>> type(found.matrix).__name__, found.error < 0.02
        ('ToeplitzLike', True)
    """

    structure: ClassVar[str] = "ldr"
    matrix_class: ClassVar[type[StructuredMatrix]] = ToeplitzLike
    kind: str = "toeplitz"
    rank: int | None = None
    sweeps: int = 30

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kind not in (*_KINDS, "best"):
            raise ValueError(f'kind must be "toeplitz", "hankel" or "best", got {self.kind!r}')
        if sum(v is not None for v in (self.rank, self.max_params, self.ratio)) != 1:
            raise ValueError("give exactly one of rank, max_params and ratio")
        if self.rank is not None:
            check_int("rank", self.rank)
        check_int("sweeps", self.sweeps, 0)

    def resolve(self, m: int, n: int) -> dict[str, Any]:
        if self.rank is not None:
            if self.rank > min(m, n):
                raise ValueError(f"rank must be at most min(rows, columns) = {min(m, n)}, got {self.rank}")
            return {"rank": self.rank}
        rank = min(self.budget(m, n) // (m + n), m, n)  # pyright: ignore[reportOptionalOperand]
        if rank < 1:
            raise self._over(m, n, m + n)
        return {"rank": rank}

    def random(self, shape: Any, **kwargs: Any) -> StructuredMatrix:
        cls = _KINDS.get(self.kind, ToeplitzLike)
        return cls.random(shape, **self.resolve(int(shape[-2]), int(shape[-1])), **kwargs)

    def _project(self, W: Tensor) -> tuple[StructuredMatrix, Tensor | None]:
        rank = self.resolve(int(W.shape[-2]), int(W.shape[-1]))["rank"]
        classes = list(_KINDS.values()) if self.kind == "best" else [_KINDS[self.kind]]
        found = [cls.from_dense(W, rank, sweeps=self.sweeps) for cls in classes]
        wide = torch.promote_types(W.dtype, torch.float32)
        return min(found, key=lambda M: float(torch.linalg.vector_norm(M.to_dense().to(wide) - W.to(wide)))), None
