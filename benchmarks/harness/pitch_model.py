"""FCPE, a pitch estimator of audio, from the package `torchfcpe`; sounds whose pitch is known; its accuracy on them.

FCPE (Luo et al. 2025, "FCPE: A Fast Context-based Pitch Estimation Model") reads mel spectra and has six blocks of a
1x1 convolution to four times the width, a gated depthwise one of length 31 and a 1x1 convolution back. The 1x1
convolutions hold 9.4 of its 10.8 million parameters. The network is written anew here: of the package only the weights
are read, and neither torchaudio nor what else it imports is needed.

    pip install --no-deps torchfcpe
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from harness.packaged import package_folder

RATE, HOP, WINDOW, MELS, BINS = 16_000, 160, 1024, 128, 360
LOWEST, HIGHEST = 32.7, 1975.5  # Hz, of the first and of the last bin
#: Our names of the layers, and those of the package's file.
NAMES = {
    "stem.0": "input_stack.0",
    "stem.1": "input_stack.1",
    "stem.3": "input_stack.3",
    "norm": "norm",
    **{
        f"blocks.{i}.{name}": f"net.encoder_layers.{i}.conformer.net.{place}"
        for i in range(6)
        for name, place in {"norm": "0", "widen": "2", "along": "4.conv", "narrow": "6"}.items()
    },
}


class Block(nn.Module):
    """A convolution module of the Conformer (Gulati et al. 2020), with its residual: (batch, frames, width).

    Its 1x1 convolutions are written as what they are, linear layers at every frame.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.widen = nn.Linear(width, 4 * width)
        self.along = nn.Conv1d(2 * width, 2 * width, 31, padding=15, groups=2 * width)
        self.narrow = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.along(F.glu(self.widen(self.norm(x)), dim=-1).mT).mT
        return x + self.narrow(F.silu(inner))


class FCPE(nn.Module):
    """Log-mel spectra (batch, frames, 128) to the probability of each of 360 pitches (batch, frames, 360)."""

    def __init__(self, width: int = 512, depth: int = 6) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv1d(MELS, width, 3, padding=1),
            nn.GroupNorm(4, width),
            nn.LeakyReLU(),
            nn.Conv1d(width, width, 3, padding=1),
        )
        self.blocks = nn.Sequential(*(Block(width) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, BINS)

    def forward(self, mel: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.stem(mel.mT).mT))).sigmoid()


def load_fcpe() -> FCPE:
    """FCPE with its trained weights, float32, in evaluation mode; nothing is downloaded.

    Raises:
        ModuleNotFoundError: the package is not installed.
    """
    path = package_folder("torchfcpe", "--no-deps torchfcpe") / "assets" / "fcpe_c_v001.pt"
    found = torch.load(path, map_location="cpu", weights_only=True)["model"]
    state = {
        f"{ours}.{kind}": found[f"{theirs}.{kind}"] for ours, theirs in NAMES.items() for kind in ("weight", "bias")
    }
    for name in state:
        if name.endswith(("widen.weight", "narrow.weight")):
            state[name] = state[name].squeeze(-1)
    directions = found["output_proj.weight_v"]
    state["head.weight"] = found["output_proj.weight_g"] * directions / directions.norm(dim=1, keepdim=True)
    state["head.bias"] = found["output_proj.bias"]
    model = FCPE()
    model.load_state_dict(state)
    return model.eval()


def log_mel(audio: Tensor) -> Tensor:
    """Log-mel spectra (batch, samples / 160, 128) of 16 kHz audio (batch, samples), a frame in the middle of each hop.

    Raises:
        ValueError: the samples are no positive multiple of 160, or too few to be mirrored at the ends (432).
    """
    if audio.ndim != 2 or audio.shape[-1] % HOP or audio.shape[-1] <= (WINDOW - HOP) // 2:
        raise ValueError(
            f"audio must have shape (batch, samples), a multiple of 160 above 432, got {tuple(audio.shape)}"
        )
    padded = F.pad(audio, ((WINDOW - HOP) // 2,) * 2, mode="reflect")
    window = torch.hann_window(WINDOW, dtype=audio.dtype, device=audio.device)
    spectrum = torch.stft(padded, WINDOW, HOP, window=window, center=False, return_complex=True)
    magnitude = (spectrum.real.square() + spectrum.imag.square() + 1e-9).sqrt()
    return (_mel_filters().to(magnitude) @ magnitude).clamp(min=1e-5).log().mT


def pitch(probabilities: Tensor) -> Tensor:
    """Hz (batch, frames) of what FCPE puts out: the mean pitch, in cents, of the nine bins about the likeliest."""
    best = probabilities.argmax(-1, keepdim=True)
    near = (best + torch.arange(-4, 5, device=best.device)).clamp(0, BINS - 1)
    weights = probabilities.gather(-1, near)
    octaves = math.log2(HIGHEST / LOWEST) / (BINS - 1) * (near * weights).sum(-1) / weights.sum(-1)
    return LOWEST * 2**octaves


def voices(count: int, seconds: float, seed: int, noise: float = 8.0) -> tuple[Tensor, Tensor]:
    """Sounds like sung vowels, in noise, and their pitch.

    Each glides about with vibrato between 80 and 800 Hz. Its harmonics fall off and pass three resonances at random
    frequencies. White noise is added with up to `noise` times the sound's energy:
    with the default FCPE finds 97 to 99 % of the pitches, without noise 99.9 %.

    Returns:
        Audio (count, samples) between -1 and 1 and the pitch in Hz in the middle of each hop (count, samples / 160).
    """
    generator = torch.Generator().manual_seed(seed)

    def between(low: float, high: float, *more: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *(more or (1,)), generator=generator)

    samples = round(seconds * RATE / HOP) * HOP
    knots = math.log2(80) + (math.log2(800) - math.log2(80)) * between(0.1, 0.9)[..., None]
    knots = (knots + between(-0.5, 0.5, 1, 2 + round(3 * seconds))).clamp(math.log2(81), math.log2(790))
    glide = F.interpolate(knots, samples, mode="linear", align_corners=True)[:, 0]
    time = torch.arange(samples) / RATE
    hz = 2 ** (glide + between(0, 0.02) * torch.sin(2 * math.pi * (between(4, 7) * time + between(0, 1))))
    phase = 2 * math.pi * torch.cumsum(hz.double() / RATE, -1).remainder(1)
    centres, widths = between(300, 3500, 3), between(80, 400, 3)
    tilt, audio = between(0.6, 1.6), torch.zeros(count, samples)
    for k in range(1, 41):
        frequency = k * hz
        gain = 0.1 + sum(1 / (1 + ((frequency - centres[:, i : i + 1]) / widths[:, i : i + 1]) ** 2) for i in range(3))
        audio += torch.where(frequency < 0.45 * RATE, gain * k**-tilt, 0) * torch.sin(k * phase).float()
    audio = audio / audio.square().mean(-1, keepdim=True).sqrt()
    audio = audio + (noise * between(0, 1)).sqrt() * torch.randn(audio.shape, generator=generator)
    return 0.9 * audio / audio.abs().amax(-1, keepdim=True), hz[:, HOP // 2 :: HOP]


@torch.no_grad()
def pitch_accuracy(model: nn.Module, audio: Tensor, hz: Tensor) -> float:
    """The share of frames in which the model's pitch is within a quarter tone of the true one.

    This is the raw pitch accuracy of Poliner et al. (2007), "Melody transcription from music audio".
    """
    device = next(model.parameters()).device
    found = pitch(model(log_mel(audio).to(device))).cpu()
    return ((found / hz).log2().abs() < 1 / 24).double().mean().item()


def _mel_filters() -> Tensor:
    """Triangles (128, 513) of unit area over the bins of a spectrum, even on Slaney's (1998) mel scale up to 8 kHz."""
    # The scale is linear up to 1 kHz, 15 mels, and has 27 mels to each factor of 6.4 above.
    mels = torch.linspace(0, 15 + 27 * math.log(8) / math.log(6.4), MELS + 2, dtype=torch.float64)
    edges = torch.where(mels < 15, 200 / 3 * mels, 1000 * torch.exp(math.log(6.4) / 27 * (mels - 15)))
    below, middle, above = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    bins = torch.linspace(0, RATE / 2, WINDOW // 2 + 1, dtype=torch.float64)
    rise, fall = (bins - below) / (middle - below), (above - bins) / (above - middle)
    return (torch.minimum(rise, fall).clamp(min=0) * 2 / (above - below)).float()
