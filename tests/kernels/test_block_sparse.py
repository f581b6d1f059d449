"""Block-sparse products, forward and backward, against float64 dense ones; the operations and launches beneath."""

import pytest
import torch

from structmat.testing import relative_error
from structmat_kernels.block_sparse import BlockLayout, block_sparse, flat_butterfly_mask, launch, op, to_dense

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
FEW = ["random", "cropped", "supers", "odd"]


def arguments(layout, operands, scale, transposed):
    """What the operation and its launcher take: a batch of one matrix."""
    x, values, u, v, bias, gamma = [t[None] for t in operands]
    sizes = (*layout.shape, *layout.coarsening, layout.longest)
    return x, values, u, v, bias, gamma[None], layout.table, *sizes, scale, transposed


@pytest.fixture
def compare(sparse):
    """Compares forward and all gradients with float64."""

    def check(layout, dtype, device, tokens=37, rank=8, transposed=False):
        layout = layout.to(device)
        operands = sparse.operands(layout, tokens, dtype, device, rank, transposed=transposed)
        mine, exact = sparse.leaves(operands), sparse.leaves(operands, torch.float64)
        y, expected = sparse.run(layout, mine, transposed), sparse.dense(layout, exact, transposed)
        assert y.shape == expected.shape and y.dtype == dtype
        assert relative_error(y, expected) <= TOLERANCE[dtype]
        cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(dtype).to(device)
        y.backward(cotangent)
        expected.backward(cotangent.double())
        for name, a, b in zip(sparse.NAMES[:5], mine, exact, strict=False):
            assert a.grad is not None and b.grad is not None
            assert a.grad.shape == b.grad.shape and relative_error(a.grad, b.grad) <= TOLERANCE[dtype], name
        # gamma's gradient is one sum over the outputs whose terms cancel: its rounding is measured by their size.
        weight = to_dense(exact[1], layout)
        terms = cotangent.double() * (exact[0] @ (weight if transposed else weight.mT))
        allowed = TOLERANCE[dtype] * max(terms.norm(), terms.sum().abs())
        assert mine[5].grad.shape == () and (mine[5].grad - exact[5].grad).abs() <= allowed

    return check


@pytest.mark.parametrize("transposed", [False, True])
def test_values_and_gradients(device, layout, transposed, poisoned, compare):
    compare(layout, torch.float32, device, transposed=transposed)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("layout", FEW, indirect=True)
def test_half_precision(device, layout, dtype, transposed, poisoned, compare):
    compare(layout, dtype, device, transposed=transposed)


@pytest.mark.parametrize("tokens", [0, 1, 64, 129, 300])
@pytest.mark.parametrize("layout", ["cropped", "supers"], indirect=True)
def test_token_counts(device, layout, tokens, poisoned, compare):
    compare(layout, torch.float32, device, tokens=tokens)


@pytest.mark.parametrize("layout", ["cropped"], indirect=True)
@pytest.mark.parametrize("rank", [1, 7, 16, 65, 100])
def test_ranks(device, layout, rank, poisoned, compare):
    compare(layout, torch.float32, device, rank=rank)
    compare(layout, torch.float32, device, rank=rank, transposed=True)


@pytest.mark.parametrize("transposed", [False, True])
def test_error_is_that_of_a_dense_product(device, sparse, transposed):
    layout = BlockLayout.from_mask(flat_butterfly_mask(4, 4), 32).to(device)
    # Triton's interpreter truncates to bfloat16 where the device rounds.
    for dtype in DTYPES[1:] if device == "cuda" else DTYPES[2:]:
        operands = sparse.operands(layout, 65, dtype, device, rank=16, transposed=transposed)
        exact = sparse.dense(layout, [t.double() for t in operands], transposed)
        weight = sparse.weight(layout, [t.double() for t in operands]).to(dtype)
        # The dense product's weight is its own: it is not charged with the rounding of the sum of both parts.
        x, bias = operands[0], operands[4]
        product = torch.nn.functional.linear(x, weight.mT if transposed else weight, bias)
        full = weight.double() if transposed else weight.double().mT
        reference = relative_error(product, x.double() @ full + bias.double())
        assert relative_error(sparse.run(layout, operands, transposed), exact) <= 1.5 * reference + 1e-5


@pytest.mark.parametrize("layout", ["cropped"], indirect=True)
def test_cropped_entries_are_ignored(device, layout, sparse):
    layout = layout.to(device)
    operands = sparse.operands(layout, 37, torch.float32, device)
    clean = sparse.run(layout, operands)
    t = layout.tables
    o, i = torch.arange(16, device=device)[:, None], torch.arange(16, device=device)
    outside = (t.rows[:, None, None] * 16 + o >= 37) | (t.columns[:, None, None] * 16 + i >= 79)
    assert outside.any()
    values = operands[1].masked_fill(outside, float("nan"))
    y = sparse.run(layout, [operands[0], values, *operands[2:]])
    assert torch.equal(y, clean)
    leaf = operands[1].clone().requires_grad_()
    sparse.run(layout, [operands[0], leaf, *operands[2:]]).sum().backward()
    assert not leaf.grad[outside].any()


@pytest.mark.parametrize("layout", ["random", "supers"], indirect=True)
def test_spans_of_tokens_are_added(device, layout, sparse, poisoned):
    """Many spans give the gradient of one, and long tiles that of short ones."""
    layout = layout.to(device)
    x, values = sparse.operands(layout, 150, torch.float32, device)[:2]
    grad = torch.randn(1, 150, layout.shape[0], generator=torch.Generator().manual_seed(2)).to(device)
    leaf = values.double().requires_grad_()
    sampled = (to_dense(leaf, layout) * (grad[0].double().mT @ x.double())).sum()
    (expected,) = torch.autograd.grad(sampled, leaf)
    none = x.new_empty(1, 0)
    for splits, pack in ((1, 1), (3, 2), (2, 4)):
        config = {"pack": pack, "block_k": 32, "num_warps": 4, "num_stages": 2, "splits": splits}
        args = (grad, x[None], values[None], none, layout.table, *layout.coarsening, layout.longest, 1.0, torch.float32)
        assert relative_error(launch.sampled(*args, config=config)[0], expected) <= 5e-6


@pytest.mark.parametrize("layout", ["supers"], indirect=True)
@pytest.mark.parametrize("block_t", [16, 128])
@pytest.mark.parametrize("block_k", [16, 32])
def test_configurations(device, layout, sparse, block_t, block_k):
    layout = layout.to(device)
    operands = sparse.operands(layout, 70, torch.float32, device)
    config = {"block_t": block_t, "block_k": block_k, "num_warps": 4, "num_stages": 2}
    args = arguments(layout, operands, 1.0, False)
    got = launch.product(*args, config=config)
    assert relative_error(got[0], sparse.dense(layout, [t.double() for t in operands])) <= 5e-6


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("layout", ["random", "cropped", "diagonal"], indirect=True)
def test_low_rank_in_one_launch(device, layout, sparse, transposed, poisoned):
    layout = layout.to(device)
    for rank, parts, ahead in ((8, 1, 1), (64, 3, 2), (100, 2, 9)):
        operands = sparse.operands(layout, 70, torch.float32, device, rank=rank, transposed=transposed)
        config = {"block_t": 32, "block_k": 16, "num_warps": 4, "num_stages": 3, "parts": parts, "ahead": ahead}
        args = arguments(layout, operands, 1.0, transposed)
        got = launch.product(*args, config=config)
        assert relative_error(got[0], sparse.dense(layout, [t.double() for t in operands], transposed)) <= 5e-6
        if device == "cuda":
            assert all(torch.equal(got, launch.product(*args, config=config)) for _ in range(20))


@pytest.mark.parametrize("layout", ["cropped", "supers"], indirect=True)
def test_opcheck(device, layout, sparse):
    layout = layout.to(device)
    operands = sparse.operands(layout, 5, torch.float32, device)
    args = arguments(layout, operands, 0.5, False)
    torch.library.opcheck(op._op, args)
    grad = torch.randn_like(sparse.run(layout, operands))[None]
    torch.library.opcheck(op._backward, (grad, *args, [True, False, True, True, False, True]))


def test_reference_is_the_dense_product(layout, sparse):
    for transposed in (False, True):
        operands = sparse.leaves(sparse.operands(layout, 3, torch.float64, transposed=transposed))
        expected = sparse.dense(layout, operands, transposed)
        got = sparse.run(layout, operands, transposed, backend="torch")
        assert relative_error(got, expected.detach()) <= 1e-12
        a = torch.autograd.grad(got.sin().sum(), operands)
        b = torch.autograd.grad(expected.sin().sum(), operands)
        assert all(relative_error(p, q) <= 1e-12 for p, q in zip(a, b, strict=True))


@pytest.mark.gpu
def test_graph_stream_and_repetition(sparse, same_bits_everywhere):
    layout = BlockLayout.from_mask(flat_butterfly_mask(8, 8), 32).to("cuda")
    values = sparse.operands(layout, 2500, torch.bfloat16, "cuda", rank=16)

    def step():
        operands = sparse.leaves(values)  # of the current stream, which a captured gradient waits for
        y = sparse.run(layout, operands)
        return (y, *torch.autograd.grad(y.sum(), operands))

    same_bits_everywhere(step)


@pytest.mark.gpu
def test_offsets_beyond_32_bits(sparse):
    layout = BlockLayout.from_mask(torch.eye(32, dtype=torch.bool), 128).to("cuda")
    tokens = 2**19 + 300  # 2^31 elements and some, at n = 4096
    x = torch.empty(tokens, 4096, dtype=torch.bfloat16, device="cuda").normal_()
    values = sparse.operands(layout, 1, torch.bfloat16, "cuda")[1].requires_grad_()
    y = block_sparse(x, values, layout, backend="triton")
    tail = slice(tokens - 500, tokens)
    expected = dense_tail = x[tail].double() @ to_dense(values.double(), layout).mT
    assert relative_error(y[tail], dense_tail) <= 1e-2
    cotangent = torch.zeros_like(y)
    cotangent[tail] = 1
    (gradient,) = torch.autograd.grad(y, values, cotangent)
    (right,) = torch.autograd.grad(expected.sum(), values)
    assert relative_error(gradient, right) <= 1e-2
