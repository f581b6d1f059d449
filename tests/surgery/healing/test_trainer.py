"""healing_trainer: a Trainer of transformers that heals."""

from __future__ import annotations

import pytest
import torch

import structmat
from structmat import surgery

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate", reason="transformers' Trainer needs it")


def arguments(path, **options):
    options = {"learning_rate": 1e-2, "max_steps": 24, "per_device_train_batch_size": 3} | options
    return transformers.TrainingArguments(
        str(path), report_to="none", disable_tqdm=True, weight_decay=0.0, logging_steps=1, save_strategy="no", **options
    )


@pytest.fixture
def examples(language):
    def make(kind, config):
        compressed, dense, batches = language(kind, config)
        rows = [{key: value[i] for key, value in batch.items()} for batch in batches for i in range(3)]
        return compressed, dense, [row | {"labels": row["input_ids"]} for row in rows]

    return make


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_it_heals(examples, tmp_path, snapshot, config, kind, device):
    compressed, dense, rows = examples(kind, config)
    compressed.to(device)
    dense.train().to(device)
    before, original = snapshot(compressed), snapshot(dense)
    cls = surgery.healing_trainer(dense)
    assert issubclass(cls, transformers.Trainer)
    trainer = cls(compressed, arguments(tmp_path, use_cpu=device == "cpu"), train_dataset=rows, eval_dataset=rows)
    start = trainer.evaluate()["eval_loss"]
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 24 and trainer.evaluate()["eval_loss"] < 0.7 * start
    structured = {
        f"{name}.{key}"
        for name, m in compressed.named_modules()
        if isinstance(m, structmat.nn.StructuredLinear)
        for key, _ in m.named_parameters()
    }
    after = snapshot(compressed)
    changed = {name for name, t in after["state"].items() if not torch.equal(t, before["state"][name])}
    assert changed <= structured and len(changed) > 0.9 * len(structured)
    assert {n: flag for n, (flag, _) in after["flags"].items()} == {n: flag for n, (flag, _) in before["flags"].items()}
    now = snapshot(dense)
    assert all(torch.equal(t, original["state"][name]) for name, t in now["state"].items())
    assert now["modes"] == original["modes"] and all(p.grad is None for p in dense.parameters())


def test_its_loss_is_that_of_heal_and_accumulation_divides_it(examples, tmp_path):
    first = {}
    for name, size, accumulate in (("whole", 6, 1), ("parts", 3, 2)):
        compressed, dense, rows = examples("gpt2", structmat.LowRankConfig(ratio=0.5))
        options = {"max_steps": 1, "per_device_train_batch_size": size, "gradient_accumulation_steps": accumulate}
        given = arguments(tmp_path, use_cpu=True, train_sampling_strategy="sequential", **options)
        trainer = surgery.healing_trainer(dense, temperature=2.0)(compressed, given, train_dataset=rows[:6])
        trainer.train()
        first[name] = trainer.state.log_history[0]["loss"]
    compressed, dense, rows = examples("gpt2", structmat.LowRankConfig(ratio=0.5))
    halves = [{key: torch.stack([row[key] for row in rows[i : i + 3]]) for key in rows[0]} for i in (0, 3)]
    report = surgery.heal(compressed, dense, halves, 1, accumulate=2, temperature=2.0, progress=False)
    assert first["parts"] == pytest.approx(report.first, rel=1e-5)
    assert first["whole"] == pytest.approx(first["parts"], rel=0.1)


def test_predictions_hold_no_hidden_states(examples, tmp_path):
    compressed, dense, rows = examples("gpt2", structmat.LowRankConfig(ratio=0.5))
    trainer = surgery.healing_trainer(dense)(compressed, arguments(tmp_path, use_cpu=True))
    assert trainer.predict(rows).predictions.shape == (12, 9, 50)


def test_refusals(examples, tmp_path):
    compressed, dense, _ = examples("gpt2", structmat.LowRankConfig(ratio=0.5))
    with pytest.raises(ValueError, match="give dropout=True"):
        surgery.healing_trainer(dense)(compressed, arguments(tmp_path, use_cpu=True, gradient_checkpointing=True))
    with pytest.raises(ValueError, match="are one model"):
        surgery.healing_trainer(dense)(dense, arguments(tmp_path, use_cpu=True))
    with pytest.raises(ValueError, match="temperature"):
        surgery.healing_trainer(dense, temperature=0.0)
