"""Folders of compressed transformers models, and the times of models."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

import structmat
from structmat import surgery

transformers = pytest.importorskip("transformers")

SIZES = {"vocab_size": 50, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 16}


def gpt2():
    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=16, vocab_size=50)
    return transformers.GPT2LMHeadModel(config)


def bert():
    return transformers.BertModel(transformers.BertConfig(hidden_size=32, intermediate_size=64, **SIZES))


def llama():
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_key_value_heads": 1, "tie_word_embeddings": False}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, **sizes))


def outputs(model, tokens):
    with torch.no_grad():
        found = model(tokens)
    return found.logits if "logits" in found else found.last_hidden_state


@pytest.fixture
def tokens():
    return torch.randint(50, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("make", [gpt2, bert, llama])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_there_and_back(make, dtype, tmp_path, tokens):
    torch.manual_seed(0)
    model = make()
    model = type(model)._from_config(model.config, dtype=dtype).eval()  # some buffers stay in float32
    surgery.compress_(model, structmat.MonarchConfig(nblocks=4, ratio=0.5))
    surgery.save_pretrained(model, tmp_path / "out")
    state = torch.random.get_rng_state()
    back = surgery.load_pretrained(tmp_path / "out")
    assert torch.equal(torch.random.get_rng_state(), state)
    assert type(back) is type(model) and back.dtype == dtype and not back.training
    assert torch.equal(outputs(back, tokens), outputs(model, tokens))
    for (name, a), (other, b) in zip(model.named_buffers(), back.named_buffers(), strict=True):
        assert name == other and torch.equal(a, b)
    assert {n for n, m in back.named_modules() if isinstance(m, structmat.nn.StructuredLinear)}
    other = surgery.load_pretrained(tmp_path / "out", dtype=torch.float64)
    assert other.dtype == torch.float64
    error = torch.linalg.vector_norm(outputs(other, tokens) - outputs(model, tokens).double())
    assert error < (1e-5 if dtype == torch.float32 else 5e-2) * torch.linalg.vector_norm(outputs(other, tokens))


def test_ties_hold_and_transformers_folders_load(tmp_path, tokens):
    model = gpt2().eval()
    model.save_pretrained(tmp_path / "theirs")
    for path in (tmp_path / "theirs", tmp_path / "ours"):
        if path.name == "ours":
            surgery.save_pretrained(model, path)
        back = surgery.load_pretrained(path)
        assert back.lm_head.weight is back.transformer.wte.weight
        assert torch.equal(outputs(back, tokens), outputs(model, tokens))
    assert back.generation_config.eos_token_id == model.generation_config.eos_token_id


def test_an_existing_folder_keeps_other_files_and_is_whole(tmp_path, monkeypatch, tokens):
    model = bert().eval()
    surgery.save_pretrained(model, tmp_path)
    (tmp_path / "mine.txt").write_text("mine")
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("structmat.surgery.pretrained.save_file", full)
    with pytest.raises(OSError, match="No space"):
        surgery.save_pretrained(bert(), tmp_path)
    with pytest.raises(OSError, match="No space"):
        surgery.save_pretrained(bert(), tmp_path / "new")
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    monkeypatch.undo()
    surgery.compress_(model, structmat.LowRankConfig(ratio=0.5))
    surgery.save_pretrained(model, tmp_path)
    assert torch.equal(outputs(surgery.load_pretrained(tmp_path), tokens), outputs(model, tokens))
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(before)


def test_errors(tmp_path):
    with pytest.raises(TypeError, match="must be a transformers model, got Linear"):
        surgery.save_pretrained(nn.Linear(2, 2), tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        surgery.save_pretrained(bert(), tmp_path / "file")
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        surgery.load_pretrained(tmp_path / "none")
    surgery.save_pretrained(bert(), tmp_path / "bert")
    config = json.loads((tmp_path / "bert" / "config.json").read_text())
    for names, why in ((["A", "B"], "must name one class"), (["Mine"], "has no model class Mine")):
        (tmp_path / "bert" / "config.json").write_text(json.dumps({**config, "architectures": names}))
        with pytest.raises(ValueError, match=why):
            surgery.load_pretrained(tmp_path / "bert")
    (tmp_path / "bert" / "config.json").write_text(json.dumps({**config, "hidden_size": 64}))
    with pytest.raises(ValueError, match="does not fit the model"):
        surgery.load_pretrained(tmp_path / "bert")
    (tmp_path / "bert" / "config.json").write_text("{")
    with pytest.raises(ValueError):
        surgery.load_pretrained(tmp_path / "bert")


# ---------------------------------------------------------------- times
def test_latency_of_models(tokens):
    dense = bert().train()
    small = copy.deepcopy(dense)
    surgery.compress_(small, structmat.LowRankConfig(rank=2))
    for batch in (tokens, {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}, (tokens,)):
        speeds = surgery.measure_latency(small, dense, batch, sizes=(1, 4), min_run_time=1e-3)
        assert [row.name for row in speeds] == ["batch 1", "batch 4"]
        assert all(row.compressed > 0 and row.speedup == row.dense / row.compressed for row in speeds)
    assert small.training and small.encoder.layer[0].training
    assert str(speeds).splitlines()[0].split() == ["compressed", "dense", "speedup"]
    with pytest.raises(ValueError, match="meta device"):
        surgery.measure_latency(small, copy.deepcopy(dense).to("meta"), tokens)
    with pytest.raises(ValueError, match="sizes"):
        surgery.measure_latency(small, dense, tokens, sizes=(0,))


def test_slower_layers_can_be_made_dense(monkeypatch):
    layers = [structmat.nn.MonarchLinear(64, 64), structmat.nn.LowRankLinear(64, 64, rank=4), nn.Linear(64, 64)]
    model = nn.Sequential(*layers, structmat.nn.MonarchLinear(64, 64))
    measured = []

    def seconds(weight, rows, min_run_time):
        measured.append(weight)
        kind = type(weight).__name__
        return {"Monarch": 2.0, "LowRank": 0.5, "Tensor": 1.0}[kind]

    monkeypatch.setattr("structmat.surgery.latency.measure_seconds", seconds)
    slower = surgery.slower_layers(model)
    assert [(row.name, row.speedup) for row in slower] == [("0", 0.5), ("3", 0.5)]
    assert len(measured) == 3  # each kind once
    names = {row.name for row in slower}
    surgery.densify_(model, lambda name, _: name in names)
    assert [type(m).__name__ for m in model] == ["Linear", "LowRankLinear", "Linear", "Linear"]
    assert not surgery.slower_layers(model)
