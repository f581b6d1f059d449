"""Linear layers: dense, Monarch, low rank, block diagonal."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from harness.cases.find import ways
from harness.problem import FORWARD, Alternative, Built, Cost, Problem, seeded
from structmat import Monarch
from structmat_kernels.monarch.reference import monarch as monarch_reference

FOUR, SQRT = "Monarch 4 blocks", "Monarch sqrt(n) blocks"


def sqrt_blocks(n: int) -> int:
    """The power of two nearest to the square root of n: 32, 64, 64, 64 for n = 1024, 2048, 4096, 8192."""
    return 2 ** round(0.5 * (n - 1).bit_length())


def dense(problem: Problem, device: torch.device, then: Callable[[Tensor], Tensor] | None = None) -> Alternative:
    """``F.linear``, with a bias and an activation if one is given."""
    m, n = problem.outputs, problem.inputs

    def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        y = F.linear(x, weight, bias)
        return then(y) if then else y

    def build(seed: int) -> Built:
        draw = seeded(seed, device, problem.torch_dtype)
        factors = [draw(m, n, std=n**-0.5)] + ([draw(m)] if then else [])
        return factors, lambda x: product(x, *factors)

    cost = Cost.linear(problem.tokens, n, m, m * n)
    return Alternative("dense", "dense", cost, build, product)


def low_rank(problem: Problem, device: torch.device, params: int, like: str) -> Alternative:
    """Two thin products with as many parameters as another structure."""
    m, n = problem.outputs, problem.inputs
    rank = max(1, params // (m + n))

    def product(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
        return F.linear(F.linear(x, right), left)

    def build(seed: int) -> Built:
        draw = seeded(seed, device, problem.torch_dtype)
        factors = [draw(m, rank, std=rank**-0.5), draw(rank, n, std=n**-0.5)]
        return factors, lambda x: product(x, *factors)

    cost = Cost.linear(problem.tokens, n, m, rank * (m + n))
    return Alternative(f"low rank, as large as {like}", "low rank", cost, build, product)


def monarch(
    problem: Problem, device: torch.device, name: str, nblocks: int, compiled: bool = False, gelu: bool = False
) -> list[Alternative]:
    """A Monarch layer by every way that there is; with bias and GELU in the kernel if ``gelu``."""
    m, n = problem.outputs, problem.inputs
    size = Monarch.structure(m, n, nblocks)
    shapes = (size["l"], size["s"], size["r"]), (size["k"], size["q"], size["p"])
    params = sum(a * b * c for a, b, c in shapes)
    cost = Cost.linear(problem.tokens, n, m, params)

    def exact(x: Tensor, left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
        y = monarch_reference(x, left, right, m)
        return y if bias is None else F.gelu(y + bias)

    def build(function: Callable[..., Tensor], seed: int) -> Built:
        draw = seeded(seed, device, problem.torch_dtype)
        left, right = (draw(*shape, std=shape[-1] ** -0.5) for shape in shapes)
        if not gelu:
            return [left, right], lambda x: function(x, left, right, m)
        bias = draw(m)
        return [left, right, bias], lambda x: function(x, left, right, m, bias=bias, activation="gelu")

    plain = None if gelu else monarch_reference
    found = ways("monarch", "monarch", device, plain)
    if compiled:
        found.append((", torch.compile", "compile", torch.compile(monarch_reference, dynamic=False)))
    return [
        Alternative(name + suffix, kind, cost, None, missing=function)
        if isinstance(function, str)
        else Alternative(name + suffix, kind, cost, functools.partial(build, function), exact)
        for suffix, kind, function in found
    ]


def square(n: int, tokens: int, dtype: str, direction: str = FORWARD, eager: bool = False) -> Problem:
    """An n x n layer: dense, Monarch with 4 and about sqrt(n) blocks, low rank of the sizes of both."""

    def alternatives(problem: Problem, device: torch.device) -> list[Alternative]:
        found = [dense(problem, device)]
        for name, nblocks in ((SQRT, sqrt_blocks(n)), (FOUR, 4)):
            structured = monarch(problem, device, name, nblocks)
            assert structured[0].cost is not None
            found += [*structured, low_rank(problem, device, structured[0].cost.params, name)]
        return found

    operation = "decode" if tokens <= 64 else "linear"
    return Problem(operation, n, n, tokens, dtype, direction, alternatives, eager)


def compiled(n: int, tokens: int, direction: str) -> Problem:
    """What torch.compile makes of the reference."""

    def alternatives(problem: Problem, device: torch.device) -> list[Alternative]:
        found = [dense(problem, device)]
        for name, nblocks in ((SQRT, sqrt_blocks(n)), (FOUR, 4)):
            found += monarch(problem, device, name, nblocks, compiled=True)
        return found

    return Problem("linear and torch.compile", n, n, tokens, "bf16", direction, alternatives, slow=True)


def feed_forward(n: int, m: int, tokens: int, dtype: str = "bf16") -> Problem:
    """The first half of a transformer's feed-forward network: a rectangular layer, bias and GELU in one call."""

    def alternatives(problem: Problem, device: torch.device) -> list[Alternative]:
        found = [dense(problem, device, F.gelu)]
        for name, nblocks in ((SQRT, sqrt_blocks(n)), (FOUR, 4)):
            found += monarch(problem, device, name, nblocks, gelu=True)
        return found

    return Problem("linear, bias, GELU", n, m, tokens, dtype, FORWARD, alternatives)


def block_diagonal(n: int, tokens: int, dtype: str = "bf16") -> Problem:
    """Block-diagonal layers of 4 and of about sqrt(n) blocks."""

    def exact(x: Tensor, blocks: Tensor) -> Tensor:
        pieces = x.unflatten(-1, (blocks.shape[0], -1))
        return torch.einsum("tkp,kqp->tkq", pieces, blocks).flatten(-2)

    def build(function: Callable[..., Tensor], k: int, device: torch.device, dtype: torch.dtype, seed: int) -> Built:
        blocks = seeded(seed, device, dtype)(k, n // k, n // k, std=(n // k) ** -0.5)

        def call(x: Tensor) -> Tensor:
            y = function(x, blocks)
            return y if y.ndim == x.ndim else y.flatten(-2)

        return [blocks], call

    def alternatives(problem: Problem, device: torch.device) -> list[Alternative]:
        found = [dense(problem, device)]
        for name, k in (("4 blocks", 4), ("sqrt(n) blocks", sqrt_blocks(n))):
            cost = Cost.linear(problem.tokens, n, n, n * n // k)
            for suffix, kind, function in ways("block_diagonal", "block_diagonal", device):
                if isinstance(function, str):
                    found.append(Alternative(name + suffix, kind, cost, missing=function))
                else:
                    make = functools.partial(build, function, k, device, problem.torch_dtype)
                    found.append(Alternative(name + suffix, kind, cost, make, exact))
        return found

    return Problem("block diagonal", n, n, tokens, dtype, FORWARD, alternatives)
