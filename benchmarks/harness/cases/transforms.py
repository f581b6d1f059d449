"""Hadamard transforms, and butterflies as products of Kronecker-sparse factors."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from harness.cases.find import ways
from harness.cases.linear import SQRT, dense, monarch, sqrt_blocks
from harness.problem import FORWARD, Alternative, Built, Cost, Problem, seeded
from structmat import Butterfly, Chain, KroneckerSparse


def walsh_hadamard(x: Tensor, scale: float) -> Tensor:
    """Sylvester's Hadamard matrix times the last dimension, level by level."""
    size = x.shape[-1]
    y, half = x, 1
    while half < size:
        a, b = y.unflatten(-1, (-1, 2, half)).unbind(-2)
        y = torch.stack((a + b, a - b), -2).flatten(-3)
        half *= 2
    return y * scale


def hadamard(n: int, tokens: int, dtype: str, direction: str = FORWARD) -> Problem:
    """The orthonormal Hadamard transform beside a copy of its input and beside the dense product."""
    scale = n**-0.5

    def alternatives(problem: Problem, device: torch.device) -> list[Alternative]:
        cost = Cost.transform(tokens, n, tokens * n * n.bit_length())
        exact = functools.partial(walsh_hadamard, scale=scale)
        found = [dense(problem, device)] if n <= 8192 else []
        if direction == FORWARD:  # the derivative of a copy copies nothing
            found.append(Alternative("copy", "copy", cost, lambda seed: ([], torch.clone)))
        for suffix, kind, function in ways("hadamard", "hadamard", device):
            if isinstance(function, str):
                found.append(Alternative("Hadamard" + suffix, kind, cost, missing=function))
            else:
                call = functools.partial(function, scale=scale)
                found.append(Alternative("Hadamard" + suffix, kind, cost, lambda seed, c=call: ([], c), exact))
        if device.type == "cuda" and (peer := _dao_hadamard()) is not None:
            call = functools.partial(peer, scale=scale)
            found.append(Alternative("fast-hadamard-transform", "peer", cost, lambda seed: ([], call), exact))
        return found

    return Problem("hadamard", n, n, tokens, dtype, direction, alternatives)


def _dao_hadamard() -> Callable[..., Tensor] | None:
    try:
        from fast_hadamard_transform import hadamard_transform
    except Exception:  # an extension that was built for another torch fails in many ways
        return None
    return hadamard_transform


# ---------------------------------------------------------------- butterflies
def levels(n: int, radix: int) -> list[tuple[int, int, int]]:
    """(a, radix, d) of the factors I_a (x) dense (x) I_d, first applied first; the last radix may be smaller."""
    found, d = [], 1
    while d < n:
        r = min(radix, n // d)
        found.append((n // (d * r), r, d))
        d *= r
    return found


def butterfly_product(x: Tensor, *factors: Tensor) -> Tensor:
    """Apply Kronecker-sparse factors of blocks (a, d, radix, radix) in turn, by their definition."""
    for blocks in factors:
        a, d, _, radix = blocks.shape
        pieces = x.unflatten(-1, (a, radix, d))
        x = torch.einsum("adij,...ajd->...aid", blocks, pieces).flatten(-3)
    return x


def butterfly(n: int, tokens: int, dtype: str, direction: str = FORWARD) -> Problem:
    """An n x n butterfly of radix 2, and of larger radices: the same product with its levels merged, fewer passes."""
    bits = int(math.log2(n))

    def build(function: Callable[..., Tensor], radix: int, device: torch.device, kind: torch.dtype, seed: int) -> Built:
        draw = seeded(seed, device, kind)
        factors = [draw(a, d, r, r, std=r**-0.5) for a, r, d in levels(n, radix)]

        def call(x: Tensor) -> Tensor:
            for blocks in factors:
                x = function(x, blocks)
            return x

        return factors, call

    def alternatives(problem: Problem, device: torch.device) -> list[Alternative]:
        found = [dense(problem, device), *_merged(problem, device)]
        for log in [b for b in (1, 3, 4, 5, 6) if bits % b == 0 or b == 1]:
            sizes = levels(n, 2**log)
            cost = Cost.linear(tokens, n, n, sum(a * r * r * d for a, r, d in sizes))
            name = f"radix {2**log}, {len(sizes)} factors"
            for suffix, way, function in ways("kronecker_sparse", "kronecker_sparse", device):
                if isinstance(function, str):
                    found.append(Alternative(name + suffix, way, cost, missing=function))
                else:
                    make = functools.partial(build, function, 2**log, device, problem.torch_dtype)
                    found.append(Alternative(name + suffix, way, cost, make, butterfly_product))
        if device.type == "cuda" and dtype == "fp32" and (peer := _torch_butterfly(n, device)) is not None:
            cost = Cost.linear(tokens, n, n, 2 * n * bits)
            found.append(Alternative("torch_butterfly, radix 2", "peer", cost, peer))
        return found

    return Problem("butterfly", n, n, tokens, dtype, direction, alternatives)


MERGED = "Butterfly, radix 2, levels merged"


def _merged(problem: Problem, device: torch.device) -> list[Alternative]:
    """The class as users have it, which merges its levels in every call; and a Monarch matrix, which is merged."""
    n, chain = problem.inputs, Chain.dyadic(problem.inputs)

    def build(seed: int) -> Built:
        draw = seeded(seed, device, problem.torch_dtype)
        factors = [draw(*pattern, std=2**-0.5) for pattern in chain]
        return factors, lambda x: Butterfly(tuple(map(KroneckerSparse, factors))).linear(x)

    def exact(x: Tensor, *factors: Tensor) -> Tensor:
        return butterfly_product(x, *(values.movedim(-1, -3) for values in reversed(factors)))

    cost = Cost.linear(problem.tokens, n, n, chain.num_params)
    merged = Alternative(MERGED, "ours", cost, build, exact)
    return [merged, *monarch(problem, device, SQRT, sqrt_blocks(n))]


def _torch_butterfly(n: int, device: torch.device) -> Callable[[int], Built] | None:
    try:
        from torch_butterfly.multiply import butterfly_multiply
    except Exception:
        return None

    def build(seed: int) -> Built:
        twiddle = seeded(seed, device, torch.float32)(1, 1, int(math.log2(n)), n // 2, 2, 2, std=2**-0.5)
        return [twiddle], lambda x: butterfly_multiply(twiddle, x.unsqueeze(1), True).squeeze(1)

    return build
