"""Property tests for structured matrices, this library's and yours.

``check_all(Entry("mine", make))`` runs every check on an operator of your own; ``market()`` yields one entry for every
class and structure of the library; ``structmat.testing.strategies`` holds hypothesis strategies (needs hypothesis).
"""

from structmat.testing.checks import CHECKS, check_all
from structmat.testing.definitions import dense_by_definition
from structmat.testing.entry import TOLERANCES, Entry, assert_close, relative_error
from structmat.testing.market import market

__all__ = [
    "CHECKS",
    "TOLERANCES",
    "Entry",
    "assert_close",
    "check_all",
    "dense_by_definition",
    "market",
    "relative_error",
]
