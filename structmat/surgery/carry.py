"""Keep an optimizer at work while layers of its model are exchanged."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from structmat.nn import StructuredLinear
from structmat.surgery.selection import check_model, is_linear_like, module_names
from structmat.surgery.spec import is_conv1d


@contextmanager
def carry_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Let an optimizer go on over an exchange of layers: the new parameters take the old ones' places in its groups.

    Exchange layers inside the ``with`` block, between ``optimizer.step()`` and the next ``backward()``, by
    :func:`compress_`, :func:`densify_` or :func:`replace_`. The groups keep their options, so schedulers go on;
    parameters that stay keep their state. The new weight enters the group of the first of the old factors that the
    optimizer has, at its place; if it has none, the new weight stays out. Check a group's weight decay: factors are
    often trained without (:func:`structmat.nn.parameter_groups`).

    The state of the new parameters:

    - Momentum of SGD, structured to dense. A buffer is a velocity: the factors t go on by -lr * v(t), and W(t) by
      -lr * J v(t), J being the derivative of W by t. The dense weight gets the buffer J v, computed by automatic
      differentiation, so that it keeps moving as it did, to first order in lr. (It is not the buffer that dense
      training would have had: the factors' gradients J^H g do not determine g.) Groups with different lr are accounted
      for.
    - All other state starts anew, as for a new parameter: Adam's second moments are averages of the squares of other
      gradients, which say nothing of the dense ones entry by entry, and its first moments are of use only with them.
      The count of steps starts at 0 too, so bias correction is right; the first steps have the full length lr in every
      entry, which calls for a short warm-up.

    Sparse-to-dense training ("reverse sparsification", Dao et al. 2022, Monarch) trains structured
    weights for most of the steps and the dense product for the rest. The authors' code (HazyResearch/fly) converts the
    weights of a checkpoint only, and begins with a new optimizer.

    Args:
        model: the model whose layers will be exchanged.
        optimizer: one that keeps state by parameter (all of ``torch.optim`` but ``LBFGS``).

    Raises:
        TypeError: if an argument has the wrong type, or the optimizer is ``LBFGS``.

    After an error inside the block the optimizer is as before.

    Example:
        >>> import torch, structmat
        >>> from structmat import surgery
        >>> model = torch.nn.Sequential(structmat.nn.MonarchLinear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))
        >>> optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        >>> with surgery.carry_optimizer(model, optimizer):
        ...     report = surgery.densify_(model)
        >>> [tuple(p.shape) for p in optimizer.param_groups[0]["params"]]
        [(64,), (64, 64), (10, 64), (10,)]
    """
    check_model(model)
    if not isinstance(optimizer, torch.optim.Optimizer) or isinstance(optimizer, torch.optim.LBFGS):
        raise TypeError(
            "optimizer must be a torch.optim.Optimizer with state by parameter, such as AdamW or SGD, got "
            f"{type(optimizer).__name__}"
        )
    before = linear_layers(model)
    yield
    after = linear_layers(model)
    known, used = {p for layer in before.values() for p in layer.parameters()}, set(model.parameters())
    for name, old in before.items():
        new = after.get(name, old)
        if new is old:
            continue
        for part in ("bias", "weight"):
            gone = [p for p in _part(old, part) if p not in used]
            added = [p for p in _part(new, part) if p not in known]
            buffer = _velocity(old, optimizer) if part == "weight" and is_linear_like(new) else None
            if buffer is not None and is_conv1d(new):
                buffer = buffer.mT.contiguous()
            if _exchange(optimizer, gone, added) and buffer is not None:
                optimizer.state[added[0]]["momentum_buffer"] = buffer
            known.update(added)


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Dense and structured linear layers by their first names."""
    return {
        names[0]: module
        for module, names in module_names(model).items()
        if is_linear_like(module) or isinstance(module, StructuredLinear)
    }


def _part(layer: nn.Module, part: str) -> list[nn.Parameter]:
    value = getattr(layer, part)
    return [] if value is None else [value] if isinstance(value, nn.Parameter) else list(value.parameters())


def _place(optimizer: torch.optim.Optimizer, parameter: Tensor) -> tuple[dict[str, Any], int] | None:
    for group in optimizer.param_groups:
        for i, other in enumerate(group["params"]):
            if other is parameter:
                return group, i
    return None


def _exchange(optimizer: torch.optim.Optimizer, gone: list[nn.Parameter], added: list[nn.Parameter]) -> bool:
    """Put parameters where the first of others stood, and these out of the optimizer; whether any stood there."""
    places = [(p, place) for p in gone if (place := _place(optimizer, p))]
    if not places:
        return False
    group, at = places[0][1]
    names = group.get("param_names")
    group["params"][at:at] = added
    if names is not None:
        names[at:at] = [names[at] + (f".{i}" if len(added) > 1 else "") for i in range(len(added))]
    for parameter, _ in places:
        group, at = _place(optimizer, parameter) or (group, 0)
        del group["params"][at]
        if "param_names" in group:
            del group["param_names"][at]
        optimizer.state.pop(parameter, None)
    return True


def _velocity(layer: nn.Module, optimizer: torch.optim.Optimizer) -> Tensor | None:
    """The derivative of the dense weight along the factors' momentum, in units of the first factor's learning rate."""
    if not isinstance(layer, StructuredLinear) or not isinstance(optimizer, torch.optim.SGD):
        return None
    places = [(p, place[0]) for p in layer.weight.parameters() if (place := _place(optimizer, p))]
    factors = [(p, group) for p, group in places if optimizer.state.get(p, {}).get("momentum_buffer") is not None]
    if not factors or not all(p.requires_grad for p, _ in factors):
        return None
    lr = float(places[0][1]["lr"])
    with torch.enable_grad():
        # J v by two vector-Jacobian products: J^H u is linear in u, and its inner product with v has the gradient J v.
        value = layer.weight().to_dense()
        u = torch.zeros_like(value, requires_grad=True)
        pulled = torch.autograd.grad(value, [p for p, _ in factors], u, create_graph=True)
        total = torch.zeros((), dtype=value.dtype.to_real(), device=value.device)
        for (p, group), g in zip(factors, pulled, strict=True):
            v = optimizer.state[p]["momentum_buffer"] * (float(group["lr"]) / lr if lr else 1.0)
            total = total + (g.conj() * v).sum().real
    if not total.requires_grad:  # the product does not depend on its factors, as a Vandermonde matrix of one column
        return torch.zeros_like(value.detach())
    return torch.autograd.grad(total, u)[0].contiguous()
