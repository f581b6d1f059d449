"""Which implementation an operation runs: plain PyTorch or Triton kernels.

Every operation takes ``backend="auto" | "torch" | "triton"``. "auto" runs the kernels on CUDA tensors that they support
and the reference everywhere else; "triton" raises where the kernels cannot run. The environment variable
``STRUCTMAT_BACKEND``, read when this module is imported, replaces the default "auto".
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
from typing import Any

import torch
from torch import Tensor

BACKENDS = ("auto", "torch", "triton")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)

#: True where Triton runs its kernels in Python on CPU tensors, for tests. Triton reads it when a kernel is defined.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_PLAIN = (Tensor, torch.nn.Parameter)  # asking others for what they lack costs a microsecond each
_HAS_TRITON = importlib.util.find_spec("triton") is not None
_DEFAULT = os.environ.get("STRUCTMAT_BACKEND", "auto")


#: Bytes of shared memory that a program must be able to have: an A100 has 166912, an H100 232448, others about 100000.
SHARED_MEMORY = 163_840


@functools.cache
def _asked(index: int) -> tuple[int, int, int]:
    properties = torch.cuda.get_device_properties(index)
    return properties.major, properties.minor, properties.shared_memory_per_block_optin


def _ability(index: int) -> tuple[int, int, int]:
    """Compute capability and bytes of shared memory of a device."""
    return _asked(index)


# torch.compile calls it and keeps the result. This is what torch.compiler.assume_constant_result does, whose import of
# dynamo would bring triton into every program.
_ability._dynamo_marked_constant = True


def _obstacle(tensors: tuple[Tensor, ...]) -> Exception | None:
    """Why the kernels cannot run on these tensors."""
    x = tensors[0]
    if x.dtype not in DTYPES:
        names = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
        return TypeError(f"the Triton kernels take {names}, got {x.dtype}; use backend='torch'")
    if not _HAS_TRITON:
        return ValueError("backend='triton' needs the package triton, which is not installed")
    if any([type(t) not in _PLAIN and hasattr(t, "device_mesh") for t in tensors]):
        return TypeError("the Triton kernels take plain tensors, got a distributed one; use backend='torch'")
    if x.is_cuda:
        major, minor, shared = _ability(x.device.index or 0)
        capability = (major, minor)
        if capability < (8, 0) or shared < SHARED_MEMORY:
            return ValueError(
                f"the Triton kernels need compute capability 8.0 and {SHARED_MEMORY} bytes of shared memory a program, "
                f"{x.device} has {capability} and {shared}; use backend='torch'"
            )
    elif not (INTERPRETED and x.device.type == "cpu") and x.device.type != "meta":
        return ValueError(f"backend='triton' needs CUDA tensors, got {x.device}; use backend='auto' or 'torch'")
    return None


def use_triton(backend: str | None, *tensors: Tensor) -> bool:
    """Whether an operation on ``tensors`` (of one dtype and device) runs its Triton kernels.

    Args:
        backend: "auto", "torch", "triton", or None for the default.
        tensors: all tensor operands; the first one decides.

    Raises:
        ValueError: if backend is not one of the three, or is "triton" where the kernels cannot run.
        TypeError: if backend is "triton" and the dtype has no kernels.
    """
    backend = _DEFAULT if backend is None else backend
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}")
    if backend == "torch" or (backend == "auto" and not tensors[0].is_cuda):
        return False
    obstacle = _obstacle(tensors)
    if backend == "triton" and obstacle is not None:
        raise obstacle
    return obstacle is None


def runs_kernels(x: Tensor) -> bool:
    """Whether a custom op that was called on ``x`` can launch kernels; its default is the reference."""
    return x.dtype in DTYPES and (x.is_cuda or INTERPRETED)


_NOTHING = contextlib.nullcontext()


def launching(x: Tensor) -> Any:
    """A context for work on x: its device is the current one, and autocast, which has had its say, is off."""
    autocast = torch.is_autocast_enabled(x.device.type)
    if not autocast and (not x.is_cuda or x.get_device() == torch.cuda.current_device()):
        return _NOTHING
    device = torch.cuda.device_of(x)
    if not autocast:
        return device
    both = contextlib.ExitStack()
    both.enter_context(device)
    both.enter_context(torch.autocast(x.device.type, enabled=False))
    return both


def dot_precision(dtype: torch.dtype) -> str:
    """``tl.dot``'s input precision: float32 follows ``torch.get_float32_matmul_precision()`` as dense products do."""
    exact = INTERPRETED or dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest"
    return "ieee" if exact else "tf32"
