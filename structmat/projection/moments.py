"""Second moments of a layer's inputs and of its output gradients: the metric in which a projection can be nearest."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from structmat._checks import check_tensor
from structmat.projection.truncated import work_dtype


@dataclasses.dataclass(frozen=True, eq=False)
class Moments:
    """What a layer ``y = W x`` saw: averages over its inputs x (n numbers) and over its output gradients g (m numbers).

    ``project(W, config, moments=...)`` makes ``E |T^(1/2) (W - M) x|^2`` small instead of ``|W - M|_F^2``, where T is
    ``outputs`` (the identity if None): the error of what the layer puts out, weighted by what the loss makes of it. The
    two moments are taken for independent, as in the Kronecker-factored Fisher information of Martens & Grosse (2015).

    Attributes:
        inputs: E[x x^H], shape (n, n), Hermitian and positive semidefinite, float64 or complex128.
        mean: E[x], shape (n).
        count: how many inputs there were.
        outputs: E[g g^H], shape (m, m), or None.

    Raises:
        TypeError: if an argument is no tensor.
        ValueError: if shapes do not fit, an entry is NaN or infinite, or the count is not positive.

    Example:
        >>> import torch
        >>> from structmat import Moments
        >>> x = torch.randn(100, 3, generator=torch.Generator().manual_seed(0))
        >>> moments = Moments.of(x)
        >>> moments.inputs.shape, moments.mean.shape, moments.count
        (torch.Size([3, 3]), torch.Size([3]), 100)
    """

    inputs: Tensor
    mean: Tensor
    count: float
    outputs: Tensor | None = None

    def __post_init__(self) -> None:
        for name in ("inputs", "mean") + (("outputs",) if self.outputs is not None else ()):
            value: Tensor = getattr(self, name)
            check_tensor(name, value, 1 if name == "mean" else 2)
            if value.device.type != "meta" and not torch.isfinite(value).all():
                raise ValueError(f"{name} has NaN or infinite entries")
        n = self.mean.shape[-1]
        if self.mean.ndim != 1 or tuple(self.inputs.shape) != (n, n):
            raise ValueError(
                f"inputs must have shape (n, n) and mean (n), got {tuple(self.inputs.shape)} and "
                f"{tuple(self.mean.shape)}"
            )
        if self.outputs is not None and (self.outputs.ndim != 2 or self.outputs.shape[0] != self.outputs.shape[1]):
            raise ValueError(f"outputs must have shape (m, m), got {tuple(self.outputs.shape)}")
        if not (math.isfinite(self.count) and self.count > 0):
            raise ValueError(f"count must be positive and finite, got {self.count}")

    @classmethod
    @torch.no_grad()
    def of(cls, x: Tensor, gradients: Tensor | None = None) -> Moments:
        """The moments of inputs x (..., n) and of output gradients (..., m), over all leading dimensions."""
        x = x.reshape(-1, x.shape[-1]).to(work_dtype(x))
        outputs = None
        if gradients is not None:
            g = gradients.reshape(-1, gradients.shape[-1]).to(work_dtype(gradients))
            outputs = g.mT @ g.conj() / g.shape[0]
        return cls(x.mT @ x.conj() / x.shape[0], x.mean(0), x.shape[0], outputs)

    @property
    def covariance(self) -> Tensor:
        """E[(x - E x) (x - E x)^H]: the metric of a layer whose bias takes up the error of the mean."""
        return self.inputs - torch.outer(self.mean, self.mean.conj())

    def centred(self) -> Moments:
        """These moments with the covariance in place of ``inputs`` and a mean of zero."""
        return Moments(self.covariance, torch.zeros_like(self.mean), self.count, self.outputs)
