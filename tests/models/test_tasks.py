"""Generated tasks: what they promise about their tokens, places and labels."""

import pytest
import torch

from structmat.models.tasks import IGNORED, associative_recall, copying, text_windows


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("length", "pairs", "vocab"), [(64, 8, 8192), (8, 2, 6), (4, 1, 4), (257, 20, 101)])
def test_recall_has_one_query_for_every_pair(length, pairs, vocab):
    tokens, labels = associative_recall(50, length, pairs=pairs, vocab_size=vocab, generator=seeded())
    assert tokens.shape == labels.shape == (50, length)
    for row, wanted in zip(tokens.tolist(), labels.tolist(), strict=True):
        known = dict(zip(row[: 2 * pairs : 2], row[1 : 2 * pairs : 2], strict=True))
        assert len(known) == len(set(known.values())) == pairs
        assert max(known) < vocab // 2 <= min(known.values())
        asked = [i for i, label in enumerate(wanted) if label != IGNORED]
        assert sorted(row[i] for i in asked) == sorted(known)
        assert all(wanted[i] == known[row[i]] and i >= 2 * pairs for i in asked)


def test_recall_depends_on_the_generator_only():
    first, again, other = (associative_recall(4, generator=seeded(s))[0] for s in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_a_small_power_asks_early():
    def mean_place(power):
        labels = associative_recall(400, 256, pairs=4, power=power, generator=seeded())[1]
        return (labels != IGNORED).nonzero()[:, 1].double().mean().item()

    assert mean_place(0.01) < 0.6 * mean_place(1.0)
    assert mean_place(1.0) == pytest.approx(8 + 247 / 2, rel=0.1)


@pytest.mark.parametrize("length", [2, 3, 8, 65])
def test_copying_says_the_token_that_follows(length):
    tokens, labels = copying(30, length, vocab_size=11, generator=seeded())
    half = length // 2
    assert tokens.shape == labels.shape == (30, length)
    assert (tokens[:, half] == 0).all() and (tokens[:, :half] != 0).all()
    assert (labels[:, :half] == IGNORED).all()
    assert torch.equal(labels[:, half : 2 * half], tokens[:, :half])
    asked = labels[:, :-1] != IGNORED
    assert torch.equal(labels[:, :-1][asked], tokens[:, 1:][asked])


def test_text_windows_are_pieces_of_the_text():
    text = torch.arange(300) % 251
    tokens, labels = text_windows(text.to(torch.uint8), 40, 17, generator=seeded())
    assert tokens.dtype == torch.long
    assert torch.equal(labels[:, :-1], tokens[:, 1:])
    assert torch.equal((tokens[:, 1:] - tokens[:, :-1]) % 251, torch.ones(40, 16, dtype=torch.long))
    assert text_windows(torch.arange(18), 3, 17, generator=seeded())[1].tolist() == [list(range(1, 18))] * 3


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: associative_recall(1, 31, pairs=8), ValueError, "length must be at least 4 pairs = 32, got 31"),
        (lambda: associative_recall(1, 64, pairs=8, vocab_size=17), ValueError, "at least .* 18, got 17"),
        (lambda: associative_recall(1, power=0.0), ValueError, "power must be above 0"),
        (lambda: associative_recall(1, pairs=0), ValueError, "pairs"),
        (lambda: copying(1, 1), ValueError, "length"),
        (lambda: copying(1, 8, vocab_size=2), ValueError, "vocab_size"),
        (lambda: text_windows(torch.arange(8), 1, 8), ValueError, "n > length = 8"),
        (lambda: text_windows(torch.ones(80), 1, 8), TypeError, "integer dtype"),
    ],
)
def test_bad_arguments_are_named(call, error, words):
    with pytest.raises(error, match=words):
        call()
