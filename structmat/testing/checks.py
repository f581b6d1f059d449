"""Every check by name: a check takes an entry and a device, and raises where a promise breaks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from structmat.testing import algebra, gradients, products, storage, tracing
from structmat.testing.entry import Entry

#: Every check: ``CHECKS[name](entry, device)``.
CHECKS: dict[str, Callable[[Entry, Any], None]] = {
    "products": products.check_products,
    "dtypes": products.check_dtypes,
    "layouts": products.check_layouts,
    "linearity": products.check_linearity,
    "adjoint": products.check_adjoint,
    "autocast": products.check_autocast,
    "errors": products.check_errors,
    "entries": algebra.check_entries,
    "arithmetic": algebra.check_arithmetic,
    "solve": algebra.check_solve,
    "structure": algebra.check_structure,
    "initialisation": algebra.check_initialisation,
    "gradients": gradients.check_gradients,
    "vmap": gradients.check_vmap,
    "per_sample_gradients": gradients.check_per_sample_gradients,
    "compile": tracing.check_compile,
    "export": tracing.check_export,
    "pytree": storage.check_pytree,
    "copies": storage.check_copies,
    "conversion": storage.check_conversion,
    "state_dict": storage.check_state_dict,
}


def check_all(entry: Entry, device: Any = "cpu", only: Iterable[str] | None = None) -> list[str]:
    """Run every check on an entry.

    Args:
        entry: the matrix and what it promises.
        device: where to run.
        only: names of checks; all of ``CHECKS`` by default.

    Returns:
        The names of the checks that ran.

    Raises:
        AssertionError: at the first broken promise; the message names entry and check.
        ValueError: if a name in ``only`` is unknown.
    """
    names = list(CHECKS) if only is None else list(only)
    if unknown := [n for n in names if n not in CHECKS]:
        raise ValueError(f"unknown checks {unknown}; known are {', '.join(CHECKS)}")
    for name in names:
        try:
            CHECKS[name](entry, device)
        except Exception as error:
            raise AssertionError(f"{entry.name} fails the check {name!r}: {error}") from error
    return names
