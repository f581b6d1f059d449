"""Sums of x x^H over rows, in double precision or compensated."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from structmat.projection.truncated import work_dtype

# Entries of the rows that are held in double precision at a time: 64 MiB.
_CHUNK = 1 << 23
# Only blocks on and above the diagonal are multiplied: half of the work where n is far above this, and still in large
# products.
_BLOCK = 512


@dataclass(frozen=True, eq=False)
class Gram:
    """Sums over some rows x: of x x^H (its blocks on and above the diagonal), of x, and their number."""

    outer: Tensor
    first: Tensor
    count: int

    @classmethod
    def of(cls, rows: Tensor, dtype: torch.dtype | None) -> Gram:
        """The sums over rows (count, n), multiplied in ``dtype``, by default double precision; n^2 count operations."""
        n, double = rows.shape[1], work_dtype(rows)
        dtype = double if dtype is None else dtype.to_complex() if rows.is_complex() else dtype
        outer = rows.new_zeros(n, n, dtype=dtype)
        first = rows.new_zeros(n, dtype=double)
        with torch.autocast(rows.device.type, enabled=False):
            for chunk in rows.split(max(1, _CHUNK // n)):
                x = chunk.to(dtype)
                first += x.sum(0, dtype=double)
                for i in range(0, n, _BLOCK):
                    outer[i : i + _BLOCK, i:].addmm_(x[:, i : i + _BLOCK].mT, x[:, i:].conj())
        return cls(outer, first, len(rows))

    def clone(self) -> Gram:
        """The same sums in other memory."""
        return Gram(self.outer.clone(), self.first.clone(), self.count)


class Sums:
    """A running sum of :class:`Gram`; where that is in single precision, with the rounding errors of its additions.

    Those are what Knuth's two-sum gives: as in Kahan's summation the error does not grow with the number of terms.

    Args:
        owners: whose sums they are.
    """

    def __init__(self, owners: Iterable[Any] = ()) -> None:
        self.owners = set(owners)
        self.count = 0
        self._sums: list[Tensor] = []
        self._lost: list[Tensor] = []

    def add(self, gram: Gram) -> None:
        """Add the sums over some more rows."""
        self.count += gram.count
        terms = [gram.outer.to(gram.first.dtype), gram.first]
        if not self._sums:
            self._sums = terms
            if work_dtype(gram.first.cpu()) != gram.first.dtype:
                self._lost = [torch.zeros_like(t) for t in terms]
            return
        for i, term in enumerate(terms):
            if not self._lost:
                self._sums[i] += term
                continue
            before, total = self._sums[i], self._sums[i] + term
            part = total - before
            self._lost[i] += (before - (total - part)) + (term - part)
            self._sums[i] = total

    def totals(self) -> list[Tensor]:
        """The whole sum of x x^H and that of x; of a device without double precision, in the CPU's memory.

        To be called once: the memory is that of the sums.
        """
        double = [t.cpu() for t in self._sums] if self._lost else self._sums
        outer, first = (t.to(work_dtype(t)) for t in double)
        for total, lost in zip((outer, first), self._lost, strict=False):
            total += lost.cpu().to(total.dtype)
        diagonal = outer.diagonal().real.clone()
        outer.triu_(1)
        outer += outer.mH.clone()
        outer.diagonal().copy_(diagonal)
        return [outer, first]
