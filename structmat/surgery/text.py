"""Text for a transformers model: passages of a file, batches of tokens, and what of its quality a text shows."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from structmat.surgery.batches import device_of, to_device

Batch = dict[str, Tensor]
_HIDDEN_SHARE = 0.15  # of the tokens that a masked language model is to find, as in BERT's training


def read_passages(path: str | os.PathLike[str]) -> list[str]:
    """The passages of a text file: its paragraphs if it has blank lines, else its lines.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if it is not UTF-8, or has fewer than two passages.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8: {error}") from error
    parts = re.split(r"\n\s*\n", text.strip())
    passages = [part.strip() for part in (parts if len(parts) > 1 else text.splitlines()) if part.strip()]
    if len(passages) < 2:
        raise ValueError(
            f"{path} has {len(passages)} passages, and two are needed, as the last tenth is not calibrated on: "
            "separate them by blank lines, or put each on a line"
        )
    return passages


def hold_out(passages: Sequence[str]) -> tuple[list[str], list[str]]:
    """The passages without the last tenth, and these."""
    held = max(1, len(passages) // 10)
    return list(passages[:-held]), list(passages[-held:])


class TextFeed:
    """Texts as batches for one model.

    Args:
        model: a transformers model that is given ``input_ids``.
        tokenizer: its tokenizer.
        length: tokens in a sequence, at most; None for the model's length, or 512 where that is longer.
        batch_size: sequences in a batch.
        seed: of the places that a masked language model is to fill.

    Attributes:
        kind: "causal", "masked" or "encoder".
        length: tokens in a sequence, at most.

    Raises:
        ValueError: if the model has a decoder of its own, the tokenizer no mask token where one is needed, or the
            length is not in 2 to what the model takes.
    """

    def __init__(
        self, model: nn.Module, tokenizer: Any, length: int | None = None, batch_size: int = 8, seed: int = 0
    ) -> None:
        config: Any = model.config
        name = type(model).__name__
        if getattr(config, "is_encoder_decoder", False):
            raise ValueError(f"{name} has an encoder and a decoder: calibrate it in Python, by structmat.surgery")
        causal, masked = name.endswith(("ForCausalLM", "LMHeadModel")), name.endswith("ForMaskedLM")
        self.kind = "causal" if causal else "masked" if masked else "encoder"
        known = [getattr(config, key, None) for key in ("max_position_embeddings", "n_positions")]
        most = min(v for v in (*known, getattr(tokenizer, "model_max_length", None), 1 << 30) if v)
        self.length = min(most, 512) if length is None else length
        if not 2 <= self.length <= most:
            raise ValueError(f"the length must be from 2 to the {most} tokens that {name} takes, got {self.length}")
        if masked and tokenizer.mask_token_id is None:
            raise ValueError(f"{name} is to fill in masked tokens, but its tokenizer has no mask token")
        self._tokenizer, self._batch_size, self._seed = tokenizer, batch_size, seed

    def sequences(self, passages: Sequence[str], tokens: int) -> list[list[int]]:
        """Token numbers in sequences of at most ``length``, ``tokens`` in all, or fewer if the text ends.

        A causal model gets the passages one after the other, an end-of-sequence token between, cut into full windows;
        any other one a sequence for each passage, truncated.
        """
        made: list[list[int]] = []
        stream: list[int] = []
        left = tokens
        for passage in passages:
            if left <= 0:
                break
            if self.kind == "causal":
                end = self._tokenizer.eos_token_id
                stream += self._tokenizer(passage, add_special_tokens=False, verbose=False)["input_ids"]
                stream += [] if end is None else [end]
                while len(stream) >= self.length and left > 0:
                    made.append(stream[: min(self.length, left)])
                    stream, left = stream[self.length :], left - len(made[-1])
            else:
                row = self._tokenizer(passage, truncation=True, max_length=self.length)["input_ids"]
                made.append(row[: max(left, 2)])
                left -= len(made[-1])
        made += [stream[:left]] if left > 0 and stream else []
        return [row for row in made if len(row) > 1]

    def batches(self, sequences: Sequence[list[int]], labels: bool = False) -> list[Batch]:
        """Sequences of like length in a batch, padded at the end, with an attention mask.

        Args:
            sequences: token numbers.
            labels: whether batches have labels, from which language models compute a loss.

        Raises:
            ValueError: if there are no sequences.
        """
        if not sequences:
            raise ValueError("the text has no passage of two tokens or more")
        generator = torch.Generator().manual_seed(self._seed)
        ordered = sorted(sequences, key=len)
        found = []
        for start in range(0, len(ordered), self._batch_size):
            rows = ordered[start : start + self._batch_size]
            ids = torch.full((len(rows), len(rows[-1])), self._tokenizer.pad_token_id or 0)
            mask = torch.zeros_like(ids)
            for i, row in enumerate(rows):
                ids[i, : len(row)] = torch.tensor(row)
                mask[i, : len(row)] = 1
            wanted = mask != 0
            batch = {"input_ids": ids, "attention_mask": mask}
            if self.kind == "masked":
                wanted = wanted & (torch.rand(ids.shape, generator=generator) < _HIDDEN_SHARE)
                batch["input_ids"] = ids.masked_fill(wanted, self._tokenizer.mask_token_id)
            if labels and self.kind != "encoder":
                batch["labels"] = ids.masked_fill(~wanted, -100)
            found.append(batch)
        return found


_MEASURES = {
    "causal": "perplexity",
    "masked": "perplexity of masked tokens",
    "encoder": "mean cosine to the dense model's mean outputs",
}


class Held:
    """The quality of models on text that nothing was fitted to.

    Args:
        feed: of the model.
        dense: the model to compare with.
        sequences: of the held-out text.

    Attributes:
        name: what is measured.
        tokens: of the text.
        dense: the quality of the dense model.
    """

    def __init__(self, feed: TextFeed, dense: nn.Module, sequences: Sequence[list[int]]) -> None:
        self._feed, self._batches = feed, feed.batches(sequences, labels=True)
        self._reference = self._embed(dense) if feed.kind == "encoder" else None
        self.name = _MEASURES[feed.kind]
        self.tokens = sum(map(len, sequences))
        self.dense = self(dense)

    @torch.no_grad()
    def __call__(self, model: nn.Module) -> float:
        """The quality of a model in evaluation mode."""
        if self._reference is not None:
            return F.cosine_similarity(self._embed(model), self._reference, dim=-1).mean().item()
        total, count = 0.0, 0
        for batch in self._batches:
            given = to_device({k: v for k, v in batch.items() if k != "labels"}, device_of(model))
            logits, labels = model(**given).logits, batch["labels"]
            if self._feed.kind == "causal":
                logits, labels = logits[:, :-1], labels[:, 1:]
            chosen = labels.to(logits.device) != -100
            picked = logits[chosen].float()
            total += F.cross_entropy(picked, labels.to(logits.device)[chosen], reduction="sum").item()
            count += len(picked)
        return math.exp(min(total / count, 700.0)) if count else math.nan

    @torch.no_grad()
    def _embed(self, model: nn.Module) -> Tensor:
        rows = []
        for batch in self._batches:
            outputs: Any = model(**to_device(batch, device_of(model)))
            states = getattr(outputs, "last_hidden_state", None)
            if states is None:
                states = outputs.logits
            if states.ndim > 2:
                mask = batch["attention_mask"].to(states.device).unsqueeze(-1)
                states = (states.float() * mask).sum(1) / mask.sum(1)
            rows.append(states.double().cpu())
        return torch.cat(rows)
