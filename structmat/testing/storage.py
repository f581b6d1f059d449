"""Checks of copies, conversions, pickles, pytrees and state dicts."""

from __future__ import annotations

import copy
import io
import pickle
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.utils import _pytree as pytree

from structmat.base import StructuredMatrix
from structmat.nn.parameters import MatrixParameters
from structmat.testing.entry import Entry, assert_close, draw


def _same(A: StructuredMatrix, B: StructuredMatrix) -> None:
    assert type(A) is type(B)
    assert A.shape == B.shape
    assert A.dtype == B.dtype
    for a, b in zip(A.tensors(), B.tensors(), strict=True):
        assert torch.equal(a, b), "factors differ"


def check_pytree(entry: Entry, device: Any = "cpu") -> None:
    """Flattening and rebuilding is exact, never validates, and the structure survives serialisation."""
    A = entry(entry.dtypes[0], device)
    leaves, spec = pytree.tree_flatten(A)
    assert all(isinstance(t, torch.Tensor) for t in leaves)
    _same(A, pytree.tree_unflatten(leaves, spec))
    _same(A, pytree.tree_unflatten(leaves, pytree.treespec_loads(pytree.treespec_dumps(spec))))
    anything = pytree.tree_unflatten([object() for _ in leaves], spec)
    assert type(anything) is type(A)
    paths = [p for p, _ in pytree.tree_flatten_with_path(A)[0]]
    assert len(set(map(str, paths))) == len(leaves)


def check_copies(entry: Entry, device: Any = "cpu") -> None:
    """pickle, torch.save, deepcopy, clone and detach; a value cannot be assigned to."""
    A = entry(entry.dtypes[0], device)
    _same(A, pickle.loads(pickle.dumps(A)))
    _same(A, copy.deepcopy(A))
    _same(A, A.clone())
    _same(A, A.detach())
    buffer = io.BytesIO()
    torch.save(A, buffer)
    buffer.seek(0)
    _same(A, torch.load(buffer, weights_only=False))
    try:
        A.shape_of_things = 1  # pyright: ignore[reportAttributeAccessIssue]
    except AttributeError:
        pass
    else:
        raise AssertionError("a structured matrix must be frozen")
    grad = A.clone().requires_grad_()
    wanted = [t.is_floating_point() or t.is_complex() for t in grad.tensors()]
    assert [t.requires_grad for t in grad.tensors()] == wanted
    assert not any(t.requires_grad for t in grad.detach().tensors())


def check_conversion(entry: Entry, device: Any = "cpu") -> None:
    """``to`` changes dtype and device of every factor and loses nothing silently."""
    A = entry(entry.dtypes[0], device)
    x = draw((3, A.shape[-1]), A)
    low = torch.complex64 if A.dtype.is_complex else torch.float32
    single = A.to(low)
    assert single.dtype == low
    assert_close(single.linear(x.to(low)), x @ entry.reference(A).mT, what="linear after .to(float32)")
    twin = A.to(torch.complex128)
    assert twin.dtype == torch.complex128
    assert_close(twin.linear(x.to(torch.complex128)), x @ entry.reference(A).mT, what="linear after .to(complex128)")
    try:
        twin.to(torch.float64)
    except TypeError as error:
        assert "imaginary" in str(error)
    else:
        raise AssertionError("complex to real must raise")
    meta = A.to("meta")
    assert meta.device.type == "meta"
    assert meta.linear(x.to("meta")).shape == A.linear(x).shape
    assert A.to(device=device, dtype=low).dtype == low


def check_state_dict(entry: Entry, device: Any = "cpu") -> None:
    """A module's state dict goes through safetensors and back into a module made from other values."""
    dtype = torch.float32 if torch.float32 in entry.dtypes else entry.dtypes[0]
    A, other = entry(dtype, device), entry(dtype, device, seed=1)
    module, fresh = MatrixParameters(A), MatrixParameters(other)
    _same(A, module())
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "matrix.safetensors")
        save_file(module.state_dict(), path)
        fresh.load_state_dict(load_file(path, device=str(device)))
    _same(A, fresh())
    _same(A, copy.deepcopy(module)())
    _same(A, pickle.loads(pickle.dumps(module))())
    half = MatrixParameters(A).to(torch.bfloat16)()
    assert half.dtype == torch.bfloat16
    trainable = sum(p.numel() for p in module.parameters())
    assert trainable == A.num_params, f"{trainable} parameters in the module, {A.num_params} in the value"
