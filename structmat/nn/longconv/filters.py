"""Filters of long convolutions: what makes the taps."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from structmat._checks import check_int
from structmat.matrices.displacement._convolution import working
from structmat.nn.longconv._network import evaluate

_HALF = (torch.float16, torch.bfloat16)


class ImplicitFilter(nn.Module):
    """Taps that a small network computes from their positions, under a decay: Hyena's filters, those of M2 too.

    A linear layer of ``features`` inputs, then ``depth`` times a sine, sin(frequency * x), with linear layers between,
    and a last one without a bias; then for channel c ``k[c, i] = MLP(z[i])[c] * (exp(-t[i] |delta[c]|) + shift)``.

    Its state: ``z`` (1, length, features), a parameter, at first t, cos(f a) and -sin(f a) for (features - 1) / 2
    frequencies f from 1e-4 to the last integer below that number, a = 2 pi i / length; ``t`` (1, length, 1), a buffer,
    from 0 to 1; ``deltas`` (1, 1, channels), a buffer, equally spaced rates at which the decay reaches ``target`` at
    t = slow_decay (first channel) to t = fast_decay (last one); ``frequency`` (1, width), a parameter shared by all
    sines; and for every direction an MLP of its own, ``mlps[direction][layer].weight`` and ``.bias``.

    Taps are computed in float32 (or float64) whatever autocast says. Casts to half precision, such as
    ``model.bfloat16()``, leave the filter in float32: the sines turn many times, and taps of a rounded one are wrong by
    a tenth and more.

    Args:
        channels: taps are made for so many.
        length: how many taps are learned.
        features: of a position: odd, at least 3.
        width: of the hidden layers.
        depth: number of sines, at least 1.
        frequency: the initial frequency of the sines.
        directions: 1, or 2 for a second filter of later inputs.
        fast_decay: where the fastest channel has decayed to ``target``, in lengths.
        slow_decay: where the slowest one has.
        target: a number between 0 and 1.
        shift: what the decay tends to.
        extend: what taps beyond ``length`` are. "error": there are none, asking for them raises. "zero": they are 0, a
            window of ``length`` taps slides over longer inputs. "tile": positions z begin anew after ``length``, t and
            its decay go on, as M2 models were released for longer inputs; the first taps stay what they were.
            "resample": the same filter is sampled more finely, positions z are interpolated and t runs from 0 to 1
            again: for inputs of a higher resolution, not for longer ones.
        device: where the state is made.
        dtype: its dtype.

    Raises:
        TypeError: if a size is not an integer.
        ValueError: if a size or number is out of range or extend unknown.

    Source: Poli et al. 2023, "Hyena Hierarchy: towards larger convolutional language models"; Fu et al. 2023, "Monarch
    Mixer: a simple sub-quadratic GEMM-based architecture".

    Example:
        >>> import torch, structmat
        >>> make = structmat.nn.ImplicitFilter(64, 1024, directions=2)
        >>> make().shape, make(100).shape
        (torch.Size([2, 64, 1024]), torch.Size([2, 64, 100]))
    """

    t: Tensor
    deltas: Tensor

    def __init__(
        self,
        channels: int,
        length: int,
        *,
        features: int = 5,
        width: int = 128,
        depth: int = 3,
        frequency: float = 10.0,
        directions: int = 1,
        fast_decay: float = 0.3,
        slow_decay: float = 1.5,
        target: float = 1e-2,
        shift: float = 0.0,
        extend: str = "error",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.channels, self.length = check_int("channels", channels), check_int("length", length)
        self.directions = _directions(directions)
        if check_int("features", features, 3) % 2 == 0:
            raise ValueError(f"features must be odd, t and pairs of cosine and sine, got {features}")
        check_int("width", width)
        check_int("depth", depth)
        for name, value in (("fast_decay", fast_decay), ("slow_decay", slow_decay)):
            if not value > 0:
                raise ValueError(f"{name} must be positive, got {value}")
        if not 0 < target < 1:
            raise ValueError(f"target must be between 0 and 1, got {target}")
        self.fast_decay, self.slow_decay, self.target, self.shift = fast_decay, slow_decay, target, shift
        self.initial_frequency = frequency
        self.extend = _extend(extend, ("error", "zero", "tile", "resample"))
        factory: Any = {"device": device, "dtype": dtype}
        self.z = nn.Parameter(torch.empty(1, length, features, **factory))
        self.register_buffer("t", torch.empty(1, length, 1, **factory))
        self.register_buffer("deltas", torch.empty(1, 1, channels, **factory))
        self.frequency = nn.Parameter(torch.empty(1, width, **factory))
        sizes = [features, *[width] * depth]
        self.mlps = nn.ModuleList()
        for _ in range(directions):
            layers = [nn.Linear(i, o, **factory) for i, o in itertools.pairwise(sizes)]
            self.mlps.append(nn.ModuleList([*layers, nn.Linear(width, channels, bias=False, **factory)]))
        self._set_positions()

    @torch.no_grad()
    def _set_positions(self) -> None:
        z, t = self._positions(self.length)
        self.z.copy_(z)
        self.t.copy_(t)
        rates = [math.log(self.target) / at for at in (self.slow_decay, self.fast_decay)]
        self.deltas.copy_(torch.linspace(rates[0], rates[1], self.channels, dtype=torch.float64))
        self.frequency.fill_(self.initial_frequency)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ImplicitFilter:
        def apply(tensor: Tensor) -> Tensor:
            found = fn(tensor)
            # Not found.float(), which would be rounded already.
            return tensor.to(found.device) if found.dtype in _HALF and tensor.dtype not in _HALF else found

        super()._apply(apply, recurse)
        return self

    def _positions(self, count: int) -> tuple[Tensor, Tensor]:
        """Features z and times t as they are made, in double precision."""
        bands = (self.z.shape[-1] - 1) // 2
        device = self.t.device  # transformers puts parameters on meta, and leaves buffers where they are
        i = torch.arange(count, dtype=torch.float64, device=device).view(1, -1, 1)
        t = i / max(count - 1, 1)
        angle = torch.linspace(1e-4, bands - 1, bands, dtype=torch.float64, device=device) * (2 * math.pi * i / count)
        return torch.cat([t, angle.cos(), -angle.sin()], -1), t

    def reset_parameters(self) -> None:
        """Make the positions anew and draw new layers as ``nn.Linear`` does."""
        self._set_positions()
        for layer in self.mlps.modules():
            if isinstance(layer, nn.Linear):
                layer.reset_parameters()

    def forward(self, length: int | None = None) -> Tensor:
        """The taps, shape (directions, channels, length); ``length`` of the filter if None.

        Raises:
            TypeError: if length is not an integer.
            ValueError: if length is negative, or beyond the filter's while ``extend="error"``.
        """
        length = _wanted(self, length)
        z, t = self._at(length)
        z, t, deltas, frequency = working(z), working(t), working(self.deltas), working(self.frequency)
        times, rates = t.flatten(), deltas.flatten().abs()
        with torch.autocast("cpu" if z.is_meta else z.device.type, enabled=False):
            taps = evaluate(self.mlps, z, frequency, times, rates, self.shift)
        zeros = length - self.length if self.extend == "zero" else 0
        return F.pad(taps, (0, zeros)) if zeros > 0 else taps

    def _at(self, length: int) -> tuple[Tensor, Tensor]:
        if length <= self.length or self.extend == "zero":
            return self.z[:, :length], self.t[:, :length]
        if self.extend == "tile":
            rows = -(-length // self.length)
            i = torch.arange(length, device=self.t.device, dtype=working(self.t).dtype).view(1, -1, 1)
            later = i[:, self.length :] / max(self.length - 1, 1)
            return self.z.repeat(1, rows, 1)[:, :length], torch.cat([working(self.t), later], 1)
        where = {"size": length, "mode": "linear", "align_corners": True}
        z = F.interpolate(working(self.z).mT, **where).mT
        return z, F.interpolate(working(self.t).mT, **where).mT

    def extra_repr(self) -> str:
        features, width = self.z.shape[-1], self.frequency.shape[-1]
        return (
            f"{self.channels}, {self.length}, features={features}, width={width}, depth={len(self.mlps[0]) - 1}, "  # pyright: ignore[reportArgumentType]
            f"directions={self.directions}, extend={self.extend!r}"
        )


class ExplicitFilter(nn.Module):
    """Taps that are parameters, kept simple by smoothing and a soft threshold.

    ``k = dropout(sgn(w) relu(|w| - squash))`` where w is ``weight`` (directions, channels, length) smoothed. Initially
    weight[d, c, i] is normal of standard deviation 0.02 times exp(-(i / length) (channels / 2)^(c / channels)): the
    decay becomes faster with c, geometrically.

    Args:
        channels: taps are made for so many.
        length: how many taps are learned.
        directions: 1, or 2 for a second filter of later inputs.
        squash: the soft threshold lambda; zeroed taps have no gradient: at the initial 0.02 hardly one in 25 is left.
        smooth: odd width of a moving average, of those numbers that there are at the ends; 0 for none.
        smooth_domain: "time", or "frequency" to smooth real and imaginary parts of the taps' spectrum.
        dropout: with what probability a tap is dropped in training.
        extend: what taps beyond ``length`` are: "error", there are none and asking for them raises; "zero", 0.
        device: where the parameter is made.
        dtype: its dtype.

    Raises:
        TypeError: if a size is not an integer.
        ValueError: if a size or number is out of range, or an option unknown.

    Source: Fu, Epstein, Nguyen, Thomas, Zhang, Dao, Rudra, Re 2023, "Simple hardware-efficient long convolutions for
    sequence modeling".

    Example:
        >>> import torch, structmat
        >>> make = structmat.nn.ExplicitFilter(64, 1024, squash=0.003, dropout=0.1)
        >>> make(100).shape
        torch.Size([1, 64, 100])
    """

    def __init__(
        self,
        channels: int,
        length: int,
        *,
        directions: int = 1,
        squash: float = 0.0,
        smooth: int = 0,
        smooth_domain: str = "time",
        dropout: float = 0.0,
        extend: str = "error",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.channels, self.length = check_int("channels", channels), check_int("length", length)
        self.directions = _directions(directions)
        if not squash >= 0:
            raise ValueError(f"squash must be at least 0, got {squash}")
        if check_int("smooth", smooth, 0) and smooth % 2 == 0:
            raise ValueError(f"smooth must be odd, or 0 for none, got {smooth}")
        if smooth_domain not in ("time", "frequency"):
            raise ValueError(f'smooth_domain must be "time" or "frequency", got {smooth_domain!r}')
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, got {dropout}")
        self.squash, self.smooth, self.smooth_domain, self.dropout = squash, smooth, smooth_domain, dropout
        self.extend = _extend(extend, ("error", "zero"))
        self.weight = nn.Parameter(torch.empty(directions, channels, length, device=device, dtype=dtype))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw new taps."""
        place = torch.arange(self.length, device=self.weight.device) / self.length
        channel = torch.arange(self.channels, device=self.weight.device) / self.channels
        rate = (self.channels / 2) ** channel
        self.weight.normal_(0, 0.02).mul_(torch.exp(-rate[:, None] * place))

    def forward(self, length: int | None = None) -> Tensor:
        """The taps, shape (directions, channels, length); ``length`` of the filter if None.

        Raises:
            TypeError: if length is not an integer.
            ValueError: if length is negative, or beyond the filter's while ``extend="error"``.
        """
        length = _wanted(self, length)
        k = working(self.weight)
        if self.smooth and self.smooth_domain == "time":
            k = self._average(k)
        elif self.smooth:
            spectrum = torch.fft.rfft(k)
            spectrum = torch.complex(self._average(spectrum.real), self._average(spectrum.imag))
            k = torch.fft.irfft(spectrum, self.length)
        if self.squash:
            k = k.sgn() * F.relu(k.abs() - self.squash)
        # Cut or filled up; torch.export takes no slice here, which is contiguous for one length only.
        return F.dropout(F.pad(k, (0, length - self.length)), self.dropout, self.training)

    def _average(self, x: Tensor) -> Tensor:
        return F.avg_pool1d(x, self.smooth, 1, self.smooth // 2, count_include_pad=False)

    def extra_repr(self) -> str:
        return (
            f"{self.channels}, {self.length}, directions={self.directions}, squash={self.squash}, "
            f"smooth={self.smooth}, smooth_domain={self.smooth_domain!r}, dropout={self.dropout}, "
            f"extend={self.extend!r}"
        )


def _directions(directions: Any) -> int:
    if check_int("directions", directions) > 2:
        raise ValueError(f"directions must be 1 or 2, got {directions}")
    return directions


def _extend(extend: str, known: tuple[str, ...]) -> str:
    if extend not in known:
        raise ValueError(f"extend must be one of {', '.join(known)}, got {extend!r}")
    return extend


def _wanted(taps: ImplicitFilter | ExplicitFilter, length: Any) -> int:
    length = taps.length if length is None else check_int("length", length, 0)
    if taps.extend == "error" and length > taps.length:
        raise ValueError(
            f"length must be at most {taps.length}, the length of the filter, got {length}; make a longer filter, or "
            "give it an option extend= that says what later taps are"
        )
    return length
