"""The example of associative recall: a short run, and that copying is learned."""

import csv
import importlib.util
from pathlib import Path

import pytest

pytest.importorskip("transformers")
SCRIPT = Path(__file__).resolve().parents[1] / "examples" / "associative_recall.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("associative_recall", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_all_models_and_tasks_are_run(example, tmp_path):
    rows = example.main(["--steps", "3", "--batch", "4", "--vocabulary", "40", "--out", str(tmp_path)])
    assert {(r["task"], r["model"]) for r in rows} == {
        (t, m) for t in ("copying", "recall") for m in ("attention", "M2")
    }
    with (tmp_path / "recall.csv").open(encoding="utf-8") as file:
        assert [float(r["accuracy"]) for r in csv.DictReader(file)] == [r["accuracy"] for r in rows]


def test_a_long_convolution_learns_to_copy(example):
    (row,) = example.main(
        ["--tasks", "copying", "--models", "M2", "--steps", "150", "--vocabulary", "12", "--batch", "16"]
    )
    assert row["accuracy"] > 0.5  # guessing is right once in eleven
