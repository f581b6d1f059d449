"""Permutations that are learned by gradient descent."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from structmat._autocast import autocast_dtype
from structmat._checks import check_inexact, check_int, check_tensor
from structmat.matrices import Permutation


class LearnablePermutation(nn.Module):
    """A relaxed permutation: a product of probable even-odd splits and reversals, as in the fast transforms.

    Level k cuts the vector into 2^k blocks of n / 2^k entries and makes three choices for each of them: whether even
    entries come before the odd ones, then whether the first half is reversed, and whether the second half is. A choice
    made with probability p is the convex combination ``(1 - p) x + p (P x)``: the whole is a doubly stochastic matrix,
    and a permutation where every p is 0 or 1. Levels follow each other while blocks are of an even size above 2 (a
    block of 2 has nothing to choose; one of an odd size is not split): n = 16 has 3 levels, n = 12 has 2, n = 6 has 1.

    The family holds bit reversal and even-then-reversed-odd, not their product, which the cosine transform needs: that
    takes two of these layers. It has at most 8^levels of the n! permutations if choices are shared, 8^(2^levels - 1) if
    not; reversal is not among them. :meth:`entropy` is a penalty that drives the choices to one side.

    3 numbers a level, or 3 a block; about 6 n operations a level. Source: Dao et al. 2019, "Learning fast algorithms
    for linear transforms using butterfly factorizations", section 3.2.

    Args:
        n: size, even and at least 4.
        shared: one triple of choices for all blocks of a level, or one for each.
        gumbel: draw the probabilities in training, from the binary concrete distribution (Maddison et al. 2017), by
            torch's global generator; else, and in evaluation, they are ``sigmoid(logits / temperature)``.
        temperature: of the probabilities; an attribute that may be lowered while training.
        device: where the logits are made.
        dtype: their floating-point dtype, which inputs have, or its complex counterpart.

    Raises:
        TypeError: if n is not an integer or dtype not floating point.
        ValueError: if n has no even-odd split that does anything, or temperature is not positive.

    Shape:
        (*, n) to (*, n). Inside an autocast region the output has the region's dtype.

    Example:
        >>> import torch, structmat
        >>> layer = structmat.nn.LearnablePermutation(8)
        >>> with torch.no_grad():
        ...     _ = layer.logits.copy_(torch.tensor([[999.0, -999.0, 999.0], [-999.0] * 3]))
        >>> layer(torch.arange(8.0)).detach()
        tensor([0., 2., 4., 6., 7., 5., 3., 1.])
        >>> layer.permutation().perm
        tensor([0, 2, 4, 6, 7, 5, 3, 1])
    """

    logits: nn.Parameter

    def __init__(
        self,
        n: int,
        shared: bool = True,
        gumbel: bool = False,
        temperature: float = 1.0,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if check_int("n", n) < 4 or n % 2:
            raise ValueError(f"n must be even and at least 4, else there is nothing to choose, got {n}")
        if dtype is not None and not dtype.is_floating_point:
            raise TypeError(f"dtype must be floating point (inputs may be complex), got {dtype}")
        if not temperature > 0:
            raise ValueError(f"temperature must be positive, got {temperature!r}")
        self.n, self.shared, self.gumbel, self.temperature = n, bool(shared), bool(gumbel), temperature
        self.levels = 0
        while (size := n >> self.levels) % 2 == 0 and size > 2:
            self.levels += 1
        rows = self.levels if shared else (1 << self.levels) - 1
        #: Shape (levels, 3) or, not shared, (1 + 2 + 4 + ..., 3): even-odd split, first half, second half reversed.
        self.logits = nn.Parameter(torch.empty(rows, 3, dtype=dtype, device=device))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw probabilities near to 1/2: at 1/2 itself mirrored choices could not be told apart."""
        self.logits.uniform_(-0.5, 0.5)

    def probabilities(self) -> Tensor:
        """The probabilities of the choices, of the shape of the logits; drawn anew in training with ``gumbel``."""
        logits = self.logits
        if self.gumbel and self.training:
            u = torch.rand_like(logits, dtype=torch.float32).clamp(1e-6, 1 - 1e-6)
            logits = logits + (u.log() - (-u).log1p()).to(logits.dtype)  # the difference of two Gumbel variables
        return torch.sigmoid(logits / self.temperature)

    def _choices(self, p: Tensor, level: int) -> Tensor:
        """The triples of a level, shape (1 or blocks, 3)."""
        return p[level : level + 1] if self.shared else p[(1 << level) - 1 : (2 << level) - 1]

    def forward(self, x: Tensor) -> Tensor:
        """Apply the relaxed permutation to x of shape (*, n)."""
        check_tensor("x", x, 1)
        check_inexact("x", x)
        if x.shape[-1] != self.n:
            raise ValueError(f"x must have size {self.n} in its last dimension, got shape {tuple(x.shape)}")
        if x.device != self.logits.device:
            raise ValueError(
                f"x is on {x.device} but the logits are on {self.logits.device}; move one with .to(device)"
            )
        p, cast_to = self.probabilities(), autocast_dtype(x.device)
        if cast_to is not None:
            low = (torch.float32, torch.float16, torch.bfloat16)
            x = x.to(cast_to) if x.dtype in low else x
            p = p.to(cast_to) if p.dtype in low else p
        if p.dtype not in (x.dtype, x.real.dtype):
            raise TypeError(f"x has dtype {x.dtype} but the logits have {p.dtype}; convert one with .to(dtype)")
        for level in range(self.levels):
            q = self._choices(p, level)
            x = x.unflatten(-1, (1 << level, self.n >> level))
            split = x.unflatten(-1, (-1, 2)).mT.flatten(-2)
            x = x + q[:, :1] * (split - x)
            halves = x.unflatten(-1, (2, -1))
            x = (halves + q[:, 1:, None] * (halves.flip(-1) - halves)).flatten(-3)
        return x

    def to_dense(self) -> Tensor:
        """The doubly stochastic matrix of shape (n, n) that is applied, ``P`` in ``P x``; costs n products."""
        return self(torch.eye(self.n, dtype=self.logits.dtype, device=self.logits.device)).mT

    @torch.no_grad()
    def permutation(self) -> Permutation:
        """The permutation of the likelier choices, of the logits' dtype; it carries no gradient."""
        taken = self.logits > 0
        perm = torch.arange(self.n, device=self.logits.device)
        for level in range(self.levels):
            q = self._choices(taken, level)
            perm = perm.unflatten(-1, (1 << level, self.n >> level))
            halves = torch.where(q[:, :1], perm.unflatten(-1, (-1, 2)).mT.flatten(-2), perm).unflatten(-1, (2, -1))
            perm = torch.where(q[:, 1:, None], halves.flip(-1), halves).flatten()
        return Permutation(perm, self.logits.dtype)

    def entropy(self) -> Tensor:
        """The sum of the choices' entropies in nats, a scalar: 0 at a permutation, log 2 a choice at probability 1/2.

        Differentiable: added to a loss it drives the probabilities to 0 or 1.
        """
        logits = self.logits / self.temperature
        return (F.softplus(logits) - logits * torch.sigmoid(logits)).sum()

    def extra_repr(self) -> str:
        return f"n={self.n}, shared={self.shared}, gumbel={self.gumbel}, temperature={self.temperature}"
