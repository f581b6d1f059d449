"""Every check on every class and structure of the library."""

import pytest
import torch

from structmat.testing import CHECKS, market
from structmat.testing.tracing import check_compile

MARKET = market()
ONE_OF_EACH_FAMILY = [
    *("dense", "diagonal", "permutation", "lowrank", "blockdiagonal-prime", "monarch-prime"),
    *("transposed", "product", "sum", "scaled", "kronecker", "inverse"),
]
#: What takes seconds: by default for the first member of a family and for its first batch, `slow` for the others.
TRACED = ("compile", "export")


def marked():
    """All entries with all checks."""
    seen = set()
    for entry in MARKET:
        family, _, rest = entry.name.partition("-")
        kind = family, "batch" in rest
        for check in CHECKS:
            marks = pytest.mark.slow if check in TRACED and kind in seen else ()
            yield pytest.param(entry, check, id=f"{entry!r}-{check}", marks=marks)
        seen.add(kind)


@pytest.mark.parametrize(("entry", "check"), marked())
def test_market(entry, check):
    CHECKS[check](entry, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("entry", MARKET, ids=repr)
def test_market_on_gpu(entry, check):
    CHECKS[check](entry, torch.device("cuda", 0))


@pytest.mark.slow
@pytest.mark.parametrize("name", ONE_OF_EACH_FAMILY)
def test_inductor(name):
    check_compile(next(e for e in MARKET if e.name == name), backend="inductor")
