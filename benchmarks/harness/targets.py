"""The targets that the kernels are held to, and what a result file says about each of them."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from harness.cases.linear import FOUR, SQRT
from harness.cases.transforms import MERGED
from harness.problem import FORWARD, TRAINING

Row = dict[str, Any]
LONG = (8192, 32768)


@dataclasses.dataclass(frozen=True)
class Verdict:
    """One target at one size. ``measured`` is None where the result file has no such row."""

    topic: str
    case: str  # without the number of tokens
    tokens: int
    quantity: str
    wanted: float
    at_least: bool
    measured: float | None

    @property
    def met(self) -> bool | None:
        if self.measured is None:
            return None
        return (operator.ge if self.at_least else operator.le)(self.measured, self.wanted)


class Rows:
    """Rows of a result file, to be asked for."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self._rows = {self._key(r): r for r in rows if r["status"] == "ok"}

    @staticmethod
    def _key(row: Row) -> tuple:
        names = ("operation", "inputs", "outputs", "tokens", "dtype", "direction", "alternative")
        return tuple(row[name] for name in names)

    def get(self, operation: str, n: int, tokens: int, alternative: str, direction: str = FORWARD) -> Row | None:
        """The bf16 row of a square problem."""
        return self._rows.get((operation, n, n, tokens, "bf16", direction, alternative))

    def value(self, name: str, *which: Any) -> float | None:
        """A cell, None where it is empty or there is no such row."""
        row = self.get(*which)
        return None if row is None or row[name] in ("", None) else float(row[name])

    def ratio(self, alternative: str, other: str, *which: Any, direction: str = FORWARD) -> float | None:
        """Median time of one alternative over that of another one of the same problem."""
        a, b = (self.value("p50_us", *which, name, direction) for name in (alternative, other))
        return None if a is None or b is None else round(a / b, 3)

    def __iter__(self) -> Iterator[Row]:
        return iter(self._rows.values())


def evaluate(rows: Iterable[Row]) -> list[Verdict]:
    """A verdict for every target at every size."""
    found = Rows(rows)
    return [*_monarch(found), *_decode(found), *_hadamard(found), *_butterfly(found), *_sparse(found), *_errors(found)]


def _case(n: int, direction: str = FORWARD) -> str:
    return f"n = {n}, {direction}"


def _monarch(rows: Rows) -> Iterator[Verdict]:
    for n, wanted in ((1024, 2.0), (2048, 3.0), (4096, 5.0), (8192, 9.0)):
        for tokens in LONG:
            for way in (FORWARD, TRAINING):
                which, case = ("linear", n, tokens, SQRT, way), _case(n, way)
                yield Verdict(SQRT, case, tokens, "speed-up over dense", wanted, True, rows.value("speedup", *which))
                most = 1.4 if n <= 2048 else 1.6
                yield Verdict(SQRT, case, tokens, "time over the floor", most, False, rows.value("floor_ratio", *which))
                peer = f"low rank, as large as {SQRT}"
                share = rows.ratio(SQRT, peer, "linear", n, tokens, direction=way)
                yield Verdict(SQRT, case, tokens, "time over equally large low rank", 1.3, False, share)
    for n in (1024, 2048, 4096, 8192):
        for tokens in (4096, *LONG) if n <= 2048 else LONG:
            for way in (FORWARD, TRAINING):
                speedup = rows.value("speedup", "linear", n, tokens, FOUR, way)
                yield Verdict(
                    FOUR, _case(n, way), tokens, "speed-up over dense", 1.6 if n >= 4096 else 1, True, speedup
                )


def _decode(rows: Rows) -> Iterator[Verdict]:
    for n in (1024, 2048, 4096, 8192):
        for tokens in (1, 4, 16, 64):
            for name in (SQRT, FOUR):
                wanted = 3.0 if name == SQRT and n >= 4096 else 1.0
                speedup = rows.value("speedup", "decode", n, tokens, name)
                yield Verdict(f"Decoding, {name}", _case(n), tokens, "speed-up over dense", wanted, True, speedup)


def _hadamard(rows: Rows) -> Iterator[Verdict]:
    for n in (1024, 2048, 4096, 8192):
        for tokens in LONG:
            share = rows.ratio("Hadamard", "copy", "hadamard", n, tokens)
            yield Verdict("Hadamard", _case(n), tokens, "time over a copy", 1.15, False, share)


def _butterfly(rows: Rows) -> Iterator[Verdict]:
    share = rows.ratio(MERGED, SQRT, "butterfly", 4096, 8192)
    yield Verdict("Butterfly", _case(4096), 8192, f"time over {SQRT}", 1.2, False, share)


def _sparse(rows: Rows) -> Iterator[Verdict]:
    n, plain, both = 4096, "block sparse", "block sparse + low rank"
    for block, wanted in ((128, 5.0), (64, 4.0), (32, 2.5)):
        operation, topic = f"block sparse {block}", f"Block sparse, 1/8, blocks of {block}"
        for tokens in LONG:
            ways = [(FORWARD, wanted)] + ([(TRAINING, 3.5)] if block == 128 else [])
            for way, least in ways:
                speedup = rows.value("speedup", operation, n, tokens, plain, way)
                yield Verdict(topic, _case(n, way), tokens, "speed-up over dense", least, True, speedup)
            share = rows.ratio(both, plain, operation, n, tokens)
            yield Verdict(topic, _case(n), tokens, "time with low rank over without", 1.2, False, share)


def _errors(rows: Rows) -> Iterator[Verdict]:
    worst: dict[tuple[str, str], tuple[float, Row]] = {}
    for row in rows:
        if row["kind"] != "ours" or not row["error"] or not row["error_dense"]:
            continue
        share = float(row["error"]) / float(row["error_dense"])
        key = row["operation"].rstrip(" 0123456789"), row["dtype"]
        if key not in worst or share > worst[key][0]:
            worst[key] = share, row
    for (topic, dtype), (share, row) in worst.items():
        case = f"{dtype}, worst: {row['alternative']}, {_case(row['inputs'], row['direction'])}"
        yield Verdict(f"Error, {topic}", case, row["tokens"], "error over dense's", 1.5, False, round(share, 2))


def summary(verdicts: Sequence[Verdict]) -> str:
    """The count, and a line for each target that is not met."""
    known = [v for v in verdicts if v.met is not None]
    missed = [v for v in known if not v.met]
    lines = [
        f"targets: {len(known) - len(missed)} met, {len(missed)} not met, {len(verdicts) - len(known)} not measured"
    ]
    for v in missed:
        sign = ">=" if v.at_least else "<="
        lines.append(f"  {v.topic}, {v.case}, T = {v.tokens}: {v.quantity} {v.measured}, wanted {sign} {v.wanted}")
    return "\n".join(lines)
