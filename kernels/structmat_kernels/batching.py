"""Batch dimensions of operands, brought to the one form that the kernels take, and back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def merge(x: Tensor, factors: tuple[Tensor, ...], events: tuple[int, ...]) -> tuple[Tensor, list[Tensor], Callable]:
    """One batch dimension for all operands.

    Args:
        x: shape (*batch, tokens, n).
        factors: each of shape (*batch, *event).
        events: number of event dimensions of each factor.

    Returns:
        x as (G, tokens', n), the factors as (G, *event), and the function that gives a result (G, tokens', m) the
        batch dimensions back. Where no factor has a batch, that of x goes into the tokens and G = 1.
    """
    if x.ndim <= 3 and all(f.ndim == e for f, e in zip(factors, events, strict=True)):  # the usual case, cheaply
        flat = [f.unsqueeze(0) for f in factors]
        if x.ndim == 2:
            return x.unsqueeze(0), flat, lambda y: y.squeeze(0)
        lead, tokens, n = x.shape
        return x.reshape(1, lead * tokens, n), flat, lambda y: y.reshape(lead, tokens, y.shape[-1])
    batches = [f.shape[: f.ndim - e] for f, e in zip(factors, events, strict=True)]
    tokens, n = x.shape[-2:]
    if all(b.numel() == 1 for b in batches):
        lead = torch.broadcast_shapes(x.shape[:-2], *batches)
        flat = [f.reshape(1, *f.shape[f.ndim - e :]) for f, e in zip(factors, events, strict=True)]
        return (
            x.expand(*lead, tokens, n).reshape(1, lead.numel() * tokens, n),
            flat,
            lambda y: y.reshape(*lead, tokens, y.shape[-1]),
        )
    lead = torch.broadcast_shapes(x.shape[:-2], *batches)
    flat = [
        f.expand(*lead, *f.shape[f.ndim - e :]).reshape(lead.numel(), *f.shape[f.ndim - e :])
        for f, e in zip(factors, events, strict=True)
    ]
    return (
        x.expand(*lead, tokens, n).reshape(lead.numel(), tokens, n),
        flat,
        lambda y: y.reshape(*lead, tokens, y.shape[-1]),
    )


def vmap_over_batch(op: Any, tensors: int, rows: bool = False) -> None:
    """Register a vmap rule for a custom op whose first arguments are tensors of leading dimension G.

    Args:
        op: the custom op; all of its outputs have leading dimension G, or shape (0,).
        tensors: how many of its first arguments are tensors of leading dimension G.
        rows: whether the op maps the rows of its first argument (G, tokens, n) one by one to those of its output; then
            nothing is copied where only that argument is mapped and G = 1.
    """

    def rule(info: Any, in_dims: tuple, *args: Any) -> tuple:
        size = info.batch_size
        mapped = [i for i in range(tensors, len(args)) if isinstance(args[i], Tensor) and in_dims[i] is not None]
        if mapped:  # tables, which have no leading G: each its own call
            outs = []
            for i in range(size):
                dims = zip(args, in_dims, strict=True)
                outs.append(op(*(a.select(d, i) if isinstance(a, Tensor) and d is not None else a for a, d in dims)))
            if isinstance(outs[0], Tensor):
                return torch.stack(outs), 0
            return [torch.stack(found) for found in zip(*outs, strict=True)], [0] * len(outs[0])
        if rows and in_dims[0] is not None and not any(d is not None for d in in_dims[1:tensors]):
            x = args[0].movedim(in_dims[0], 0)
            if x.shape[1] == 1:
                y = op(x.reshape(1, size * x.shape[2], x.shape[3]), *args[1:])
                return y.reshape(size, 1, x.shape[2], y.shape[-1]), 0
        flat = []
        for value, dim in zip(args[:tensors], in_dims[:tensors], strict=True):
            full = value.movedim(dim, 0) if dim is not None else value.expand(size, *value.shape)
            flat.append(full.reshape(size * full.shape[1], *full.shape[2:]))
        out = op(*flat, *args[tensors:])

        def split(t: Tensor) -> Tensor:
            return t.reshape(size, t.shape[0] // size, *t.shape[1:]) if t.ndim > 1 else t.expand(size, *t.shape)

        if isinstance(out, Tensor):
            return split(out), 0
        return [split(t) for t in out], [0] * len(out)

    op.register_vmap(rule)
