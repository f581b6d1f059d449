"""Generated tasks that tell sequence models apart: associative recall, copying, and windows of a text."""

from __future__ import annotations

import torch
from torch import Tensor

from structmat._checks import check_int, check_tensor

#: The label of a position that is not asked about: what ``torch.nn.functional.cross_entropy`` leaves out.
IGNORED = -100


def associative_recall(
    count: int,
    length: int = 64,
    *,
    pairs: int = 8,
    vocab_size: int = 8192,
    power: float = 0.01,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor]:
    """Multi-query associative recall (MQAR): every key comes again, and the model has to say its value.

    A sequence begins with ``pairs`` different keys, each followed by its value: ``k1 v1 k2 v2 ...``. Then each key
    comes once more, at a place drawn with probability proportional to (d + 1)^(power - 1), d being the distance from
    the pairs; random tokens fill the rest. Keys are tokens of the lower half of the vocabulary, values of the upper
    half, and no value is there twice. Guessing one of the values at hand is right with probability 1 / pairs.

    Args:
        count: how many sequences.
        length: of each, at least 4 pairs.
        pairs: of keys and values.
        vocab_size: number of tokens, at least 2 (pairs + 1).
        power: of the places of the queries; 1 makes all places equally likely, small values the early ones.
        generator: for the draws, on the device.
        device: where the sequences are made; the generator's, or the CPU.

    Returns:
        tokens and labels, integers of shape (count, length). A label is the value where the token is a query, -100
        elsewhere: compare it with the model's output at the same position.

    Raises:
        ValueError: if the queries do not fit behind the pairs, or the vocabulary is too small.

    Source: Arora et al. 2023, "Zoology: measuring and improving recall in efficient language models".

    Example:
        >>> import torch
        >>> from structmat.models.tasks import associative_recall
        >>> tokens, labels = associative_recall(5, 64, pairs=8, generator=torch.Generator().manual_seed(0))
        >>> tokens.shape, (labels != -100).sum(1).tolist()
        (torch.Size([5, 64]), [8, 8, 8, 8, 8])
    """
    check_int("count", count, 0)
    if check_int("length", length) < 4 * check_int("pairs", pairs):
        raise ValueError(f"length must be at least 4 pairs = {4 * pairs}, got {length}")
    half = check_int("vocab_size", vocab_size) // 2
    if half <= pairs:
        raise ValueError(f"vocab_size must be at least 2 (pairs + 1) = {2 * pairs + 2}, got {vocab_size}")
    if not power > 0:
        raise ValueError(f"power must be above 0, got {power}")
    device = generator.device if device is None and generator is not None else device
    options = {"generator": generator, "device": device}
    keys = 1 + _different(count, half - 1, pairs, None, **options)
    values = half + _different(count, vocab_size - half, pairs, None, **options)
    # Queries stand at every other position at most, so that a model cannot tell them by what follows.
    places = (length - 2 * pairs) // 2
    weights = torch.arange(1, places + 1, dtype=torch.float32, device=device) ** (power - 1)
    asked = 2 * pairs + 2 * _different(count, places, pairs, weights, **options)
    tokens = torch.randint(vocab_size, (count, length), **options)
    labels = torch.full_like(tokens, IGNORED)
    tokens[:, : 2 * pairs] = torch.stack([keys, values], -1).flatten(1)
    return tokens.scatter(1, asked, keys), labels.scatter(1, asked, values)


def _different(
    count: int, size: int, some: int, weights: Tensor | None, *, generator: torch.Generator | None, device: object
) -> Tensor:
    """So many different numbers below ``size`` for each of count rows, in random order: (count, some)."""
    drawn = torch.rand((count, size), generator=generator, device=device)  # pyright: ignore[reportArgumentType,reportCallIssue]
    # The largest of uniform^(1 / weight) are a weighted sample without replacement (Efraimidis and Spirakis 2006).
    keys = drawn if weights is None else drawn.clamp_min(torch.finfo(drawn.dtype).tiny).log() / weights
    return keys.topk(some, -1).indices


def copying(
    count: int,
    length: int = 64,
    *,
    vocab_size: int = 256,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor]:
    """In-context copying: random tokens, a separator, and the same tokens once more, to be said one ahead.

    The sequence is ``a1 ... am 0 a1 ... a(m-1)`` with m = length // 2 tokens from 1 to vocab_size - 1 (for an odd
    length, am comes too), so from the separator on the next token is known to a model that looks back by m + 1.

    Args:
        count: how many sequences.
        length: of each, at least 2.
        vocab_size: number of tokens, at least 3; 0 is the separator.
        generator: for the draws, on the device.
        device: where the sequences are made; the generator's, or the CPU.

    Returns:
        tokens and labels, integers of shape (count, length): the next token from the separator on, -100 before it.

    Raises:
        ValueError: if length or vocab_size is too small.

    Example:
        >>> import torch
        >>> from structmat.models.tasks import copying
        >>> tokens, labels = copying(1, 7, vocab_size=9, generator=torch.Generator().manual_seed(0))
        >>> bool((tokens[0, 4:] == tokens[0, :3]).all()), labels[0, :3].tolist()
        (True, [-100, -100, -100])
    """
    check_int("count", count, 0)
    half = check_int("length", length, 2) // 2
    check_int("vocab_size", vocab_size, 3)
    device = generator.device if device is None and generator is not None else device
    first = torch.randint(1, vocab_size, (count, half), generator=generator, device=device)
    whole = torch.cat([first, first.new_zeros((count, 1)), first, first.new_zeros((count, 1))], 1)
    labels = whole[:, 1 : length + 1].clone()
    labels[:, :half] = IGNORED
    if length % 2:
        labels[:, -1] = IGNORED  # what follows the copy is not known
    return whole[:, :length], labels


def text_windows(
    text: Tensor, count: int, length: int = 512, *, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Windows of a text at random places, with the token that follows each: language modelling.

    Args:
        text: tokens of shape (n,), n > length: bytes, as ``torch.frombuffer(bytearray(data), dtype=torch.uint8)``, or
            what a tokenizer gives.
        count: how many windows.
        length: of each.
        generator: for the places, on the device of the text.

    Returns:
        tokens and labels, ``torch.long`` of shape (count, length); labels are the tokens one further.

    Raises:
        TypeError: if text is not a tensor of integers.
        ValueError: if the text has at most ``length`` tokens.

    Example:
        >>> import torch
        >>> from structmat.models.tasks import text_windows
        >>> tokens, labels = text_windows(torch.arange(100), 2, 8, generator=torch.Generator().manual_seed(0))
        >>> (labels - tokens).unique().tolist()
        [1]
    """
    check_tensor("text", text)
    if text.is_floating_point() or text.is_complex() or text.dtype == torch.bool:
        raise TypeError(f"text must have an integer dtype, got {text.dtype}")
    if text.ndim != 1 or len(text) <= check_int("length", length):
        raise ValueError(f"text must have shape (n,) with n > length = {length}, got {tuple(text.shape)}")
    starts = torch.randint(
        len(text) - length, (check_int("count", count, 0), 1), generator=generator, device=text.device
    )
    windows = text[starts + torch.arange(length + 1, device=text.device)].long()
    return windows[:, :-1], windows[:, 1:]
