"""Which implementation runs: the switch, its errors and its environment variable, lazy imports, measurements."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from structmat_kernels import backend, tuning
from structmat_kernels.backend import use_triton


def on_cuda(dtype=torch.float32, **more):
    return SimpleNamespace(dtype=dtype, is_cuda=True, device=torch.device("cuda", 0), **more)


@pytest.fixture
def interpreted(monkeypatch):
    """Triton is installed and runs in its interpreter, however the tests are run."""
    monkeypatch.setattr(backend, "_HAS_TRITON", True)
    monkeypatch.setattr(backend, "INTERPRETED", True)


def test_switch(interpreted):
    x = torch.zeros(2)
    assert use_triton("triton", x) and use_triton("triton", x, x.to("meta"))  # in the interpreter
    assert not use_triton("auto", x) and not use_triton("torch", x) and not use_triton("torch", on_cuda())
    with pytest.raises(ValueError, match=r"backend must be one of \('auto', 'torch', 'triton'\), got 'cuda'"):
        use_triton("cuda", x)
    for dtype in (torch.float64, torch.complex64, torch.int32):
        with pytest.raises(TypeError, match=rf"take bfloat16, float16, float32, got {dtype}; use backend='torch'"):
            use_triton("triton", x.to(dtype))
        assert not use_triton("auto", on_cuda(dtype))


def test_default(monkeypatch, interpreted):
    x = torch.zeros(2)
    monkeypatch.setattr(backend, "_DEFAULT", "triton")
    assert use_triton(None, x) and not use_triton("torch", x) and not use_triton("auto", x)
    monkeypatch.setattr(backend, "_DEFAULT", "none")
    with pytest.raises(ValueError, match="got 'none'"):
        use_triton(None, x)
    assert not use_triton("auto", x)


def test_obstacles(monkeypatch, interpreted):
    x = torch.zeros(2)
    with pytest.raises(TypeError, match="take plain tensors, got a distributed one"):
        use_triton("triton", x, SimpleNamespace(device_mesh=None))
    monkeypatch.setattr(backend, "_ability", lambda index: (7, 5, 65536))
    with pytest.raises(ValueError, match=r"need compute capability 8\.0 .* cuda:0 has \(7, 5\)"):
        use_triton("triton", on_cuda())
    assert not use_triton("auto", on_cuda())
    monkeypatch.setattr(backend, "_ability", lambda index: (8, 6, 101376))
    with pytest.raises(ValueError, match=r"163840 bytes of shared memory a program, cuda:0 has \(8, 6\) and 101376"):
        use_triton("triton", on_cuda())
    assert not use_triton("auto", on_cuda())
    monkeypatch.setattr(backend, "_ability", lambda index: (9, 0, 232448))
    assert use_triton("triton", on_cuda()) and use_triton("auto", on_cuda())
    assert not use_triton("auto", on_cuda(), SimpleNamespace(device_mesh=None))
    monkeypatch.setattr(backend, "INTERPRETED", False)
    with pytest.raises(ValueError, match="backend='triton' needs CUDA tensors, got cpu; use backend='auto' or 'torch'"):
        use_triton("triton", x)
    assert use_triton("triton", x.to("meta"))
    assert not backend.runs_kernels(x) and backend.runs_kernels(on_cuda())
    assert not backend.runs_kernels(on_cuda(torch.float64))
    monkeypatch.setattr(backend, "_HAS_TRITON", False)
    with pytest.raises(ValueError, match="needs the package triton, which is not installed"):
        use_triton("triton", on_cuda())
    assert not use_triton("auto", on_cuda())


def test_a_device_is_asked_once_also_in_compiled_code(monkeypatch, interpreted):
    asked = []
    properties = SimpleNamespace(major=8, minor=0, shared_memory_per_block_optin=166912)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: asked.append(index) or properties)
    backend._asked.cache_clear()
    try:
        compiled = torch.compile(lambda x: x + backend._ability(0)[2], fullgraph=True, backend="eager")
        assert compiled(torch.zeros(1)) == 166912
        assert use_triton("auto", on_cuda()) and use_triton("auto", on_cuda())
        assert asked == [0]
    finally:
        backend._asked.cache_clear()


def test_precision_follows_pytorch(monkeypatch):
    monkeypatch.setattr(backend, "INTERPRETED", False)
    before = torch.get_float32_matmul_precision()
    try:
        for setting, expected in (("highest", "ieee"), ("high", "tf32"), ("medium", "tf32")):
            torch.set_float32_matmul_precision(setting)
            assert backend.dot_precision(torch.float32) == expected
            assert backend.dot_precision(torch.bfloat16) == backend.dot_precision(torch.float16) == "ieee"
    finally:
        torch.set_float32_matmul_precision(before)


def in_subprocess(code, **environment):
    kept = {k: v for k, v in os.environ.items() if k not in ("STRUCTMAT_BACKEND", "TRITON_INTERPRET")}
    path = os.pathsep.join(p for p in sys.path if p)
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=kept | {"PYTHONPATH": path} | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split("\n")[:-1]


EVERY_OPERATION = """
import importlib, pkgutil, sys
import torch, structmat, structmat_kernels
from structmat_kernels import backend
from structmat_kernels.monarch import monarch
for package in pkgutil.iter_modules(structmat_kernels.__path__):
    if package.ispkg:
        importlib.import_module(f"structmat_kernels.{package.name}")
def call(**how):
    return monarch(torch.ones(1, 1), torch.ones(1, 1, 1), torch.ones(1, 1, 1), 1, **how)
call(backend="torch")
for interpreted in (False, True):
    backend.INTERPRETED = interpreted
    print("triton" in sys.modules)
    try:
        print(call().item())
    except ValueError as error:
        print(error)
print("triton" in sys.modules)
"""


def test_environment_variable_and_lazy_import():
    """The variable makes the default "triton"; the package is imported where the first kernel runs."""
    pytest.importorskip("triton")
    got = in_subprocess(EVERY_OPERATION, STRUCTMAT_BACKEND="triton", TRITON_INTERPRET="1")
    refused = "backend='triton' needs CUDA tensors, got cpu; use backend='auto' or 'torch'"
    assert got == ["False", refused, "False", "1.0", "True"]


# ---------------------------------------------------------------- measured configurations


@pytest.fixture
def tables(monkeypatch, tmp_path):
    """Writes the shipped table and the user's."""

    def write(shipped=None, user=None):
        for name, table in (("shipped.json", shipped), ("user.json", user)):
            (tmp_path / name).unlink(missing_ok=True)
            if table is not None:
                (tmp_path / name).write_text(json.dumps(table))
        forget()

    def forget():
        tuning._table.cache_clear()
        tuning._nearest.cache_clear()

    monkeypatch.setattr(tuning, "SHIPPED", tmp_path / "shipped.json")
    monkeypatch.setenv("STRUCTMAT_TUNING", str(tmp_path / "user.json"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    yield write
    forget()


def find(tokens, op="monarch", dtype=torch.bfloat16, sizes=(4, 4)):
    found = tuning.lookup(op, torch.device("cuda", 0), dtype, sizes, tokens)
    return found and found["path"]


KEY = "monarch 9.0 bfloat16 4x4"


def test_nearest_measurement_within_reach(tables):
    assert tuning.entry_key("monarch", torch.device("cuda", 0), torch.bfloat16, (4, 4)) == KEY
    tables({KEY: {"16": {"path": "few"}, "1024": {"path": "many"}}})
    assert tuning.REACH == 8
    expected = {1: None, 2: "few", 16: "few", 127: "few", 129: "many", 1024: "many", 8192: "many", 8193: None, 0: None}
    assert {tokens: find(tokens) for tokens in expected} == expected


def test_only_its_own_key(tables):
    tables({KEY: {"16": {"path": "few"}}})
    assert find(16) == "few"
    assert find(16, op="monarch_backward") is None
    assert find(16, dtype=torch.float16) is None
    assert find(16, sizes=(4, 8)) is None and find(16, sizes=(4,)) is None
    assert tuning.lookup("monarch", torch.device("cpu"), torch.bfloat16, (4, 4), 16) is None  # not on CUDA


def test_user_comes_before_shipped(tables):
    tables({KEY: {"16": {"path": "shipped"}, "1024": {"path": "shipped"}}}, {KEY: {"16": {"path": "user"}}})
    assert find(16) == "user" and find(1024) == "shipped"
    other = "monarch 9.0 bfloat16 2x2"
    tables({KEY: {"16": {"path": "shipped"}}}, {other: {"16": {"path": "user"}}})
    assert find(16) == "shipped" and find(16, sizes=(2, 2)) == "user"
    tables(None, {KEY: {"16": {"path": "user"}}})
    assert find(16) == "user"
    tables()
    assert find(16) is None


def test_place_of_the_users_file(monkeypatch, tmp_path):
    monkeypatch.delenv("STRUCTMAT_TUNING", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert tuning.user_file() == tmp_path / "structmat" / "tuning.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert tuning.user_file() == tmp_path / ".cache" / "structmat" / "tuning.json"
    monkeypatch.setenv("STRUCTMAT_TUNING", str(tmp_path / "mine.json"))
    assert tuning.user_file() == tmp_path / "mine.json"
