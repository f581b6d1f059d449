"""Checkpoints rewritten by the command: the result is what the model itself would have saved."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

import structmat
from structmat import surgery
from structmat.cli import main
from structmat.surgery.stream import TensorFile


class Model(nn.Module):
    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.word_embeddings = nn.Embedding(40, 24)
        self.layers = nn.ModuleList([nn.Linear(24, 24) for _ in range(11)])
        self.up = nn.Linear(24, 36, bias=False)
        self.norm = nn.LayerNorm(36)
        self.lm_head = nn.Linear(36, 40)
        self.register_buffer("steps", torch.arange(3))

    def forward(self, tokens):
        x = self.word_embeddings(tokens)
        for layer in self.layers:
            x = layer(x).tanh()
        return self.lm_head(self.norm(self.up(x)))


SHARDS = {
    "model-00001-of-00002.safetensors": ("word_embeddings.", "layers.0", "layers.1.", "up."),
    "model-00002-of-00002.safetensors": ("layers.", "norm.", "lm_head.", "steps"),
}


@pytest.fixture
def file(tmp_path):
    safetensors.torch.save_file(Model().state_dict(), tmp_path / "in.safetensors", {"format": "pt", "mine": "yes"})
    return tmp_path / "in.safetensors"


@pytest.fixture
def folder(tmp_path):
    state, weight_map = Model().state_dict(), {}
    path = tmp_path / "in"
    path.mkdir()
    for shard, prefixes in SHARDS.items():
        part = {k: v for k, v in state.items() if k.startswith(prefixes) and k not in weight_map}
        safetensors.torch.save_file(part, path / shard, {"format": "pt"})
        weight_map |= dict.fromkeys(part, shard)
    index = {"metadata": {"total_size": 1, "total_parameters": 1, "x": 2}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    (path / "config.json").write_text('{"model_type": "mine"}')
    (path / "pytorch_model.bin").write_bytes(b"old weights")
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


def reference(config, filter_fn=lambda name, module: name != "lm_head"):
    model = Model()
    report = surgery.compress_(model, config, filter_fn)
    return model, report


def assert_equal_states(a, b):
    assert list(a.state_dict()) == list(b.state_dict())
    for key, value in a.state_dict().items():
        assert torch.equal(b.state_dict()[key], value), key


@pytest.mark.parametrize(
    ("args", "config"),
    [
        (["--ratio", "0.5"], structmat.MonarchConfig(nblocks=4, ratio=0.5)),
        (["--nblocks", "3,2", "--rank", "2"], structmat.MonarchConfig(nblocks=(3, 2), rank=2)),
        (["--structure", "lowrank", "--max-params", "200"], structmat.LowRankConfig(max_params=200)),
        (["--structure", "blockdiagonal"], structmat.BlockDiagonalConfig(nblocks=4)),
    ],
)
def test_compress_is_what_the_model_would_have_saved(file, tmp_path, capsys, args, config):
    out = tmp_path / "out.safetensors"
    assert run("compress", file, out, *args, "--report", tmp_path / "r.json") == 0
    expected, report = reference(config)
    model = Model(1)
    assert surgery.load_file(model, out) == ([], [])
    assert_equal_states(expected, model)
    tokens = torch.arange(10)
    assert torch.equal(model(tokens), expected(tokens))
    surgery.save_file(expected, tmp_path / "saved.safetensors")
    ours, theirs = TensorFile(out), TensorFile(tmp_path / "saved.safetensors")
    assert set(ours.entries) == set(theirs.entries)
    assert json.loads(ours.metadata["structmat"]) == json.loads(theirs.metadata["structmat"])
    assert (ours.metadata["format"], ours.metadata["mine"]) == ("pt", "yes")
    told = surgery.Report.from_json((tmp_path / "r.json").read_text())
    assert [row.name for row in told.compressed] == [*(f"layers.{i}" for i in range(11)), "up"]
    errors = {row.name: row.error for row in report.compressed}
    assert {row.name: row.error for row in told.compressed} == errors
    assert {row.name: row.skipped for row in told.skipped} == dict.fromkeys(
        ["lm_head", "word_embeddings"],
        "its name is that of an embedding or output head (--include overrides)",
    )
    assert capsys.readouterr().out == f"{told}\n"
    assert no_leftovers(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes_are_kept(tmp_path, dtype):
    model = nn.Sequential(nn.Linear(13, 17), nn.Linear(17, 8)).to(dtype)
    safetensors.torch.save_file(model.state_dict(), tmp_path / "in.safetensors")
    assert run("compress", tmp_path / "in.safetensors", tmp_path / "out.safetensors", "--nblocks", "2") == 0
    assert {e.dtype for e in TensorFile(tmp_path / "out.safetensors").entries.values()} == {
        {torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64"}[dtype]
    }
    assert "format" not in TensorFile(tmp_path / "out.safetensors").metadata
    loaded = nn.Sequential(nn.Linear(13, 17), nn.Linear(17, 8)).to(dtype)
    surgery.load_file(loaded, tmp_path / "out.safetensors")
    surgery.compress_(model, structmat.MonarchConfig(nblocks=2))
    assert_equal_states(model, loaded)


def test_conv1d(tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, n_positions=16, vocab_size=50)
    model = transformers.GPT2Model(config)
    original = tmp_path / "gpt2.safetensors"
    safetensors.torch.save_model(model, str(original))
    out = tmp_path / "out.safetensors"
    assert run("compress", original, out, "--conv1d", "*.c_*", "--ratio", "0.5") == 0
    assert "h.0.attn.c_attn  96x32" in capsys.readouterr().out
    loaded = transformers.GPT2Model(config)
    surgery.load_file(loaded, out)
    surgery.compress_(model, structmat.MonarchConfig(nblocks=4, ratio=0.5))
    assert_equal_states(model, loaded)
    # Dense again: in the layout of the original, so that the original architecture takes it.
    assert run("densify", out, tmp_path / "dense.safetensors") == 0
    dense = transformers.GPT2Model(config)
    safetensors.torch.load_model(dense, tmp_path / "dense.safetensors")
    weight = model.h[0].attn.c_attn.weight().to(torch.float64).to_dense().to(torch.float32)
    assert torch.equal(dense.h[0].attn.c_attn.weight, weight.mT)
    # Without the option the square weight would be that of another layer: the model refuses it.
    assert run("compress", original, out, "--ratio", "0.5", "--include", "*.attn.c_proj", "--force") == 0
    with pytest.raises(ValueError, match=r"read as \(out, in\).*the model's layer is a Conv1D"):
        surgery.load_file(transformers.GPT2Model(config), out)


def test_shards(folder, tmp_path, capsys):
    out = tmp_path / "out"
    assert run("compress", folder, out, "--ratio", "0.5") == 0
    assert sorted(p.name for p in out.iterdir()) == ["config.json", *SHARDS, "model.safetensors.index.json"]
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = {name: TensorFile(out / name) for name in SHARDS}
    assert index["weight_map"] == {k: name for name, file in files.items() for k in sorted(file.entries)}
    sizes = [e for file in files.values() for e in file.entries.values()]
    assert index["metadata"] == {
        "total_size": sum(e.nbytes for e in sizes),
        "total_parameters": sum(e.numel for e in sizes),
        "x": 2,
    }
    expected, _ = reference(structmat.MonarchConfig(nblocks=4, ratio=0.5))
    for source in (out, out / "model.safetensors.index.json"):
        model = Model(1)
        surgery.load_file(model, source)
        assert_equal_states(expected, model)
    capsys.readouterr()
    assert run("inspect", out) == 0
    assert "12 structured layers" in capsys.readouterr().out
    assert run("densify", out, tmp_path / "dense") == 0
    dense = Model(1)
    surgery.load_file(dense, tmp_path / "dense")
    surgery.densify_(expected)
    assert_equal_states(expected, dense)
    assert no_leftovers(tmp_path)


def test_force_replaces_a_folder_and_keeps_what_is_not_the_checkpoint(folder, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    assert run("compress", folder, out, "--ratio", "0.5") == 0  # an empty folder is nothing to protect
    (out / "notes.txt").write_text("mine")
    assert "exists; give --force" in fails(capsys, "compress", folder, out, "--ratio", "0.4")
    assert run("compress", folder / "model.safetensors.index.json", out, "--ratio", "0.4", "--force") == 0
    model = Model(1)
    surgery.load_file(model, out)
    assert_equal_states(reference(structmat.MonarchConfig(nblocks=4, ratio=0.4))[0], model)
    assert (out / "notes.txt").read_text() == "mine"
    single = tmp_path / "single"
    single.mkdir()
    safetensors.torch.save_file(Model().state_dict(), single / "model.safetensors")
    assert run("compress", single, out, "--ratio", "0.4", "--force") == 0
    assert sorted(p.name for p in out.iterdir()) == ["config.json", "model.safetensors", "notes.txt"]
    assert "holds model.safetensors, which the new" in fails(capsys, "compress", folder, out, "--force")
    assert no_leftovers(tmp_path)


def test_densify_of_a_module_that_stands_twice(tmp_path):
    def build(kind):
        shared = nn.Linear(8, 8) if kind == "dense" else structmat.nn.LowRankLinear(8, 8, rank=2)
        return nn.ModuleDict({"a": shared, "b": shared})

    model = build("structured")
    surgery.save_file(model, tmp_path / "in.safetensors")
    assert run("densify", tmp_path / "in.safetensors", tmp_path / "out.safetensors") == 0
    out = TensorFile(tmp_path / "out.safetensors")
    assert set(out.entries) == {"a.weight", "b.weight", "a.bias"}
    assert out.metadata == {"format": "pt", "b.bias": "a.bias"}
    dense = build("dense")
    surgery.load_file(dense, tmp_path / "out.safetensors")
    surgery.densify_(model)
    assert_equal_states(model, dense)


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_in_place(request, kind):
    path = request.getfixturevalue(kind)
    assert run("compress", path, path, "--ratio", "0.5", "--force") == 0
    model = Model(1)
    surgery.load_file(model, path)
    assert_equal_states(reference(structmat.MonarchConfig(nblocks=4, ratio=0.5))[0], model)
    assert no_leftovers(path.parent)


def test_compressing_in_two_steps(file, tmp_path):
    first, second = tmp_path / "1.safetensors", tmp_path / "2.safetensors"
    assert run("compress", file, first, "--rank", "2", "--include", "up") == 0
    assert run("compress", first, second, "--structure", "lowrank", "--rank", "2", "--include", "layers.*") == 0
    model = Model(1)
    surgery.load_file(model, second)
    assert type(model.up) is structmat.nn.MonarchLinear
    assert type(model.layers[0]) is structmat.nn.LowRankLinear


def test_tied_tensors_are_left_alone(tmp_path, capsys):
    model = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8), "c": nn.Linear(8, 8)})
    model["b"].weight = model["a"].weight
    safetensors.torch.save_model(model, str(tmp_path / "in.safetensors"))
    assert run("compress", tmp_path / "in.safetensors", tmp_path / "out.safetensors", "--include", "*") == 0
    assert "left alone, it is tied to b.weight: 1 (a)" in capsys.readouterr().out


def test_densify(file, tmp_path, capsys):
    out, dense = tmp_path / "out.safetensors", tmp_path / "dense.safetensors"
    assert "has no structured layer" in fails(capsys, "densify", file, dense)
    run("compress", file, out, "--ratio", "0.5")
    assert run("densify", out, dense) == 0
    assert set(TensorFile(dense).entries) == set(TensorFile(file).entries)
    assert TensorFile(dense).metadata == {"format": "pt", "mine": "yes"}
    expected, _ = reference(structmat.MonarchConfig(nblocks=4, ratio=0.5))
    surgery.densify_(expected)
    model = Model(1)
    model.load_state_dict(safetensors.torch.load_file(dense))
    assert_equal_states(expected, model)
    assert "exists; give --force" in fails(capsys, "densify", out, dense)
