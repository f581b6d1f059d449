"""Kernel tests run in Triton's interpreter on the CPU, and compiled on a CUDA device (`-m gpu`).

What several files of them need is here, as fixtures; errors are measured by structmat.testing.
"""

import pytest
import torch

from structmat_kernels.block_sparse import (
    BlockLayout,
    block_sparse,
    block_sparse_transposed,
    flat_butterfly_mask,
    to_dense,
)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    return request.param


@pytest.fixture
def poisoned(monkeypatch):
    """Fresh memory is full of NaN: an entry that is not written shows."""
    empty, new_empty = torch.empty, torch.Tensor.new_empty

    def fill(t):
        return t.fill_(float("nan")) if t.is_floating_point() else t

    monkeypatch.setattr(torch, "empty", lambda *a, **k: fill(empty(*a, **k)))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: fill(new_empty(*a, **k)))


@pytest.fixture
def same_bits_everywhere():
    """Checks that a step has the same bits again, on another stream, and from a graph's replays; returns them."""

    def check(step):
        expected = [t.clone() for t in step()]
        for got in (step(), step()):
            assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            elsewhere = step()
        torch.cuda.current_stream().wait_stream(stream)
        assert all(torch.equal(a, b) for a, b in zip(expected, elsewhere, strict=True))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        for _ in range(2):
            for t in captured:
                t.detach().fill_(float("nan"))
            graph.replay()
            torch.cuda.synchronize()
            assert all(torch.equal(a, b) for a, b in zip(expected, captured, strict=True))
        return expected

    return check


# ---------------------------------------------------------------- Monarch


def embed(t):
    """t as a part of a larger tensor that is NaN elsewhere, at an odd address."""
    wide = t.new_full((*t.shape[:-2], t.shape[-2] + 2, t.shape[-1] + 5), float("nan"))
    return wide[..., 1:-1, 3:-2].copy_(t)


def surround(t):
    """A contiguous t with NaN before and after it, at an odd address."""
    wide = t.new_full((t.numel() + 70,), float("nan"))
    return wide[3 : 3 + t.numel()].copy_(t.flatten()).view(t.shape)


@pytest.fixture(name="embed")
def embed_fixture():
    return embed


@pytest.fixture
def monarch_operands():
    """Makes x, left, right, bias of size about 1, with NaN around them."""

    def make(shape, tokens, dtype, device, batch=(), bias=True):
        l, s, r, k, q, p, nrows, ncols = shape
        generator = torch.Generator().manual_seed(l + 10 * s + 100 * r + tokens)

        def normal(*size, scale=1.0):
            return (scale * torch.randn(*batch, *size, generator=generator)).to(device, dtype)

        x, left, right = normal(tokens, ncols), normal(l, s, r, scale=r**-0.5), normal(k, q, p, scale=p**-0.5)
        some = normal(nrows) if bias else normal(0)
        return embed(x), surround(left), surround(right), surround(some)

    return make


# ---------------------------------------------------------------- block sparse


def random_mask(mb, nb, density=0.5, seed=0):
    mask = torch.rand(mb, nb, generator=torch.Generator().manual_seed(seed)) < density
    mask[0] = True  # a dense row; the last row and column are empty, but for it
    mask[1:, -1] = False
    if mb > 1:
        mask[-1] = False
    return mask


def banded(size):
    i = torch.arange(size)
    return (i[:, None] - i).abs() <= 1


LAYOUTS = {
    "random": lambda: BlockLayout.from_mask(random_mask(5, 4), 16, coarsening=1),
    "cropped": lambda: BlockLayout.from_mask(random_mask(3, 5), 16, shape=(37, 79), coarsening=1),
    "rectangular": lambda: BlockLayout.from_mask(random_mask(3, 4), (16, 32), shape=(33, 101), coarsening=1),
    "odd": lambda: BlockLayout.from_mask(random_mask(4, 3), (5, 23), shape=(17, 53), coarsening=1),
    "one": lambda: BlockLayout.from_mask(torch.tensor([[True]]), 16, shape=(1, 1), coarsening=1),
    "one row": lambda: BlockLayout.from_mask(torch.tensor([[True, False, True]]), 32, shape=(1, 71), coarsening=1),
    "one column": lambda: BlockLayout.from_mask(
        torch.tensor([[True], [False], [True]]), 32, shape=(71, 1), coarsening=1
    ),
    "diagonal": lambda: BlockLayout.from_mask(torch.eye(3, dtype=torch.bool), 32),
    "banded": lambda: BlockLayout.from_mask(banded(6), 16, coarsening=2),
    "butterfly": lambda: BlockLayout.from_mask(flat_butterfly_mask(4, 4), 16, coarsening=(2, 1)),
    "supers": lambda: BlockLayout.from_mask(random_mask(5, 7), 16, shape=(75, 101), coarsening=(2, 4)),
    "empty": lambda: BlockLayout.from_mask(torch.zeros(2, 3, dtype=torch.bool), 16, coarsening=1),
    "128": lambda: BlockLayout.from_mask(random_mask(2, 2), 128),
}


@pytest.fixture(name="random_mask")
def random_mask_fixture():
    return random_mask


@pytest.fixture(params=LAYOUTS)
def layout(request):
    """Every layout; a test of some of them parametrises "layout" by their names, with indirect=True."""
    return LAYOUTS[request.param]()


class BlockSparse:
    """The block-sparse product by kernels and by definition, as functions of a layout and of a list of operands."""

    NAMES = ("x", "values", "u", "v", "bias", "gamma")

    @staticmethod
    def operands(layout, tokens, dtype, device="cpu", rank=8, batch=(), transposed=False):
        """Operands of size about 1, in the order of NAMES."""
        generator = torch.Generator().manual_seed(0)
        m, n = layout.shape
        n_in, n_out = (m, n) if transposed else (n, m)

        def normal(*shape, scale=1.0):
            return (scale * torch.randn(*shape, generator=generator)).to(dtype).to(device)

        return [
            normal(*batch, tokens, n_in),
            normal(*batch, layout.nnz, *layout.block, scale=n**-0.5),
            normal(*batch, m, rank, scale=rank**-0.5),
            normal(*batch, rank, n, scale=n**-0.5),
            normal(*batch, n_out),
            torch.tensor(0.7, dtype=dtype, device=device),
        ]

    @staticmethod
    def run(layout, operands, transposed=False, backend="triton"):
        x, values, u, v, bias, gamma = operands
        f = block_sparse_transposed if transposed else block_sparse
        return f(x, values, layout, u=u, v=v, bias=bias, gamma=gamma, backend=backend)

    @staticmethod
    def weight(layout, operands):
        _, values, u, v, _, gamma = operands
        return gamma * to_dense(values, layout) + u @ v

    @staticmethod
    def dense(layout, operands, transposed=False):
        weight = BlockSparse.weight(layout, operands)
        return operands[0] @ (weight if transposed else weight.mT) + operands[4].unsqueeze(-2)

    @staticmethod
    def leaves(operands, dtype=None):
        return [t.detach().to(dtype or t.dtype).requires_grad_() for t in operands]


@pytest.fixture(scope="session")
def sparse():
    return BlockSparse
