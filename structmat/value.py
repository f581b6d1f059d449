"""Values made of tensors: frozen dataclasses that are pytree nodes, and what can be done leaf by leaf."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Self, TypeVar, cast, dataclass_transform

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

T = TypeVar("T", bound=type)


def static(default: Any = dataclasses.MISSING) -> Any:
    """Declare a field that is structure, not data: it goes into the pytree context and is never a leaf.

    Args:
        default: the field's default value, if it has one.

    Returns:
        A dataclass field.
    """
    return dataclasses.field(default=default, metadata={"static": True})


@dataclass_transform(frozen_default=True, eq_default=False, field_specifiers=(static,))
def matrix(cls: T) -> T:
    """Make a subclass of :class:`~structmat.base.StructuredMatrix` a frozen dataclass and a pytree node.

    Fields hold tensors, structured matrices or tuples of structured matrices; fields declared by :func:`static` hold
    integers, strings or dtypes. Rebuilding a value from its leaves never validates, so that transformations may carry
    any object in the place of a leaf.

    Args:
        cls: the class to decorate.

    Returns:
        The same class.

    Raises:
        TypeError: if ``cls`` does not derive from :class:`StructuredMatrix`.
    """
    if not issubclass(cls, FactorValue):
        raise TypeError(f"@matrix decorates subclasses of StructuredMatrix, got {cls.__name__}")
    cls = cast(T, dataclasses.dataclass(frozen=True, eq=False, repr=False)(cls))
    fields = dataclasses.fields(cls)
    cls._static = tuple(f.name for f in fields if f.metadata.get("static"))
    cls._dynamic = tuple(f.name for f in fields if not f.metadata.get("static"))

    def flatten(value: Any) -> tuple[list[Any], tuple[Any, ...]]:
        return [getattr(value, n) for n in cls._dynamic], tuple(getattr(value, n) for n in cls._static)

    def flatten_with_keys(value: Any) -> tuple[list[Any], tuple[Any, ...]]:
        children, context = flatten(value)
        return [(pytree.GetAttrKey(n), c) for n, c in zip(cls._dynamic, children, strict=True)], context

    pytree.register_pytree_node(
        cls,
        flatten,
        lambda children, context: cls._rebuild(tuple(children), context),
        serialized_type_name=f"{cls.__module__}.{cls.__qualname__}",
        to_dumpable_context=lambda context: [to_json(c) for c in context],
        from_dumpable_context=lambda dumped: tuple(from_json(c) for c in dumped),
        flatten_with_keys_fn=flatten_with_keys,
    )
    return cls


def to_json(value: Any) -> Any:
    """A static field as JSON gives it back: dtypes by name, complex numbers as text, tuples as lists."""
    if isinstance(value, (tuple, list)):
        return [to_json(v) for v in value]
    if isinstance(value, complex):
        return f"complex({value.real!r},{value.imag!r})"
    return str(value) if isinstance(value, torch.dtype) else value


def from_json(value: Any) -> Any:
    """Undo :func:`to_json`."""
    if isinstance(value, list):
        return tuple(from_json(v) for v in value)
    if isinstance(value, str) and value.startswith("complex("):
        real, imag = value[8:-1].split(",")
        return complex(float(real), float(imag))
    dtype = getattr(torch, value[6:], None) if isinstance(value, str) and value.startswith("torch.") else None
    return dtype if isinstance(dtype, torch.dtype) else value


class FactorValue:
    """A value whose fields are tensors, other values, or tuples of values; the part of the protocol about leaves."""

    _dynamic: ClassVar[tuple[str, ...]] = ()
    _static: ClassVar[tuple[str, ...]] = ()

    @property
    def shape(self) -> torch.Size:
        """``(*batch, rows, columns)``."""
        raise NotImplementedError(f"{type(self).__name__} must define shape")

    @classmethod
    def _rebuild(cls, children: tuple[Any, ...], context: tuple[Any, ...]) -> Self:
        value = object.__new__(cls)
        for name, child in zip(cls._dynamic, children, strict=True):
            object.__setattr__(value, name, child)
        for name, const in zip(cls._static, context, strict=True):
            object.__setattr__(value, name, const)
        return value

    def _map(self, fn: Callable[[Tensor], Tensor]) -> Self:
        """Apply ``fn`` to every tensor leaf."""
        return self._map_children(lambda c: c._map(fn) if isinstance(c, FactorValue) else fn(c))

    def _map_children(self, fn: Callable[[Any], Any]) -> Self:
        """Apply ``fn`` to every field's tensor or value, and to every member of a tuple."""
        children = [getattr(self, n) for n in self._dynamic]
        mapped = tuple(tuple(fn(c) for c in v) if isinstance(v, tuple) else fn(v) for v in children)
        return self._rebuild(mapped, tuple(getattr(self, n) for n in self._static))

    def tensors(self) -> Iterator[Tensor]:
        """Iterate over the tensor leaves, in field order."""
        for name in self._dynamic:
            child = getattr(self, name)
            for item in child if isinstance(child, tuple) else (child,):
                if isinstance(item, FactorValue):
                    yield from item.tensors()
                else:
                    yield item

    def _first(self) -> Any:
        """The first factor, a tensor or a value: all agree in dtype and device."""
        child = getattr(self, self._dynamic[0])
        return child[0] if isinstance(child, tuple) else child

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the factors."""
        return self._first().dtype

    @property
    def device(self) -> torch.device:
        """The device of the factors."""
        return self._first().device

    @property
    def batch_shape(self) -> torch.Size:
        """The leading dimensions of ``shape``."""
        return self.shape[:-2]

    @property
    def ndim(self) -> int:
        """The number of dimensions of ``shape``."""
        return len(self.shape)

    @property
    def num_params(self) -> int:
        """Stored floating-point or complex numbers (indices do not count)."""
        return sum(t.numel() for t in self.tensors() if t.is_floating_point() or t.is_complex())

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Move or convert the factors: ``A.to(dtype)``, ``A.to(device)``, ``A.to(device, dtype)``.

        Raises:
            TypeError: if a complex matrix would become real (take ``A.to_dense().real``), or on unknown arguments.
        """
        device, dtype = kwargs.pop("device", None), kwargs.pop("dtype", None)
        if kwargs:
            raise TypeError(f"to() got unexpected arguments {sorted(kwargs)}; it takes device and dtype")
        for arg in args:
            if isinstance(arg, torch.dtype):
                dtype = arg
            elif isinstance(arg, (torch.device, str, int)):
                device = arg
            else:
                raise TypeError(f"to() takes a dtype or a device, got {type(arg).__name__}")
        return self._to(device, dtype)

    def _to(self, device: Any, dtype: torch.dtype | None) -> Self:
        if dtype is not None and not (dtype.is_floating_point or dtype.is_complex):
            raise TypeError(f"dtype must be floating point or complex, got {dtype}")
        if dtype is not None and self.dtype.is_complex and not dtype.is_complex:
            raise TypeError(f"converting {self.dtype} to {dtype} would lose the imaginary part")

        def move(child: Any) -> Any:
            if isinstance(child, FactorValue):  # by its own rule: a permutation's dtype is not in its tensor
                return child._to(device, dtype)
            inexact = child.is_floating_point() or child.is_complex()
            return child.to(device=device, dtype=dtype if dtype is not None and inexact else child.dtype)

        return self._map_children(move)

    def detach(self) -> Self:
        """The same matrix, cut from the autograd graph."""
        return self._map(lambda t: t.detach())

    def clone(self) -> Self:
        """A copy of the factors, inside the autograd graph."""
        return self._map(lambda t: t.clone())

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Set ``requires_grad`` of the floating-point and complex factors in place."""
        for t in self.tensors():
            if t.is_floating_point() or t.is_complex():
                t.requires_grad_(requires_grad)
        return self

    def __repr__(self) -> str:
        def show(child: Any) -> str:
            if isinstance(child, tuple):
                return f"({', '.join(map(show, child))})"
            return repr(tuple(child.shape)) if isinstance(child, Tensor) else repr(child)

        fields = [f"{n}={show(getattr(self, n))}" for n in self._dynamic]
        if not all(isinstance(t, Tensor) for t in self.tensors()):
            return f"{type(self).__name__}({', '.join(fields)})"  # rebuilt around something else by a transformation
        kind = f"dtype={self.dtype}" + (f", device='{self.device}'" if self.device.type != "cpu" else "")
        return f"{type(self).__name__}(shape={tuple(self.shape)}, {', '.join(fields)}, {kind})"
