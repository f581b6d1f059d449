"""Launches of Triton kernels at a tenth of their usual cost on the host.

Triton's own call looks at every argument to find the compiled kernel: 20 to 100 us for kernels of 30 arguments, more
than many of them run. Here whoever launches says which arguments are sizes; what Triton compiled for them is kept.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from structmat_kernels import backend
from structmat_kernels.tuning import Config

#: Triton compiles special versions for pointers that are multiples of this many bytes.
ALIGNMENT = 16


class Launch:
    """A launch whose sizes, dtypes and device are settled; calls give it the tensors.

    Args:
        kernel: a Triton kernel with parameters in the order tensors, ``scalars``, ``constants``.
        grid: number of programs along up to three axes.
        scalars: ints and floats.
        constants: the kernel's compile-time parameters, by name, and ``num_warps``.
    """

    def __init__(self, kernel: Any, grid: tuple[int, ...], scalars: tuple = (), **constants: Any) -> None:
        self._kernel, self._grid, self._scalars, self._constants = kernel, (*grid, 1, 1)[:3], scalars, constants
        self._compiled: Any = None
        self._tail: tuple = ()

    def __call__(self, *tensors: Tensor) -> None:
        """Launch on tensors of the same dtypes, on the same device, as in every call before."""
        pointers = [t.data_ptr() for t in tensors]
        if self._compiled is not None and not any(p % ALIGNMENT for p in pointers):
            self._compiled(*pointers, *self._tail)
            return
        compiled = self._kernel[self._grid](*tensors, *self._scalars, **self._constants)
        # The interpreter returns nothing.
        if compiled is not None and not any(p % ALIGNMENT for p in pointers):
            names = self._kernel.arg_names[len(tensors) + len(self._scalars) :]
            self._tail = (*self._scalars, *(self._constants[name] for name in names))
            self._compiled = compiled[self._grid]


def launch(kernel: Any, grid: tuple[int, ...], tensors: tuple[Tensor, ...], scalars: tuple, **constants: Any) -> None:
    """``Launch`` by its arguments: those of the last thousands of calls are kept."""
    dtypes = tuple([t.dtype for t in tensors])
    _launch(kernel, grid, scalars, tensors[0].device, dtypes, tuple(constants.items()))(*tensors)


@functools.lru_cache(4096)
def _launch(
    kernel: Any, grid: tuple[int, ...], scalars: tuple, device: torch.device, dtypes: tuple, constants: tuple
) -> Launch:
    return Launch(kernel, grid, scalars, **dict(constants))


class Preferences:
    """The first of some plans for whose kernels the device has room; which that is, their first call shows.

    Args:
        configs: in order of preference.
        build: makes a plan of a configuration: a function of the tensors.
    """

    def __init__(self, configs: list[Config], build: Callable[[Config], Callable[..., Any]]) -> None:
        self._rest, self._build = configs[1:], build
        self._plan = build(configs[0])

    def __call__(self, *tensors: Tensor) -> Any:
        while True:
            try:
                return self._plan(*tensors)
            except Exception as error:  # Triton's class of this error is not imported where nothing needs Triton
                if type(error).__name__ != "OutOfResources" or not self._rest:
                    raise
            self._plan = self._build(self._rest.pop(0))


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a device; the interpreter runs programs one after the other, as if it had two."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one program can have; for the interpreter those of an H100."""
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin if device.type == "cuda" else 232_448


def arithmetic(dtype: torch.dtype) -> dict[str, Any]:
    """The constants PREC and UPCAST of kernels: the precision of products, and whether bfloat16 needs conversion."""
    return {"PREC": backend.dot_precision(dtype), "UPCAST": backend.INTERPRETED}
