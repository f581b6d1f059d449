"""The long convolution as a layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from structmat._checks import check_int, check_tensor
from structmat.base import StructuredMatrix
from structmat.nn.longconv._matrix import toeplitz_of
from structmat.nn.longconv._registry import taps_of
from structmat.nn.longconv.filters import ExplicitFilter, ImplicitFilter
from structmat.nn.longconv.functional import (
    ALGORITHMS,
    check_algorithm,
    check_gates,
    check_input,
    check_operands,
    circular_convolution,
    common_dtype,
    gated,
    long_convolution,
    wrapped,
)
from structmat.nn.longconv.learned import LearnedTransforms
from structmat.nn.longconv.relaxed import RelaxedState
from structmat.nn.longconv.streaming import LongConvState, check_inference, check_state

_FILTERS: dict[str, Any] = {"implicit": ImplicitFilter, "explicit": ExplicitFilter}
_MODES = ("causal", "bidirectional", "circular")


class LongConv(nn.Module):
    """A convolution of every channel with a filter as long as the input, with a skip term and gates.

    ``y = post_gate * (k * x + skip x)``, x = pre_gate * u; see :func:`~structmat.nn.longconv.long_convolution` for the
    formula, precision and cost. Computed in float32 at least, also inside an autocast region; the output has u's dtype.

    A causal layer streams: :meth:`prefill` takes the input piece by piece, :meth:`step` one by one, without redoing
    what came before.

    ``algorithm="butterfly"`` learns the transforms too: two complex butterflies in place of the FFT and its inverse,
    shared by channels, initially the same convolution. After the first step of training nothing is causal any more, an
    output depends on all inputs: causal layers refuse it. The transforms have a fixed size, shorter inputs are
    filled up with zeros.

    Args:
        channels: of input and output.
        length: the largest length of inputs; longer ones are up to the filter's option ``extend``.
        filter: "implicit" (:class:`ImplicitFilter`, the default), "explicit" (:class:`ExplicitFilter`), or a module
            that is called with a length n and returns taps of shape (directions, channels or 1, taps), any number of
            them; those for a larger n must begin with those for a smaller one if the layer is to stream.
        mode: "causal", y[t] depends on inputs up to t; "bidirectional", the filter has two directions; "circular",
            the input is one period.
        skip: whether there is a parameter ``skip`` (channels,), initially normal, as in Hyena and S4.
        algorithm: "fft"; "monarch", the same by block products with DFT matrices and twiddles, real numbers as half as
            many complex ones, which suits matrix units; "butterfly", learned.
        order: of "monarch" and "butterfly": how many factors a transform of N points has, 1 to 4, with blocks of about
            N^(1 / order).
        device: where the parameters are made.
        dtype: their dtype.

    Raises:
        TypeError: if a size is not an integer, or filter no module.
        ValueError: if a size is out of range, an option unknown, the filter has another number of channels or
            directions, or a causal layer shall be a butterfly.

    Shape:
        u and gates (*batch, channels, length) to the same.

    Source: Poli et al. 2023, "Hyena Hierarchy"; Fu et al. 2023, "Monarch Mixer"; Fu, Epstein, et al. 2023, "Simple
    hardware-efficient long convolutions for sequence modeling" (learned butterflies: FlashButterfly).

    Example:
        >>> import torch, structmat
        >>> conv = structmat.nn.LongConv(64, 1024)
        >>> u = torch.randn(2, 64, 1000)
        >>> y = conv(u)
        >>> with torch.no_grad():
        ...     first, state = conv.prefill(u[..., :999])
        ...     last, state = conv.step(u[..., 999], state)
        >>> torch.allclose(last, y[..., 999], atol=1e-5), state.position
        (True, 1000)
    """

    def __init__(
        self,
        channels: int,
        length: int,
        *,
        filter: str | nn.Module | None = None,
        mode: str = "causal",
        skip: bool = True,
        algorithm: str = "fft",
        order: int = 2,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.channels, self.length = check_int("channels", channels), check_int("length", length)
        if mode not in _MODES:
            raise ValueError(f"mode must be one of {', '.join(_MODES)}, got {mode!r}")
        check_algorithm(algorithm, order, (*ALGORITHMS, "butterfly"))
        if algorithm == "butterfly" and mode == "causal":
            raise ValueError(
                'algorithm="butterfly" needs mode="bidirectional" or "circular": once trained, learned transforms '
                'let outputs depend on later inputs; for a causal layer use "fft" or "monarch"'
            )
        self.mode, self.algorithm, self.order = mode, algorithm, order
        self.filter = self._make_filter(filter, device, dtype)
        self.skip = nn.Parameter(torch.randn(channels, device=device, dtype=dtype)) if skip else None
        self.transforms = None
        if algorithm == "butterfly":
            self.transforms = LearnedTransforms(length, order, device, dtype)

    def _make_filter(self, filter: Any, device: Any, dtype: torch.dtype | None) -> nn.Module:
        directions = 2 if self.mode == "bidirectional" else 1
        filter = "implicit" if filter is None else filter
        if isinstance(filter, str):
            if filter not in _FILTERS:
                raise ValueError(f"filter must be one of {', '.join(_FILTERS)} or a module, got {filter!r}")
            return _FILTERS[filter](self.channels, self.length, directions=directions, device=device, dtype=dtype)
        if not isinstance(filter, nn.Module):
            raise TypeError(f"filter must be a string, a module or None, got {type(filter).__name__}")
        for name, wanted in (("channels", (self.channels, 1)), ("directions", (directions,))):
            if (found := getattr(filter, name, wanted[0])) not in wanted:
                raise ValueError(f"filter must have {wanted[0]} {name} for mode={self.mode!r}, got {found}")
        return filter

    def reset_parameters(self) -> None:
        """Draw a new filter and skip, and make learned transforms the DFT again."""
        if self.skip is not None:
            nn.init.normal_(self.skip)
        for part in (self.filter, self.transforms):
            if part is not None:
                getattr(part, "reset_parameters", lambda: None)()

    def taps(self, length: int | None = None) -> Tensor:
        """The filter's taps for inputs of a length, shape (directions, channels or 1, number).

        Raises:
            ValueError: if the filter has none for this length (its option ``extend``), or others than this layer's.
        """
        length = self.length if length is None else check_int("length", length, 0)
        if getattr(self.filter, "extend", None) == "zero" and length > self._window():
            length = self._window()  # min() would stay in the sizes of an exported program
        taps = taps_of(self, self.filter, length)
        directions = 2 if self.mode == "bidirectional" else 1
        check_tensor("the filter's output", taps)
        if taps.ndim != 3 or taps.shape[0] != directions or taps.shape[1] not in (1, self.channels):
            raise ValueError(
                f"the filter must return shape ({directions}, {self.channels}, taps), got {tuple(taps.shape)}"
            )
        return taps

    def _window(self) -> int:
        return getattr(self.filter, "length", self.length)

    def forward(self, u: Tensor, pre_gate: Tensor | None = None, post_gate: Tensor | None = None) -> Tensor:
        """The convolution of u, shape (*batch, channels, length); gates have u's shape.

        Raises:
            TypeError: if an argument is no tensor, not floating point or complex, or of another precision than the
                parameters (float16 and bfloat16 go with float32).
            ValueError: if shapes do not fit, devices differ, or u is longer than filter or learned transforms allow.
        """
        check_input(u, self.channels)
        taps = self.taps(u.shape[-1])
        k, k_rev = taps[0], taps[1] if self.mode == "bidirectional" else None
        if self.mode == "circular":
            if self.algorithm == "fft":
                return circular_convolution(u, k, self.skip, pre_gate, post_gate)
            k = wrapped(k, max(u.shape[-1], 1))
            k_rev = k.flip(-1)[..., : max(u.shape[-1] - 1, 0)]
        if self.transforms is not None:
            return self.transforms.convolution(u, k, k_rev, self.skip, pre_gate, post_gate)
        return long_convolution(u, k, k_rev, self.skip, pre_gate, post_gate, algorithm=self.algorithm, order=self.order)

    # ---------------------------------------------------------------- streaming
    def prefill(
        self,
        u: Tensor,
        state: LongConvState | None = None,
        pre_gate: Tensor | None = None,
        post_gate: Tensor | None = None,
        *,
        max_length: int | None = None,
        relaxed: bool = False,
    ) -> tuple[Tensor, LongConvState]:
        """The outputs of a first or further piece of the input, and the state behind it.

        The filter's taps are made once, with the first piece, and stay in the state. Outputs of the first piece carry
        gradients as those of :meth:`forward`; the state does not, and what continues from one does not either.

        A state has room for ``max_length`` inputs. Of a filter with ``extend="zero"`` it has room for any number: its
        window slides. One with ``extend="tile"`` allows a max_length beyond its own. One with ``extend="resample"``
        does not: each length would have other taps.

        Args:
            u: shape (*batch, channels, length).
            state: that behind the piece before, which moves on in place; None at the beginning.
            pre_gate: shape of u.
            post_gate: shape of u.
            max_length: how many inputs there will be at most, for the first piece only; ``length`` if None.
            relaxed: for the first piece only: whether the state is a :class:`~structmat.nn.longconv.RelaxedState`,
                whose steps cost O(log^2 taps) on average in place of O(taps).

        Returns:
            Outputs of u's shape and dtype, and the state.

        Raises:
            TypeError: as of :meth:`forward`, or if state is something else.
            ValueError: as of :meth:`forward`; or if the layer is not causal, there are more inputs than room, or
                state is not of u's batch.
            RuntimeError: if u or a gate requires grad and is to continue from a state.
        """
        check_input(u, self.channels)
        if state is None:
            taps, state = self._begin(u, pre_gate, max_length)
            state = RelaxedState.of(state) if relaxed else state
            check_state(state, u, pre_gate)
            y = long_convolution(
                u, taps, None, self.skip, pre_gate, post_gate, algorithm=self.algorithm, order=self.order
            )
            state.append(u, pre_gate)
            return y, state
        if max_length is not None or relaxed:
            name = "relaxed" if max_length is None else "max_length"
            raise ValueError(f"{name} is for the first piece, where there is no state yet")
        check_gates(u, None, pre_gate, post_gate)
        check_state(state, u, pre_gate)
        check_gates(u, self.skip)
        check_inference(u=u, pre_gate=pre_gate, post_gate=post_gate)
        seen = state.recent(state.taps.shape[-1] - 1)

        def convolve(x: Tensor) -> Tensor:
            joined = torch.cat([seen.to(x.dtype), x], -1)
            y = long_convolution(joined, state.taps.flip(-1), algorithm=self.algorithm, order=self.order)
            return y[..., seen.shape[-1] :]

        with torch.no_grad():
            y = gated(u, convolve, state.taps, None, self.skip, pre_gate, post_gate)
            state.append(u, pre_gate)
        return y, state

    def step(
        self,
        u: Tensor,
        state: LongConvState | None = None,
        pre_gate: Tensor | None = None,
        post_gate: Tensor | None = None,
    ) -> tuple[Tensor, LongConvState]:
        """The output of one more input, and the state behind it: the same one, moved on in place.

        Reads as many inputs and taps of every channel as there have been, at most the number of taps; of a relaxed
        state (see :meth:`prefill`) far fewer on average.

        Args:
            u: shape (*batch, channels).
            state: that behind the inputs before; None at the beginning.
            pre_gate: shape of u.
            post_gate: shape of u.

        Returns:
            The output of u's shape and dtype, and the state.

        Raises:
            TypeError, ValueError, RuntimeError: as of :meth:`prefill`; with no state, too, nothing may require grad.
        """
        check_input(u, self.channels, -1)
        check_gates(u, None, pre_gate, post_gate)
        check_inference(u=u, pre_gate=pre_gate, post_gate=post_gate)
        with torch.no_grad():
            u = u.unsqueeze(-1)
            pre_gate, post_gate = (None if gate is None else gate.unsqueeze(-1) for gate in (pre_gate, post_gate))
            if state is None:
                _, state = self._begin(u, pre_gate, None)
            check_state(state, u, pre_gate)
            check_gates(u, self.skip)
            sums = state.step(u, pre_gate)
            y = gated(u, lambda _: sums, state.taps, None, self.skip, pre_gate, post_gate)
        return y.squeeze(-1), state

    def _begin(self, u: Tensor, pre_gate: Tensor | None, max_length: int | None) -> tuple[Tensor, LongConvState]:
        """The taps with their graph, and the state before the first input."""
        if self.mode != "causal":
            raise ValueError(f'only mode="causal" streams; outputs of mode={self.mode!r} depend on later inputs')
        extend = getattr(self.filter, "extend", None)
        room = self.length if max_length is None else check_int("max_length", max_length)
        if extend == "zero":  # whatever the length, else the window would be cut to it
            room = self._window()
        if room > self._window() and extend == "resample":
            raise ValueError(
                f'max_length must be at most {self._window()}, got {room}: with extend="resample" the filter of a '
                "longer input has other taps from the first one on"
            )
        taps = self.taps(room)[0]
        if taps.shape[-1] == 0:
            raise ValueError("the filter must have at least one tap to stream")
        check_operands(u, taps, None, self.skip, pre_gate)
        history = u.new_zeros((*u.shape[:-1], 0), dtype=common_dtype(u, (pre_gate,)))
        return taps, LongConvState(taps.detach().flip(-1), history, 0, 0, -1 if extend == "zero" else room)

    # ---------------------------------------------------------------- as a matrix
    def matrix(self, channel: int | None = None, length: int | None = None) -> StructuredMatrix:
        """The convolution with the skip term as structured matrices, one for every channel.

        Args:
            channel: one channel only, without a batch dimension.
            length: of the input, ``length`` of the layer if None.

        Returns:
            A :class:`~structmat.CausalToeplitz`, :class:`~structmat.Toeplitz` (of mode "bidirectional") or
            :class:`~structmat.Circulant` of shape (channels, length, length) or (length, length), which carries the
            gradient of the filter.

        Raises:
            TypeError: if the transforms are learned, or channel or length is not an integer.
            ValueError: if channel or length is out of range.
        """
        if self.transforms is not None:
            raise TypeError("a convolution by learned transforms is no Toeplitz matrix")
        length = self.length if length is None else check_int("length", length)
        return toeplitz_of(self.taps(length).expand(-1, self.channels, -1), self.skip, self.mode, length, channel)

    def extra_repr(self) -> str:
        text = f"{self.channels}, {self.length}, mode={self.mode!r}, algorithm={self.algorithm!r}"
        return text if self.algorithm == "fft" else f"{text}, order={self.order}"
