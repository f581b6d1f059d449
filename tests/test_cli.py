"""The command line: real files in, real files out."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

import structmat
from structmat import surgery
from structmat.cli import main

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]), "OMP_NUM_THREADS": "1"}


def Model(seed=0):
    torch.manual_seed(seed)
    parts = {"word_embeddings": nn.Embedding(40, 24), "layers": nn.ModuleList(nn.Linear(24, 24) for _ in range(11))}
    return nn.ModuleDict(
        {**parts, "up": nn.Linear(24, 36, bias=False), "norm": nn.LayerNorm(36), "lm_head": nn.Linear(36, 40)}
    )


@pytest.fixture
def file(tmp_path):
    safetensors.torch.save_file(Model().state_dict(), tmp_path / "in.safetensors", {"format": "pt", "mine": "yes"})
    return tmp_path / "in.safetensors"


@pytest.fixture
def folder(tmp_path):
    state, name = Model().state_dict(), "model-00001-of-00001.safetensors"
    path = tmp_path / "in"
    path.mkdir()
    safetensors.torch.save_file(state, path / name)
    index = {"metadata": {}, "weight_map": dict.fromkeys(state, name)}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path


def run(*args):
    return main([str(a) for a in args])


def fails(capsys, *args):
    """Run a command that must fail, and return its one line."""
    try:
        status = run(*args)
    except SystemExit as done:
        status = done.code
    captured = capsys.readouterr()
    assert status == 2
    assert captured.err.startswith("structmat: error: ")
    assert captured.err.count("\n") == 1
    assert "Traceback" not in captured.err
    return captured.err


def no_leftovers(folder):
    return not [p for p in Path(folder).rglob("*") if ".tmp" in p.name]


def test_patterns(file, tmp_path):
    out = tmp_path / "out.safetensors"
    args = ["--rank", "2", "--include", "layers.*", "--include", "lm_head.weight", "--exclude", "layers.1*"]
    assert run("compress", file, out, *args) == 0
    model = Model(1)
    surgery.load_file(model, out)
    found = [name for name, m in model.named_modules() if isinstance(m, structmat.nn.MonarchLinear)]
    assert found == [*(f"layers.{i}" for i in (0, 2, 3, 4, 5, 6, 7, 8, 9)), "lm_head"]


def test_dry_run_writes_nothing(file, tmp_path, capsys):
    assert run("compress", file, "--ratio", "0.5", "--dry-run", "--plot", tmp_path / "r.png") == 0
    assert "dry run: nothing was changed" in capsys.readouterr().out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.safetensors", "r.png"]


def test_inspect(file, tmp_path, capsys):
    out = tmp_path / "out.safetensors"
    run("compress", file, out, "--rank", "2", "--include", "up", "--include", "layers.10")
    capsys.readouterr()
    assert run("inspect", out) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["layer", "structure", "dtype", "shape", "params", "of", "dense"]
    assert [line.split()[0] for line in lines[1:13]] == [*(f"layers.{i}" for i in range(11)), "lm_head"]
    assert lines[11].split() == ["layers.10", "monarch", "4x4", "rank", "2", "F32", "24x24", "384", "66.7%"]
    assert lines[-1].startswith("2 structured layers")
    assert run("inspect", out, "--json") == 0
    data = json.loads(capsys.readouterr().out)
    up = next(layer for layer in data["layers"] if layer["name"] == "up")
    assert up == {
        "name": "up",
        "structure": "monarch 4x4 rank 2",
        "shape": [36, 24],
        "params": 480,
        "dtype": "F32",
        "share": 480 / 864,
    }
    state = Model().state_dict()
    dense = sum(t.numel() for t in state.values())
    assert (data["dense_params"], data["params"]) == (dense, dense - 864 + 480 - 576 + 384)


def test_bad_inputs(file, folder, tmp_path, capsys):
    out = tmp_path / "out.safetensors"
    assert "none.safetensors: No such file or directory" in fails(
        capsys, "compress", tmp_path / "none.safetensors", out
    )
    (tmp_path / "text").write_text("this is not what you are looking for")
    assert "is not a safetensors file" in fails(capsys, "compress", tmp_path / "text", out)
    (tmp_path / "cut.safetensors").write_bytes(file.read_bytes()[:-5])
    assert "cut.safetensors is cut short" in fails(capsys, "inspect", tmp_path / "cut.safetensors")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "holds neither" in fails(capsys, "compress", empty, tmp_path / "o")
    for name in ("a", "b"):
        safetensors.torch.save_file({"x": torch.ones(2)}, empty / f"{name}.safetensors")
    assert "holds a.safetensors, b.safetensors: name one" in fails(capsys, "inspect", empty)
    assert "nothing to compress: of its 1 tensors, 0" in fails(capsys, "compress", empty / "a.safetensors", out)
    index = folder / "model.safetensors.index.json"
    for text, why in (("{", "is not the index"), ('{"weight_map": {"x": "../y"}}', "not a plain file name")):
        index.write_text(text)
        assert why in fails(capsys, "inspect", folder)
    index.write_text(json.dumps({"weight_map": {"gone": "model-00001-of-00001.safetensors"}}))
    assert "holds gone, which it does not" in fails(capsys, "inspect", folder)
    os.unlink(folder / "model-00001-of-00001.safetensors")
    assert "names the shard model-00001-of-00001.safetensors, which is not there" in fails(capsys, "inspect", folder)
    assert not out.exists()


@pytest.mark.parametrize(
    ("args", "why"),
    [
        (["--structure", "butterflies"], "invalid choice: 'butterflies'"),
        (["--ratio", "1.5"], r"ratio must be a number in (0, 1]"),
        (["--ratio", "0.5", "--rank", "3"], "not allowed with"),
        (["--nblocks", "four"], "'four' is neither a number N nor two numbers K,L"),
        (["--structure", "lowrank"], "give exactly one of rank, max_params and ratio"),
        (["--structure", "lowrank", "--rank", "3", "--nblocks", "4"], "got nblocks"),
        (
            ["--rank", "30"],
            "12 of 12 layers cannot take their config; nothing was changed. Exclude them with --exclude",
        ),
        (["--include", "typo.*"], "--include 'typo.*' matches no two-dimensional"),
        (["--exclude", "norm"], "--exclude 'norm' matches no two-dimensional"),
        (["--conv1d", "c_attn"], "--conv1d 'c_attn' matches no two-dimensional"),
        (["--exclude", "*"], "nothing to compress"),
        (["--plot", "r.txt"], "r.txt: a plot's suffix must be one of"),
        (["--report", "no/such/r.json"], "no/such: No such file or directory"),
    ],
)
def test_bad_options(file, tmp_path, capsys, args, why):
    assert why in fails(capsys, "compress", file, tmp_path / "out.safetensors", *args)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.safetensors"]


def test_budgets_that_cannot_be_met_are_all_named(tmp_path, capsys):
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 3), nn.Linear(64, 64), nn.Linear(64, 2))
    safetensors.torch.save_file(model.state_dict(), tmp_path / "in.safetensors")
    line = fails(capsys, "compress", tmp_path / "in.safetensors", tmp_path / "out", "--ratio", "0.2")
    assert "2 of 4 layers" in line
    assert "1: nblocks" in line
    assert "3: nblocks" in line
    assert "--exclude" in line
    assert run("compress", tmp_path / "in.safetensors", tmp_path / "out", "--ratio", "0.2", "--exclude", "[13]") == 0


def test_bad_outputs(file, folder, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    assert "exists; give --force" in fails(capsys, "compress", file, tmp_path / "file", "--rank", "2")
    assert "is a folder" in fails(capsys, "compress", file, folder, "--rank", "2", "--force")
    assert "is a file" in fails(capsys, "compress", folder, tmp_path / "file", "--rank", "2", "--force")
    assert "no: No such file" in fails(capsys, "compress", file, tmp_path / "no" / "out", "--rank", "2")
    assert "name OUT" in fails(capsys, "compress", file, "--rank", "2")
    assert (tmp_path / "file").read_text() == "mine"


def test_unwritable_folder(file, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    assert f"{tmp_path}: Permission denied" in fails(capsys, "compress", file, tmp_path / "out", "--rank", "2")


def test_weights_that_are_not_finite(tmp_path, capsys):
    model = Model()
    with torch.no_grad():
        model.up.weight[0, 0] = float("nan")
        model.layers[3].weight[0, 0] = float("inf")
    safetensors.torch.save_file(model.state_dict(), tmp_path / "in.safetensors")
    line = fails(capsys, "compress", tmp_path / "in.safetensors", tmp_path / "out", "--rank", "2")
    assert "NaN or infinite entries in layers.3.weight, up.weight; leave them alone with --exclude" in line


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device"), RuntimeError])
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_an_interrupted_run_leaves_the_old_output(request, tmp_path, capsys, monkeypatch, kind, error):
    source, out = request.getfixturevalue(kind), tmp_path / "out"
    assert run("compress", source, out, "--ratio", "0.5") == 0
    files = {p: p.read_bytes() for p in ([out] if kind == "file" else out.iterdir())}
    real, calls = structmat.project, []

    def project(*args):
        calls.append(args)
        if len(calls) == 4:
            raise error
        return real(*args)

    monkeypatch.setattr("structmat.surgery.files.project", project)
    for target in (out, tmp_path / "new"):
        calls.clear()
        args = ("compress", source, target, "--ratio", "0.4", "--force")
        if error is KeyboardInterrupt:
            assert run(*args) == 130
            assert capsys.readouterr().err == "structmat: interrupted\n"
        elif error is RuntimeError:
            with pytest.raises(RuntimeError):  # a fault of ours keeps its traceback
                run(*args)
        else:
            assert fails(capsys, *args) == "structmat: error: No space left on device\n"
        assert len(calls) == 4
    assert {p: p.read_bytes() for p in files} == files
    assert not (tmp_path / "new").exists()
    assert no_leftovers(tmp_path)


def command(*args, **kwargs):
    return subprocess.run(
        [sys.executable, "-m", "structmat.cli", *map(str, args)],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        timeout=60,
        **kwargs,
    )


def test_the_module_runs(file, tmp_path):
    assert command("--version").stdout == f"structmat {structmat.__version__}\n"
    done = command("compress", file, tmp_path / "out.safetensors", "--ratio", "0.5")
    assert (done.returncode, done.stderr) == (0, "")  # no progress bar where there is no terminal
    assert "12 layers" in done.stdout
    done = command("inspect", tmp_path / "none")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"structmat: error: {tmp_path / 'none'}: No such file or directory\n"


def test_a_polite_kill_cleans_up(tmp_path):
    torch.manual_seed(0)
    weights = {f"{i}.weight": torch.randn(512, 512) for i in range(200)}
    safetensors.torch.save_file(weights, tmp_path / "in.safetensors")
    process = subprocess.Popen(
        [sys.executable, "-m", "structmat.cli", "compress", "in.safetensors", "out.safetensors"],
        cwd=tmp_path,
        env=ENVIRONMENT,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 50
    while no_leftovers(tmp_path) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not no_leftovers(tmp_path)  # it is at work
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=50)
    assert (process.returncode, errors) == (130, "structmat: interrupted\n")
    assert [p.name for p in tmp_path.iterdir()] == ["in.safetensors"]


def test_help_is_a_manual(capsys):
    for args, words in (
        (["--help"], ["surgery.load_file", "Exit status", "compress", "inspect", "densify"]),
        (["compress", "--help"], ["monarch", "lowrank", "blockdiagonal", "examples:", "--conv1d GLOB", "--force"]),
        (["inspect", "--help"], ["--json"]),
        (["densify", "--help"], ["the approximation, not the"]),
    ):
        with pytest.raises(SystemExit) as done:
            main(args)
        text = capsys.readouterr().out
        assert done.value.code == 0
        assert all(word in text for word in words)
        assert max(map(len, text.splitlines())) <= 81


@pytest.mark.parametrize("structure", ["butterfly", "blocksparse", "pixelfly"])
def test_every_structure_goes_there_and_back(structure, tmp_path, capsys):
    weight = torch.randn(96, 64, generator=torch.Generator().manual_seed(0))
    safetensors.torch.save_file({"a.weight": weight, "a.bias": torch.zeros(96)}, tmp_path / "in.safetensors")
    small, dense = tmp_path / "small.safetensors", tmp_path / "dense.safetensors"
    main(["compress", str(tmp_path / "in.safetensors"), str(small), "--structure", structure, "--ratio", "0.6"])
    main(["inspect", str(small)])
    assert structure in capsys.readouterr().out
    main(["densify", str(small), str(dense)])
    back = safetensors.torch.load_file(dense)
    error = torch.linalg.vector_norm(back["a.weight"] - weight) / torch.linalg.vector_norm(weight)
    assert 0.1 < error < 1 and torch.equal(back["a.bias"], torch.zeros(96))
