"""Derivatives of custom ops, made of custom ops: reverse mode of any order, forward mode, vmap.

``torch.library.register_autograd`` breaks ``torch.func.grad``; an ``autograd.Function`` with ``setup_context`` does
not. It costs about 60 us of Python a call, as much as a kernel: plain eager calls go a shorter way.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import Parameter


def differentiable(
    forward_op: Callable[..., Tensor],
    backward_op: Callable[..., list[Tensor]],
    reference: Callable[..., Tensor],
    count: int,
) -> Callable[..., Tensor]:
    """A differentiable version of ``forward_op``.

    Args:
        forward_op: a custom op ``(*tensors, *static) -> Tensor``.
        backward_op: a custom op ``(grad, *tensors, *static, needs: list[bool]) -> list[Tensor]``: a gradient for each
            tensor, of the tensor's shape where needs says so and of shape (0,) elsewhere.
        reference: plain PyTorch with forward_op's signature and value; second derivatives and forward mode follow it.
        count: number of tensors.
    """

    def pullback(grad: Tensor, tensors: tuple[Tensor, ...], static: tuple, needs: Sequence[bool]) -> tuple:
        wanted = [i for i, need in enumerate(needs) if need]

        def of_wanted(*some: Tensor) -> Tensor:
            full = list(tensors)
            for i, t in zip(wanted, some, strict=True):
                full[i] = t
            return reference(*full, *static)

        return torch.func.vjp(of_wanted, *(tensors[i] for i in wanted))[1](grad)

    fast_forward, fast_backward = _implementation(forward_op), _implementation(backward_op)
    # torch.compile traces the registered overload; it cannot guard on the object that defines it.
    forward_op, backward_op = _overload(forward_op), _overload(backward_op)

    class Backward(Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(grad: Tensor, *args: Any) -> tuple[Tensor, ...]:
            tensors, static, needs = args[:count], args[count:-1], _bits(args[-1], count)
            grads = backward_op(grad, *tensors, *static, needs)
            return tuple(g for g, need in zip(grads, needs, strict=True) if need)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
            ctx.save_for_backward(*inputs[: count + 1])
            ctx.save_for_forward(*inputs[: count + 1])
            ctx.rest = inputs[count + 1 :]

        @staticmethod
        def backward(ctx: Any, *second: Tensor) -> tuple:
            *static, needs = ctx.rest
            again = functools.partial(_again, static=tuple(static), needs=_bits(needs, count))
            return (*torch.func.vjp(again, *ctx.saved_tensors)[1](second), *(None for _ in ctx.rest))

        @staticmethod
        def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, ...]:
            *static, needs = ctx.rest
            again = functools.partial(_again, static=tuple(static), needs=_bits(needs, count))
            return torch.func.jvp(again, tuple(ctx.saved_tensors), _filled(ctx.saved_tensors, tangents))[1]

    def _again(grad: Tensor, *tensors: Tensor, static: tuple, needs: list[bool]) -> tuple:
        return pullback(grad, tensors, static, needs)

    class Traced(Function):
        # Under torch.compile, which neither traces a Function inside a backward nor one with a forward mode. Compiled
        # graphs are differentiated once.
        @staticmethod
        def forward(*args: Any) -> Tensor:
            return forward_op(*args)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
            ctx.save_for_backward(*inputs[:count])
            ctx.static = inputs[count:]

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> tuple:
            needs = list(ctx.needs_input_grad[:count])
            found = backward_op(*grads, *ctx.saved_tensors, *ctx.static, needs)
            return (*(g if need else None for g, need in zip(found, needs, strict=True)), *(None for _ in ctx.static))

    class Eager(Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(*args: Any) -> Tensor:
            return forward_op(*args)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
            ctx.save_for_backward(*inputs[:count])
            ctx.save_for_forward(*inputs[:count])
            ctx.static = inputs[count:]

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> tuple:
            needs = ctx.needs_input_grad[:count]
            bits = sum(need << i for i, need in enumerate(needs))  # transforms would look into a tuple
            found = iter(Backward.apply(*grads, *ctx.saved_tensors, *ctx.static, bits))
            return (*(next(found) if need else None for need in needs), *(None for _ in ctx.static))

        @staticmethod
        def jvp(ctx: Any, *tangents: Any) -> Tensor:
            tensors, static = ctx.saved_tensors, ctx.static
            return torch.func.jvp(lambda *ts: reference(*ts, *static), tuple(tensors), _filled(tensors, tangents))[1]

    def long(*args: Any) -> Tensor:
        if not torch.compiler.is_compiling():
            return Eager.apply(*args)
        # Some versions of dynamo do not trace a Function where gradients are off.
        needed = torch.is_grad_enabled() and any([t.requires_grad for t in args[:count]])
        return Traced.apply(*args) if needed else forward_op(*args)

    fast = short(fast_forward, fast_backward, long, count)

    def call(*args: Any) -> Tensor:
        return fast(*args) if is_plain(args[:count]) else long(*args)

    return call


def short(
    forward: Callable[..., Tensor],
    backward: Callable[..., Sequence[Tensor | None]],
    long: Callable[..., Tensor],
    count: int,
) -> Callable[..., Tensor]:
    """A version for plain eager calls (see ``is_plain``), which does without operators and transforms.

    Args:
        forward: ``(*tensors, *static) -> Tensor``.
        backward: ``(grad, *tensors, *static, needs: list[bool])`` to a gradient for each tensor, anything where needs
            says no.
        long: what ``forward`` computes, differentiable any number of times; second derivatives follow it.
        count: number of tensors, any of which may be None.
    """

    class Plain(Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Tensor:
            ctx.save_for_backward(*args[:count])
            ctx.static = args[count:]
            return forward(*args)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> tuple:
            tensors, needs = ctx.saved_tensors, list(ctx.needs_input_grad[:count])
            if torch.is_grad_enabled():  # a second derivative will be asked for
                # As views: one tensor in two places has a gradient of each.
                views = [t.view_as(t) if need else t for t, need in zip(tensors, needs, strict=True)]
                wanted = [t for t, need in zip(views, needs, strict=True) if need]
                found = iter(torch.autograd.grad(long(*views, *ctx.static), wanted, grads, create_graph=True))
                return (*(next(found) if need else None for need in needs), *(None for _ in ctx.static))
            found = backward(*grads, *tensors, *ctx.static, needs)
            return (*(g if need else None for g, need in zip(found, needs, strict=True)), *(None for _ in ctx.static))

    def call(*args: Any) -> Tensor:
        if torch.is_grad_enabled() and any([t is not None and t.requires_grad for t in args[:count]]):
            return Plain.apply(*args)
        return forward(*args)

    return call


def _bits(mask: int, count: int) -> list[bool]:
    return [bool(mask >> i & 1) for i in range(count)]


def _filled(tensors: Sequence[Tensor], tangents: Sequence[Any]) -> tuple[Tensor, ...]:
    return tuple(torch.zeros_like(t) if d is None else d for t, d in zip(tensors, tangents, strict=False))


def _overload(op: Any) -> Any:
    return getattr(op, "_opoverload", op)


def _implementation(op: Any) -> Any:
    return getattr(op, "_init_fn", op)


# Where torch moves these, every call takes the long way.
_transforms_active = getattr(torch._C, "_are_functorch_transforms_active", lambda: True)
_modes = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 1)


def is_plain(tensors: tuple[Tensor | None, ...]) -> bool:
    """Whether nothing but reverse-mode autograd looks at these tensors."""
    return (
        not torch.compiler.is_compiling()
        and not _transforms_active()
        and _modes() == 0
        and torch.autograd.forward_ad._current_level < 0
        and all([t is None or type(t) in (Tensor, Parameter) for t in tensors])
    )
