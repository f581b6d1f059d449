"""Compiles the kernels that some calls would launch for compute capability 9.0, without a GPU; prints what they need.

    TRITON_INTERPRET=0 python tests/kernels/compile_for_gpu.py fft_conv short_conv

One line of JSON for every kernel: its name, what launched it, bytes of stack (where spilled registers go) and of shared
memory. Not a test: test_compiles.py runs it in a process in which Triton does not interpret.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from structmat_kernels import backend, launches

TYPES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int32: "*i32"}
TYPES |= {torch.int64: "*i64", torch.int8: "*i8", torch.uint8: "*u8", torch.bool: "*i1"}
OPTIONS = ("num_warps", "num_stages")
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"

seen: set[tuple] = set()
what = ""


def compiled(self: launches.Launch, *tensors: torch.Tensor) -> None:
    """In place of a launch: the kernel for such arguments, specialised as Triton's own call would."""
    names, parameters = self._kernel.arg_names, self._kernel.params
    signature: dict[str, str] = {}
    constants: dict[tuple[int], object] = {}
    attributes: dict[tuple[int], list] = {}
    for i, (name, value) in enumerate(zip(names, (*tensors, *self._scalars), strict=False)):
        if isinstance(value, torch.Tensor):
            signature[name] = TYPES[value.dtype]
            attributes[i,] = [["tt.divisibility", 16]]
        elif parameters[i].do_not_specialize:
            signature[name] = "i32"
        elif value == 1 and isinstance(value, int):
            signature[name], constants[i,] = "constexpr", 1
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32" if abs(value) < 2**31 else "i64"
            if isinstance(value, int) and value % 16 == 0:
                attributes[i,] = [["tt.divisibility", 16]]
    for name, value in self._constants.items():
        if name not in OPTIONS:
            signature[name], constants[names.index(name),] = "constexpr", value
    key = (self._kernel.fn.__qualname__, str(signature), str(constants), str(attributes), str(self._constants))
    if key in seen:
        return
    seen.add(key)
    source = ASTSource(fn=self._kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {name: self._constants[name] for name in OPTIONS if name in self._constants}
    kernel = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        text = subprocess.run([CUOBJDUMP, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    stack = int(re.search(r"STACK:(\d+)", text).group(1))
    found = {"kernel": self._kernel.fn.__qualname__, "for": what, "stack": stack, "shared": kernel.metadata.shared}
    print(json.dumps(found), flush=True)


def fft_conv() -> None:
    """Forward and backward where each program runs: on the chip, carried or not, in float32 grade."""
    global what
    from structmat_kernels.fft_conv import fft_conv

    for dtype, length, more in (
        *((torch.bfloat16, n, n) for n in (256, 512, 1024, 2048, 4096, 8192)),
        *((torch.bfloat16, n, 0) for n in (16384, 20000)),
        (torch.float16, 1000, 5),
        (torch.float32, 1024, 5),
        (torch.float32, 8192, 0),
    ):
        for batch, gated in ((2, False), (32, True)):
            what = f"{dtype}, length {length}, gates {gated}"
            u, k = torch.zeros(batch, 2, length, dtype=dtype), torch.zeros(2, length)
            k_rev, skip = torch.zeros(2, more) if more else None, torch.zeros(2)
            gates = (torch.zeros_like(u), torch.zeros_like(u)) if gated else (None, None)
            given = [t for t in (u, k, k_rev, skip, *gates) if t is not None]
            for t in given:
                t.requires_grad_()
            fft_conv(u, k, k_rev, skip, *gates, backend="triton").backward(torch.zeros_like(u))


def short_conv() -> None:
    """Both layouts."""
    global what
    from structmat_kernels.short_conv import short_conv

    for dtype in (torch.bfloat16, torch.float32):
        for x in (torch.zeros(2, 64, 256, dtype=dtype), torch.zeros(2, 256, 64, dtype=dtype).mT):
            what = f"{dtype}, strides {x.stride()}"
            weight, bias = torch.zeros(64, 3, dtype=dtype), torch.zeros(64, dtype=dtype)
            for t in (x, weight, bias):
                t.requires_grad_()
            short_conv(x, weight, bias, backend="triton").backward(torch.zeros_like(x))


def pointwise() -> None:
    """The gated unit and the transposing copy."""
    global what
    from structmat_kernels.gated_gelu import gated_gelu
    from structmat_kernels.transpose import transpose

    for dtype in (torch.bfloat16, torch.float32):
        for h in (3072, 17):
            what = f"{dtype}, h {h}"
            x = torch.zeros(5, 2 * h, dtype=dtype, requires_grad=True)
            gated_gelu(x, backend="triton").backward(torch.zeros(5, h, dtype=dtype))
        for shape in ((2, 128, 256), (2, 7, 33)):
            what = f"{dtype}, {shape}"
            x, y = torch.zeros(2, *shape, dtype=dtype, requires_grad=True)
            transpose(x, y, backend="triton").sum().backward()


if __name__ == "__main__":
    launches.Launch.__call__ = compiled
    backend.runs_kernels = lambda x: x.dtype in backend.DTYPES
    backend.use_triton = lambda given, x, *others: x.dtype in backend.DTYPES
    for name in sys.argv[1:]:
        globals()[name]()
