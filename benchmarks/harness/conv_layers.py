"""A layer of M2-BERT, with and without kernels, beside one of BERT."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertConfig
from transformers.models.bert.modeling_bert import BertLayer

from harness.conv_cases import NEED_CUDA, Alternative, Built, Case, Tensors, relative
from harness.problem import DTYPES, seeded
from structmat.models.m2 import M2BertConfig
from structmat.models.m2.bert import M2BertLayer
from structmat_kernels import backend
from structmat_kernels.fft_conv import op as long_op
from structmat_kernels.short_conv import op as short_op

#: Hidden units of the MLP of all these layers, as a multiple of their channels.
WIDER = 4


@contextlib.contextmanager
def switched(default: str, convolutions: bool) -> Iterator[None]:
    """The default backend, and whether "auto" takes the convolutions' kernels, both for all of this process."""
    before = backend._DEFAULT, long_op.MEASURED, short_op.MEASURED
    backend._DEFAULT, long_op.MEASURED, short_op.MEASURED = default, convolutions, convolutions
    try:
        yield
    finally:
        backend._DEFAULT, long_op.MEASURED, short_op.MEASURED = before


def layers(case: Case, device: torch.device) -> list[Alternative]:
    """BERT with the fastest attention of torch, and M2 all in PyTorch, by its older kernels alone, and by all."""
    d = case.channels
    sizes: dict[str, Any] = {"hidden_size": d, "intermediate_size": WIDER * d, "hidden_dropout_prob": 0.0}
    sizes["max_position_embeddings"] = case.length

    def bert() -> nn.Module:
        options: dict[str, Any] = {"num_attention_heads": max(1, d // 64), "attention_probs_dropout_prob": 0.0}
        options |= {"attn_implementation": "sdpa"}
        return BertLayer(BertConfig(**options, **sizes), layer_idx=0)

    def m2() -> nn.Module:
        return M2BertLayer(M2BertConfig.preset("80M", **sizes))

    ways = [("BERT, sdpa", bert, "auto", False), ("M2, PyTorch", m2, "torch", False)]
    ways += [("M2, other kernels", m2, "auto", False), ("M2, all kernels", m2, "auto", True)]
    return [_alternative(case, device, *way) for way in ways]


def _alternative(
    case: Case, device: torch.device, name: str, make: Callable[[], nn.Module], default: str, ours: bool
) -> Alternative:
    made: list[tuple[nn.Module, Tensor]] = []

    def build(i: int) -> Built:
        torch.manual_seed(0)
        layer = make().to(device)
        draw = seeded(1000, device, torch.float32)
        x = draw(case.batch, case.length, case.channels)
        if not case.training:
            layer, x = layer.eval().to(DTYPES[case.dtype]), x.to(DTYPES[case.dtype])
        made[:] = [(layer, x)]

        def run(x: Tensor, *_: Tensor) -> Tensor:
            half = case.training and device.type == "cuda"
            with switched(default, ours), torch.autocast(device.type, torch.bfloat16, enabled=half):
                y = layer(x)
            return y[0] if isinstance(y, tuple) else y

        leaves = {"x": x.requires_grad_(case.training), **dict(layer.named_parameters())}
        return leaves, draw(*x.shape) if case.training else None, run

    def check(found: Tensors) -> dict[str, Any]:
        """Of two sequences, against the same weights in float64."""
        layer, x = made[0]
        with torch.no_grad(), switched("torch", False):
            y = copy.deepcopy(layer).double()(x[:2].detach().double())
        y = y[0] if isinstance(y, tuple) else y
        cells = {"error": f"{relative(found['y'][:2], y):.2e}"}
        return cells | {"rounding": f"{relative(y.to(DTYPES[case.dtype]), y):.2e}"}

    # "auto" takes no kernels on a CPU.
    return Alternative(name, build, ours, NEED_CUDA if ours and device.type != "cuda" else "", check)
