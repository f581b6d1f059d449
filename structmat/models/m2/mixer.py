"""The sequence mixer of M2: a gated long convolution between two projections."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from structmat._checks import check_int
from structmat.config import Config
from structmat.models.m2.mlp import linear
from structmat.nn.longconv import ImplicitFilter, LongConv, ShortConv
from structmat_kernels.transpose import supported, transpose


class MixerState(NamedTuple):
    """The states of a mixer's convolutions."""

    short: Any
    long: Any
    residual: Any

    def reorder(self, index: Tensor) -> MixerState:
        """Take the rows ``index`` of the batch."""
        return MixerState(*(None if state is None else state.reorder(index) for state in self))


class M2SequenceMixer(nn.Module):
    """``out(x2 * long(x1 * v) + long'(x))`` with ``(x1, x2, v) = short(project(x))``.

    ``short`` is a depthwise causal convolution of few taps, ``long`` and the residual ``long'`` have as many taps as
    there are positions, made by a small network (:class:`structmat.nn.longconv.ImplicitFilter`), and a skip term.
    Costs O(length log length) a channel, and 4 d² parameters and products a token for dense projections.

    Args:
        dim: size d of the last dimension.
        length: longest sequence, and taps of the long filters.
        mode: ``"causal"`` or ``"bidirectional"`` long convolutions; the short one is causal in both.
        residual: whether long' is there.
        norm: whether x passes a layer norm first.
        short_filter_size: taps of the short convolution.
        structure: config, or its dictionary, of both projections; None makes them dense.
        features: of a position, that the filters' network reads.
        width: of the filters' network.
        depth: its sine layers.
        frequency: initial frequency of its sines.

    Raises:
        ValueError: if a size or the mode is out of range.

    Shape:
        (batch, length or less, dim) to the same shape.

    Source: Fu et al. 2023, "Monarch Mixer"; Poli et al. 2023, "Hyena Hierarchy".

    Example:
        >>> import torch
        >>> from structmat.models.m2 import M2SequenceMixer
        >>> mixer = M2SequenceMixer(32, length=64, mode="causal")
        >>> mixer(torch.ones(2, 50, 32)).shape
        torch.Size([2, 50, 32])
    """

    def __init__(
        self,
        dim: int,
        length: int,
        mode: str = "bidirectional",
        *,
        residual: bool = True,
        norm: bool = False,
        short_filter_size: int = 3,
        structure: Config | Mapping[str, Any] | None = None,
        features: int = 5,
        width: int = 128,
        depth: int = 3,
        frequency: float = 10.0,
    ) -> None:
        super().__init__()
        if mode not in ("causal", "bidirectional"):
            raise ValueError(f"mode must be 'causal' or 'bidirectional', got {mode!r}")
        self.length = check_int("length", length)
        self.norm = nn.LayerNorm(check_int("dim", dim)) if norm else None

        # Positions and frequencies need more than half precision, whatever the default dtype of the other parameters.
        exact = torch.promote_types(torch.get_default_dtype(), torch.float32)

        def long_conv() -> LongConv:
            taps = ImplicitFilter(
                *(dim, length),
                features=features,
                width=width,
                depth=depth,
                frequency=frequency,
                directions=2 if mode == "bidirectional" else 1,
                dtype=exact,
            )
            return LongConv(dim, length, mode=mode, filter=taps)

        self.project = linear(dim, 3 * dim, True, structure)
        self.short = ShortConv(3 * dim, short_filter_size)
        self.long = long_conv()
        self.residual = long_conv() if residual else None
        self.out = linear(dim, dim, True, structure)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Mix along the sequence.

        Args:
            x: shape (batch, length, dim).
            mask: shape (batch, length), 0 at padding, whose content then changes no other output; None keeps all.
        """
        x = self._enter(x, mask)
        x1, x2, v = self.short(self._project(x, mask)).chunk(3, -2)
        y = self.long(v, _masked(x1, mask), x2)
        z = None if self.residual is None else self.residual(_channels_first(x, y.dtype))
        return self.out(_tokens_first(y, z))

    def extend(self, x: Tensor, mask: Tensor | None, state: MixerState | None) -> tuple[Tensor, MixerState]:
        """The outputs at inputs that follow those in a state, and the state after them; causal mixers only.

        Args:
            x: shape (batch, new, dim).
            mask: shape (batch, new), or None.
            state: what this method returned for the inputs before; None at the start.
        """
        x = self._enter(x, mask)
        before = MixerState(None, None, None) if state is None else state
        short, after_short = _extend(self.short, self._project(x, mask), before.short)
        x1, x2, v = short.chunk(3, -2)
        y, after_long = _extend(self.long, v, before.long, _masked(x1, mask), x2)
        z, after_residual = None, None
        if self.residual is not None:
            z, after_residual = _extend(self.residual, _channels_first(x, y.dtype), before.residual)
        return self.out(_tokens_first(y, z)), MixerState(after_short, after_long, after_residual)

    def _enter(self, x: Tensor, mask: Tensor | None) -> Tensor:
        if self.norm is not None:
            x = self.norm(x)
        return x if mask is None else x * mask[..., None].to(x.dtype)

    def _project(self, x: Tensor, mask: Tensor | None) -> Tensor:
        return _masked(self.project(x).mT, mask)


def _channels_first(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A convolution's operand of x (batch, length, channels), in an autocast region of the dtype that projections have.

    Convolutions read times that are neighbours, and would copy a transposed view.
    """
    return transpose(x, dtype=dtype) if _copied(x, dtype) else x.to(dtype).mT


def _tokens_first(y: Tensor, z: Tensor | None) -> Tensor:
    """The transposed matrices of y, or of y + z, (batch, channels, length): the operand of the last projection.

    The product of a batch would copy a transposed view, and a product of each matrix by itself would first fill the
    output with the bias, which costs as much; what it costs to copy, the sum costs anyway. The product of one matrix
    takes it transposed.
    """
    if _copied(y, y.dtype) and (z is not None or len(y) > 1):
        return transpose(y, z)
    return (y if z is None else y + z).mT


def _copied(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether the transposing kernel does it; torch.compile makes one kernel of a copy and of what is around it."""
    return not torch.compiler.is_compiling() and 1 not in x.shape[-2:] and supported(x, dtype)


def _masked(x: Tensor, mask: Tensor | None) -> Tensor:
    """Zero x of shape (batch, channels, length) where the mask (batch, length) is 0.

    The projections are masked because their bias is not 0, what the short convolution makes of them because it spills
    tokens over the padding behind them.
    """
    return x if mask is None else x * mask[..., None, :].to(x.dtype)


def _extend(conv: ShortConv | LongConv, u: Tensor, state: Any, *gates: Tensor) -> tuple[Tensor, Any]:
    """Outputs at the next inputs and the state after them; a single input takes the short way."""
    if state is None or u.shape[-1] != 1:
        return conv.prefill(u, state, *gates)
    y, state = conv.step(u[..., 0], state, *(gate[..., 0] for gate in gates))
    return y[..., None], state
