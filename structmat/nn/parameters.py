"""The module that owns a structured matrix's factors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from structmat.base import StructuredMatrix


class MatrixParameters(nn.Module):
    """Own the factors of a structured matrix as parameters and rebuild the value when called.

    Floating-point and complex leaves become parameters named as the fields, integer leaves buffers, and so do leaves
    without entries (of rank 0), which have no gradient; nested matrices become child modules (``factors.0.left``). A
    tensor that stands in the value twice stays one parameter.

    Args:
        value: the matrix; its factors are taken over without a copy where they are contiguous.

    Raises:
        TypeError: if value is not a structured matrix.

    Example:
        >>> import torch, structmat
        >>> weight = structmat.nn.MatrixParameters(structmat.LowRank(torch.ones(3, 1), torch.ones(1, 2)))
        >>> sorted(weight.state_dict()), weight().shape
        (['left', 'right'], torch.Size([3, 2]))
    """

    def __init__(self, value: StructuredMatrix, _shared: dict[int, Any] | None = None) -> None:
        super().__init__()
        if not isinstance(value, StructuredMatrix):
            raise TypeError(f"value must be a StructuredMatrix, got {type(value).__name__}")
        shared = {} if _shared is None else _shared
        self._matrix_class = type(value)
        self._context = tuple(getattr(value, n) for n in value._static)
        for name in value._dynamic:
            child = getattr(value, name)
            if isinstance(child, tuple):
                self.add_module(name, nn.ModuleList(MatrixParameters(c, shared) for c in child))
            elif isinstance(child, StructuredMatrix):
                self.add_module(name, MatrixParameters(child, shared))
            elif child.numel() and (child.is_floating_point() or child.is_complex()):
                if id(child) not in shared:
                    data = child.detach().resolve_conj().contiguous()
                    # Keep the original alive: an id is unique only among living objects.
                    shared[id(child)] = (nn.Parameter(data), child)
                self.register_parameter(name, shared[id(child)][0])
            else:
                # Without entries: DDP would wait for a gradient, and the largest entry of one does not exist.
                self.register_buffer(name, child.detach() if child.requires_grad else child)

    def forward(self) -> StructuredMatrix:
        """The matrix, made of the parameters as they are now."""
        children = []
        for name in self._matrix_class._dynamic:
            child = getattr(self, name)
            if isinstance(child, nn.ModuleList):
                children.append(tuple(c() for c in child))
            else:
                children.append(child() if isinstance(child, MatrixParameters) else child)
        return self._matrix_class._rebuild(tuple(children), self._context)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MatrixParameters:
        super()._apply(fn, recurse)
        # A permutation's dtype and a shift's place are structure, not tensors: they follow what happens to the tensors.

        def follow(name: str, const: Any) -> Any:
            if name == "place":
                return str(fn(torch.empty(0, device=const)).device)
            return fn(torch.empty(0, dtype=const)).dtype if isinstance(const, torch.dtype) else const

        self._context = tuple(map(follow, self._matrix_class._static, self._context))
        return self

    def __getattr__(self, name: str) -> Any:
        # nn.Module's lookup of parameters, buffers and modules comes first; what remains is a mistake worth a hint.
        try:
            return super().__getattr__(name)
        except AttributeError:
            if hasattr(StructuredMatrix, name):
                raise AttributeError(
                    f"{name!r} is an attribute of the matrix: call the module first, as in layer.weight().{name}"
                ) from None
            raise

    @property
    def shape(self) -> torch.Size:
        """The matrix's shape."""
        return self().shape

    @property
    def dtype(self) -> torch.dtype:
        """The matrix's dtype."""
        return self().dtype

    @property
    def device(self) -> torch.device:
        """The matrix's device."""
        return self().device

    def extra_repr(self) -> str:
        return repr(self())
