"""``structmat compress --model``: tiny models with random weights, saved with tokenizers that are made here."""

from __future__ import annotations

import json
import re

import pytest
import torch

import structmat
from structmat import surgery
from structmat.cli import main

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

WORDS = [f"w{i}" for i in range(40)]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def sentences(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(5, 12, (count,), generator=generator).tolist()
    return [" ".join(WORDS[i] for i in torch.randint(40, (k,), generator=generator).tolist()) for k in lengths]


def save_tokenizer(folder):
    vocabulary = {word: i for i, word in enumerate(SPECIAL + WORDS)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = dict(zip(["pad_token", "unk_token", "cls_token", "sep_token", "mask_token"], SPECIAL, strict=True))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="[SEP]", **names)
    tokenizer.save_pretrained(folder)


def save_model(folder, kind):
    torch.manual_seed(0)
    sizes = {"vocab_size": 45, "pad_token_id": 0}
    if kind == "gpt2":
        config = transformers.GPT2Config(
            n_embd=32, n_layer=2, n_head=2, n_positions=24, bos_token_id=2, eos_token_id=3, **sizes
        )
        model = transformers.GPT2LMHeadModel(config)
    else:
        config = transformers.BertConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            max_position_embeddings=24,
            **sizes,
        )
        model = transformers.BertModel(config) if kind == "bert" else transformers.BertForMaskedLM(config)
    model.save_pretrained(folder)
    save_tokenizer(folder)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for kind in ("gpt2", "bert", "mlm"):
        save_model(folder / kind, kind)
    (folder / "text.txt").write_text("\n".join(sentences(60)), encoding="utf-8")
    return folder


def run(*args):
    device = ["--device", "cpu"] if "--model" in args and "--device" not in args else []
    return main(["compress", *device, *map(str, args)])


def fails(capsys, *args):
    try:
        status = run(*args)
    except SystemExit as done:
        status = done.code
    error = capsys.readouterr().err
    assert status == 2
    assert error.startswith("structmat: error: ") and error.count("\n") == 1
    return error


def test_the_whole_job_on_a_language_model(sources, tmp_path, capsys):
    out = tmp_path / "out"
    args = ["--model", sources / "gpt2", "--calibrate", sources / "text.txt", "--ratio", "0.6"]
    args += ["--structures", "monarch,lowrank", "--heal-steps", "3", "--report", out, "--calibrate-tokens", "300"]
    assert run(*args) == 0
    printed = capsys.readouterr().out
    assert "perplexity on held-out text: dense" in printed and "healed" in printed
    names = {p.name for p in out.iterdir()}
    assert {"model", "report.md", "report.html", "report.json"} <= names
    files = {p.name for p in (out / "model").iterdir()}
    assert {"config.json", "model.safetensors", "plan.json", "tokenizer.json", "generation_config.json"} <= files
    assert not [p for p in tmp_path.rglob("*") if ".tmp" in p.name]

    model = surgery.load_pretrained(out / "model")
    plan = surgery.Allocation.load(out / "model" / "plan.json")
    found = {n for n, m in model.named_modules() if isinstance(m, structmat.nn.StructuredLinear)}
    assert found == {row.name for row in plan.report.compressed if row.name in plan}
    assert found and plan.params <= 0.6 * sum(row.params_before for row in plan.report.compressed)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert transformers.AutoTokenizer.from_pretrained(out / "model").eos_token == "[SEP]"

    text = (out / "report.md").read_text()
    page = (out / "report.html").read_text()
    for part in ("Quality", "Layers", "Calibration", "Plan", "Healing", "Speed"):
        assert f"## {part}" in text and f"<h2>{part}</h2>" in page
    assert set(re.findall(r"!\[\w+\]\((.*?)\)", text)) <= names
    assert not re.search(r'(?:src|href)="(?!data:)', page)  # it loads nothing
    rows = surgery.Report.from_json((out / "report.json").read_text()).compressed
    assert rows and all(row.calibrated_error is not None and row.name in text for row in rows)
    capsys.readouterr()

    again = tmp_path / "again"
    common = ["--model", sources / "gpt2", "--calibrate", sources / "text.txt", "--calibrate-tokens", "300"]
    assert run(*common, "--plan", out / "model" / "plan.json", again) == 0
    other = surgery.load_pretrained(again)
    assert {n for n, m in other.named_modules() if isinstance(m, structmat.nn.StructuredLinear)} == found


def test_the_quality_is_that_of_the_saved_model(sources, tmp_path, capsys):
    args = ["--model", sources / "gpt2", "--calibrate", sources / "text.txt", "--ratio", "0.5", "--length", "24"]
    assert run(*args, "--sensitivity", "fisher", "--calibrate-tokens", "200", tmp_path / "out") == 0
    told = re.search(r"perplexity on held-out text: dense (\S+), compressed (\S+)\n", capsys.readouterr().out)
    tokenizer = transformers.AutoTokenizer.from_pretrained(sources / "gpt2")
    ids = [i for text in sentences(60)[-6:] for i in [*tokenizer(text, add_special_tokens=False)["input_ids"], 3]]
    windows = [torch.tensor(ids[i : i + 24]) for i in range(0, len(ids), 24) if len(ids) - i > 1]
    for path, value in ((sources / "gpt2", told[1]), (tmp_path / "out", told[2])):
        model = surgery.load_pretrained(path)
        with torch.no_grad():
            losses = [
                torch.nn.functional.cross_entropy(model(w[None]).logits[0, :-1], w[1:], reduction="sum")
                for w in windows
            ]
        expected = torch.exp(sum(losses) / sum(len(w) - 1 for w in windows)).item()
        assert float(value.rstrip(",")) == pytest.approx(expected, rel=2e-3)


@pytest.mark.parametrize("kind", ["bert", "mlm"])
def test_encoders(sources, tmp_path, capsys, kind):
    args = ["--model", sources / kind, "--calibrate", sources / "text.txt", "--ratio", "0.7", "--exclude", "*.0.*"]
    assert run(*args, "--structures", "lowrank", "--calibrate-tokens", "200", "--compensate", tmp_path / "out") == 0
    printed = capsys.readouterr().out
    words = {"bert": "mean cosine to the dense model's mean outputs", "mlm": "perplexity of masked tokens"}
    assert words[kind] in printed
    model = surgery.load_pretrained(tmp_path / "out")
    assert type(model).__name__ == {"bert": "BertModel", "mlm": "BertForMaskedLM"}[kind]
    structured = [n for n, m in model.named_modules() if isinstance(m, structmat.nn.StructuredLinear)]
    assert structured and not any(".0." in name or "decoder" in name for name in structured)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float32"


def test_without_text(sources, tmp_path, capsys):
    args = ["--model", sources / "bert", "--ratio", "0.5", "--dtype", "bfloat16"]
    assert run(*args, "--dry-run") == 0
    assert capsys.readouterr().out.count("dry run: nothing was changed") == 2  # monarch and lowrank
    assert not list(tmp_path.iterdir())
    assert run(*args, tmp_path / "out") == 0
    assert surgery.load_pretrained(tmp_path / "out").dtype == torch.bfloat16
    assert "exists; give --force" in fails(capsys, *args, tmp_path / "out")
    (tmp_path / "out" / "mine.txt").write_text("mine")
    assert run(*args, tmp_path / "out", "--force") == 0
    assert (tmp_path / "out" / "mine.txt").read_text() == "mine"
    assert "compressed already" in fails(capsys, "--model", tmp_path / "out", "--ratio", "0.5", tmp_path / "twice")


@pytest.mark.parametrize(
    ("args", "why"),
    [
        (["--model", "bert"], "--model needs --ratio, or a --plan"),
        (["--model", "bert", "--ratio", "0.5"], "name OUT"),
        (["--model", "bert", "--ratio", "0.5", "OUT", "more"], "a second positional argument does not go with"),
        (["--model", "bert", "--ratio", "0.5", "OUT", "--rank", "3"], "not allowed with"),
        (["--model", "bert", "--rank", "3", "OUT"], "--rank does not go with --model"),
        (["--ratio", "0.5", "in", "OUT", "--heal-steps", "3"], "--heal-steps needs --model"),
        (["--ratio", "0.5"], "name IN"),
        (["--model", "none", "--ratio", "0.5", "OUT"], "config.json: No such file or directory"),
        (["--model", "bert", "--ratio", "0.5", "OUT", "--structures", "monarch,magic"], "unknown structure 'magic'"),
        (["--model", "bert", "--ratio", "0.5", "OUT", "--include", "typo*"], "matches no linear layer"),
        (["--model", "bert", "--ratio", "0.5", "OUT", "--heal-steps", "3"], "needs the text of --calibrate"),
        (["--model", "bert", "--ratio", "0.5", "OUT", "--calibrate", "none.txt"], "none.txt: No such file"),
        (["--model", "bert", "--ratio", "0.5", "OUT", "--calibrate", "one.txt"], "has 1 passages"),
        (["--model", "bert", "--ratio", "0.5", "OUT", "--calibrate", "latin.txt"], "not text in UTF-8"),
        (["--model", "bert", "--ratio", "0.5", "OUT", "--calibrate", "text.txt", "--length", "99"], "from 2 to the 24"),
        (
            ["--model", "bert", "--ratio", "0.5", "OUT", "--calibrate", "text.txt", "--sensitivity", "fisher"],
            "needs the loss of a language model",
        ),
        (["--model", "bert", "--plan", "text.txt", "OUT"], "text.txt is not a plan"),
        (["--model", "bert", "--plan", "plan.json", "--ratio", "0.5", "OUT"], "--ratio does not go with --plan"),
        (["--model", "bert", "--ratio", "0.001", "OUT"], "budget"),
        (["--model", "bert", "--ratio", "0.5", "no/such/OUT"], "no/such: No such file or directory"),
        (["--model", "bert", "--ratio", "0.5", "bert"], "the model's own folder"),
        (["--model", "bert", "--ratio", "0.5", "OUT", "--device", "abacus"], "--device abacus"),
        (["--model", "odd", "--ratio", "0.5", "OUT"], "transformers has no model class Mine"),
    ],
)
def test_bad_arguments(sources, tmp_path, capsys, monkeypatch, args, why):
    monkeypatch.chdir(tmp_path)
    for name in ("bert", "text.txt"):
        (tmp_path / name).symlink_to(sources / name)
    (tmp_path / "one.txt").write_text("one line only\n")
    (tmp_path / "latin.txt").write_bytes("né\nà".encode("latin-1"))
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "config.json").write_text('{"model_type": "bert", "architectures": ["Mine"]}')
    before = sorted(tmp_path.rglob("*"))
    assert why in fails(capsys, *args)
    assert sorted(tmp_path.rglob("*")) == before


def test_an_interruption_leaves_nothing(sources, tmp_path, capsys, monkeypatch):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("structmat.cli_model.write_pretrained", stop)
    args = ["--model", sources / "bert", "--ratio", "0.5", "--report", tmp_path / "out"]
    assert run(*args) == 130
    assert not list(tmp_path.iterdir())
    capsys.readouterr()
    monkeypatch.setattr("structmat.cli_model.import_transformers", _missing)
    assert "pip install transformers" in fails(capsys, *args)


def _missing():
    raise ImportError("this needs transformers: pip install transformers")
