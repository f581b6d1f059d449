"""Block-sparse products against float64 dense ones: values, gradients of both orders, layouts, transforms, errors."""

import pytest
import torch

from structmat_kernels.block_sparse import (
    BlockLayout,
    block_sparse,
    block_sparse_transposed,
    flat_butterfly_mask,
    launch,
    op,
    to_dense,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
NAMES = ("x", "values", "u", "v", "bias", "gamma")


def error(got, expected):
    scale = expected.norm()
    return ((got.detach().double() - expected.double()).norm() / (scale if scale > 0 else 1)).item()


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
FEW = ["random", "cropped", "supers", "odd"]


def make(layout, tokens, dtype, device="cpu", rank=8, batch=(), lead=(), transposed=False, seed=0):
    """Operands of size about 1, in the order of NAMES."""
    generator = torch.Generator().manual_seed(seed)
    m, n = layout.shape
    n_in, n_out = (m, n) if transposed else (n, m)

    def normal(*shape, scale=1.0):
        return (scale * torch.randn(*shape, generator=generator)).to(dtype).to(device)

    return [
        normal(*batch, *lead, tokens, n_in),
        normal(*batch, layout.nnz, *layout.block, scale=n**-0.5),
        normal(*batch, m, rank, scale=rank**-0.5),
        normal(*batch, rank, n, scale=n**-0.5),
        normal(*batch, n_out),
        torch.tensor(0.7, dtype=dtype, device=device),
    ]


def run(layout, operands, transposed=False, backend="triton"):
    x, values, u, v, bias, gamma = operands
    f = block_sparse_transposed if transposed else block_sparse
    return f(x, values, layout, u=u, v=v, bias=bias, gamma=gamma, backend=backend)


def dense_weight(layout, operands):
    _, values, u, v, _, gamma = operands
    return gamma * to_dense(values, layout) + u @ v


def dense(layout, operands, transposed=False):
    weight = dense_weight(layout, operands)
    return operands[0] @ (weight if transposed else weight.mT) + operands[4].unsqueeze(-2)


def leaves(operands, dtype=None):
    return [t.detach().to(dtype or t.dtype).requires_grad_() for t in operands]


@pytest.fixture
def poisoned(monkeypatch):
    """Fresh memory is full of NaN: an output that is not written shows."""
    empty, new_empty = torch.empty, torch.Tensor.new_empty

    def fill(t):
        return t.fill_(float("nan")) if t.is_floating_point() else t

    monkeypatch.setattr(torch, "empty", lambda *a, **k: fill(empty(*a, **k)))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: fill(new_empty(*a, **k)))


def compare(layout, dtype, device, tokens=37, rank=8, transposed=False, **how):
    """Forward and all gradients against float64."""
    layout = layout.to(device)
    operands = make(layout, tokens, dtype, device, rank, transposed=transposed, **how)
    mine, exact = leaves(operands), leaves(operands, torch.float64)
    y, expected = run(layout, mine, transposed), dense(layout, exact, transposed)
    assert y.shape == expected.shape and y.dtype == dtype
    assert error(y, expected) <= TOLERANCE[dtype]
    cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(dtype).to(device)
    y.backward(cotangent)
    expected.backward(cotangent.double())
    for name, a, b in zip(NAMES[:5], mine, exact, strict=False):
        assert a.grad is not None and b.grad is not None
        assert a.grad.shape == b.grad.shape and error(a.grad, b.grad) <= TOLERANCE[dtype], name
    # gamma's gradient is one sum over the outputs whose terms cancel: its rounding is measured by their size.
    weight = to_dense(exact[1], layout)
    terms = cotangent.double() * (exact[0] @ (weight if transposed else weight.mT))
    allowed = TOLERANCE[dtype] * max(terms.norm(), terms.sum().abs())
    assert mine[5].grad.shape == () and (mine[5].grad - exact[5].grad).abs() <= allowed


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("name", LAYOUTS)
def test_values_and_gradients(device, name, transposed, poisoned):
    compare(LAYOUTS[name](), torch.float32, device, transposed=transposed)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("name", FEW)
def test_half_precision(device, name, dtype, transposed, poisoned):
    compare(LAYOUTS[name](), dtype, device, transposed=transposed)


@pytest.mark.parametrize("tokens", [0, 1, 64, 129, 300])
@pytest.mark.parametrize("name", ["cropped", "supers"])
def test_token_counts(device, name, tokens, poisoned):
    compare(LAYOUTS[name](), torch.float32, device, tokens=tokens)


@pytest.mark.parametrize("rank", [1, 7, 16, 65, 100])
def test_ranks(device, rank, poisoned):
    compare(LAYOUTS["cropped"](), torch.float32, device, rank=rank)
    compare(LAYOUTS["cropped"](), torch.float32, device, rank=rank, transposed=True)


@pytest.mark.parametrize("transposed", [False, True])
def test_error_is_that_of_a_dense_product(device, transposed):
    layout = BlockLayout.from_mask(flat_butterfly_mask(4, 4), 32).to(device)
    # Triton's interpreter truncates to bfloat16 where the device rounds.
    for dtype in DTYPES[1:] if device == "cuda" else DTYPES[2:]:
        operands = make(layout, 65, dtype, device, rank=16, transposed=transposed)
        exact = dense(layout, [t.double() for t in operands], transposed)
        weight = dense_weight(layout, [t.double() for t in operands]).to(dtype)
        # The dense product's weight is its own: it is not charged with the rounding of the sum of both parts.
        x, bias = operands[0], operands[4]
        product = torch.nn.functional.linear(x, weight.mT if transposed else weight, bias)
        full = weight.double() if transposed else weight.double().mT
        reference = error(product, x.double() @ full + bias.double())
        assert error(run(layout, operands, transposed), exact) <= 1.5 * reference + 1e-5


def test_without_low_rank_bias_and_gamma(device, poisoned):
    layout = LAYOUTS["random"]().to(device)
    operands = make(layout, 37, torch.float32, device)
    x, values = leaves(operands[:2])
    exact_x, exact_values = leaves(operands[:2], torch.float64)
    y = block_sparse(x, values, layout, gamma=-1.5, backend="triton")
    expected = -1.5 * exact_x @ to_dense(exact_values, layout).mT
    assert error(y, expected) <= 5e-6
    assert not y[:, -16:].any()  # an empty row is written
    y.square().sum().backward()
    expected.square().sum().backward()
    assert error(x.grad, exact_x.grad) <= 5e-6 and error(values.grad, exact_values.grad) <= 5e-6
    zero = block_sparse(x, values, layout, u=operands[2], v=operands[3], gamma=0.0, backend="triton")
    assert error(zero, operands[0].double() @ (operands[2].double() @ operands[3].double()).mT) <= 5e-6


def test_cropped_entries_are_ignored(device):
    layout = LAYOUTS["cropped"]().to(device)
    operands = make(layout, 37, torch.float32, device)
    clean = run(layout, operands)
    t = layout.tables
    o, i = torch.arange(16, device=device)[:, None], torch.arange(16, device=device)
    outside = (t.rows[:, None, None] * 16 + o >= 37) | (t.columns[:, None, None] * 16 + i >= 79)
    assert outside.any()
    values = operands[1].masked_fill(outside, float("nan"))
    y = run(layout, [operands[0], values, *operands[2:]])
    assert torch.equal(y, clean)
    leaf = operands[1].clone().requires_grad_()
    run(layout, [operands[0], leaf, *operands[2:]]).sum().backward()
    assert not leaf.grad[outside].any()


@pytest.mark.parametrize("name", ["random", "supers"])
def test_spans_of_tokens_are_added(device, name, monkeypatch, poisoned):
    """Many spans give the gradient of one, and long tiles that of short ones."""
    layout = LAYOUTS[name]().to(device)
    x, values = make(layout, 150, torch.float32, device)[:2]
    grad = torch.randn(1, 150, layout.shape[0], generator=torch.Generator().manual_seed(2)).to(device)
    leaf = values.double().requires_grad_()
    sampled = (to_dense(leaf, layout) * (grad[0].double().mT @ x.double())).sum()
    (expected,) = torch.autograd.grad(sampled, leaf)
    none = x.new_empty(1, 0)
    for splits, pack in ((1, 1), (3, 2), (2, 4)):
        config = {"pack": pack, "block_k": 32, "num_warps": 4, "num_stages": 2, "splits": splits}
        args = (grad, x[None], values[None], none, layout.table, *layout.coarsening, layout.longest, 1.0, torch.float32)
        assert error(launch.sampled(*args, config=config)[0], expected) <= 5e-6


@pytest.mark.parametrize("block_t", [16, 128])
@pytest.mark.parametrize("block_k", [16, 32])
def test_configurations(device, block_t, block_k):
    layout = LAYOUTS["supers"]().to(device)
    operands = make(layout, 70, torch.float32, device)
    x, values, u, v, bias, gamma = [t[None] for t in operands]
    config = {"block_t": block_t, "block_k": block_k, "num_warps": 4, "num_stages": 2}
    args = (
        x,
        values,
        u,
        v,
        bias,
        gamma[None],
        layout.table,
        *layout.shape,
        *layout.coarsening,
        layout.longest,
        1.0,
        False,
    )
    got = launch.product(*args, config=config)
    assert error(got[0], dense(layout, [t.double() for t in operands])) <= 5e-6


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("name", ["random", "cropped", "diagonal"])
def test_low_rank_in_one_launch(device, name, transposed, poisoned):
    layout = LAYOUTS[name]().to(device)
    for rank, parts, ahead in ((8, 1, 1), (64, 3, 2), (100, 2, 9)):
        operands = make(layout, 70, torch.float32, device, rank=rank, transposed=transposed)
        x, values, u, v, bias, gamma = [t[None] for t in operands]
        config = {"block_t": 32, "block_k": 16, "num_warps": 4, "num_stages": 3, "parts": parts, "ahead": ahead}
        args = (
            x,
            values,
            u,
            v,
            bias,
            gamma[None],
            layout.table,
            *layout.shape,
            *layout.coarsening,
            layout.longest,
            1.0,
            transposed,
        )
        got = launch.product(*args, config=config)
        assert error(got[0], dense(layout, [t.double() for t in operands], transposed)) <= 5e-6
        if device == "cuda":
            assert all(torch.equal(got, launch.product(*args, config=config)) for _ in range(20))


@pytest.mark.parametrize("name", ["random", "supers"])
def test_batches_and_strides(device, name, poisoned):
    layout = LAYOUTS[name]().to(device)
    operands = make(layout, 5, torch.float32, device, batch=(2, 3))
    expected = dense(layout, [t.double() for t in operands])
    assert error(run(layout, operands), expected) <= 5e-6
    # factors without a batch: x's goes into the tokens
    single = [operands[0], *(t[0, 0] for t in operands[1:5]), operands[5]]
    assert error(run(layout, single), dense(layout, [t.double() for t in single])) <= 5e-6
    # a batch on values only, and a gamma for each
    gamma = torch.tensor([0.5, -1.0, 2.0], device=device).requires_grad_()
    got = block_sparse(operands[0][0, 0], operands[1][0], layout, gamma=gamma, backend="triton")
    b = to_dense(operands[1][0].double(), layout)
    product = operands[0][0, 0].double() @ b.mT
    assert error(got, gamma[:, None, None] * product) <= 5e-6
    got.sum().backward()
    assert error(gamma.grad, product.sum((1, 2))) <= 5e-6
    # strides: transposed features, skipped tokens, one token and one output gradient for all
    x = single[0][0, 0]
    for view in (x.mT.contiguous().mT, x.repeat_interleave(2, 0)[::2], x[:1].expand(7, -1)):
        leaf = view.detach().requires_grad_()
        y = run(layout, [leaf, *single[1:]])
        assert error(y, dense(layout, [t.double() for t in [view, *single[1:]]])) <= 5e-6
        y.sum().backward()
        weight = dense_weight(layout, [t.double() for t in single])
        assert error(leaf.grad, weight.sum(0).expand(view.shape)) <= 5e-6


def test_only_wanted_gradients(device):
    layout = LAYOUTS["random"]().to(device)
    operands = make(layout, 37, torch.float32, device)
    expected = torch.autograd.grad(dense(layout, exact := leaves(operands, torch.float64)).square().sum(), exact)
    for i in range(6):
        mine = [t.clone().requires_grad_(i == j) for j, t in enumerate(operands)]
        (got,) = torch.autograd.grad(run(layout, mine).square().sum(), mine[i])
        assert error(got, expected[i]) <= 1e-5, NAMES[i]


@pytest.mark.parametrize("transposed", [False, True])
def test_second_derivatives_and_forward_mode(device, transposed):
    layout = LAYOUTS["cropped"]().to(device)
    operands = make(layout, 5, torch.float32, device, transposed=transposed)

    def second(function, tensors):
        first = torch.autograd.grad(function(tensors).sin().sum(), tensors, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), tensors)

    got = second(lambda ts: run(layout, ts, transposed), leaves(operands))
    expected = second(lambda ts: dense(layout, ts, transposed), leaves(operands, torch.float64))
    for name, a, b in zip(NAMES, got, expected, strict=True):
        assert error(a, b) <= 1e-5, name
    tangents = tuple(torch.ones_like(t) for t in operands)
    _, mine = torch.func.jvp(lambda *ts: run(layout, ts, transposed), tuple(operands), tangents)
    exact = tuple(t.double() for t in operands)
    _, right = torch.func.jvp(lambda *ts: dense(layout, ts, transposed), exact, tuple(t.double() for t in tangents))
    assert error(mine, right) <= 5e-6


def test_vmap(device):
    layout = LAYOUTS["supers"]().to(device)
    operands = make(layout, 5, torch.float32, device, batch=(3,))
    exact = [t.double() for t in operands]
    gamma = operands[5]

    def call(x, values, u, v, bias):
        return run(layout, [x, values, u, v, bias, gamma])

    got = torch.func.vmap(call)(*operands[:5])
    assert error(got, dense(layout, exact)) <= 5e-6
    # weights shared, inputs mapped over their second dimension: per-sample gradients
    shared = [t[0] for t in operands[1:5]]
    grads = torch.func.vmap(torch.func.grad(lambda x, w: call(x, w, *shared[1:]).square().sum(), argnums=1),
                            in_dims=(1, None))(operands[0].transpose(0, 1), shared[0])  # fmt: skip
    for i in range(3):
        leaf = shared[0].double().requires_grad_()
        y = dense(layout, [exact[0][i], leaf, *(t.double() for t in shared[1:]), exact[5]])
        (expected,) = torch.autograd.grad(y.square().sum(), leaf)
        assert error(grads[i], expected) <= 1e-5


@pytest.mark.parametrize("transposed", [False, True])
def test_compile(device, transposed):
    torch._dynamo.reset()
    layout = LAYOUTS["supers"]().to(device)
    operands = make(layout, 5, torch.float32, device, transposed=transposed)
    eager, compiled = leaves(operands), leaves(operands)
    f = torch.compile(lambda ts: run(layout, ts, transposed), fullgraph=True, backend="aot_eager")
    y, z = run(layout, eager, transposed), f(compiled)
    assert torch.equal(y, z)
    y.square().sum().backward()
    z.square().sum().backward()
    for a, b in zip(eager, compiled, strict=True):
        assert torch.equal(a.grad, b.grad)


@pytest.mark.parametrize("name", ["cropped", "supers"])
def test_opcheck(device, name):
    layout = LAYOUTS[name]().to(device)
    x, values, u, v, bias, gamma = [t[None] for t in make(layout, 5, torch.float32, device)]
    args = (
        x,
        values,
        u,
        v,
        bias,
        gamma[None],
        layout.table,
        *layout.shape,
        *layout.coarsening,
        layout.longest,
        0.5,
        False,
    )
    torch.library.opcheck(op._op, args)
    grad = torch.randn_like(run(layout, [t[0] for t in (x, values, u, v, bias, gamma)]))[None]
    torch.library.opcheck(op._backward, (grad, *args, [True, False, True, True, False, True]))


@pytest.mark.parametrize("name", LAYOUTS)
def test_reference_is_the_dense_product(name):
    layout = LAYOUTS[name]()
    for transposed in (False, True):
        operands = leaves(make(layout, 3, torch.float64, transposed=transposed))
        expected = dense(layout, operands, transposed)
        got = run(layout, operands, transposed, backend="torch")
        assert error(got, expected.detach()) <= 1e-12
        a = torch.autograd.grad(got.sin().sum(), operands)
        b = torch.autograd.grad(expected.sin().sum(), operands)
        assert all(error(p, q) <= 1e-12 for p, q in zip(a, b, strict=True))


@pytest.mark.parametrize("name", LAYOUTS)
def test_tables(name):
    layout = LAYOUTS[name]()
    mb, nb = layout.grid
    coarse = layout.super_tables
    for t, grid in [(layout.tables, (mb, nb))] + ([(coarse, None)] if coarse else []):
        rows, columns = t.rows.long(), t.columns.long()
        height, width = grid or (t.row_offsets.shape[0] - 1, t.column_offsets.shape[0] - 1)
        order = rows * width + columns
        assert torch.equal(order, order.sort().values) and order.unique().shape == order.shape
        assert torch.equal(t.row_offsets.diff().long(), torch.bincount(rows, minlength=height))
        assert torch.equal(t.column_offsets.diff().long(), torch.bincount(columns, minlength=width))
        assert torch.equal(t.csc_rows, t.rows[t.csc_positions.long()])
        by_column = columns[t.csc_positions.long()] * height + t.csc_rows
        assert torch.equal(by_column, by_column.sort().values)
    if coarse:
        qo, qi = layout.coarsening
        members = coarse.members.reshape(-1, qo, qi)
        held = members[members >= 0].sort().values
        assert torch.equal(held, torch.arange(layout.nnz, dtype=torch.int32))
        place, a, b = (members >= 0).nonzero(as_tuple=True)
        number = members[place, a, b].long()
        assert torch.equal(coarse.rows[place] * qo + a, layout.tables.rows[number])
        assert torch.equal(coarse.columns[place] * qi + b, layout.tables.columns[number])


def test_super_blocks_are_chosen_where_they_pay():
    def chosen(mask, block):
        return BlockLayout.from_mask(mask, block).coarsening

    full = torch.ones(8, 8, dtype=torch.bool)
    assert chosen(full, 32) == (4, 4) and chosen(full, 64) == (2, 2) and chosen(full, 128) == (1, 1)
    assert chosen(torch.kron(random_mask(8, 8), torch.ones(4, 4)).bool(), 32) == (4, 4)
    assert chosen(torch.eye(16, dtype=torch.bool), 32) == (1, 1)
    assert chosen(random_mask(64, 64, 1 / 8), 64) == (1, 1)
    assert chosen(torch.zeros(2, 2, dtype=torch.bool), 32) == (1, 1)


def test_flat_butterfly_mask():
    mask = flat_butterfly_mask(8, 8)
    i = torch.arange(8)
    expected = torch.stack([(i[:, None] ^ i) == s for s in (0, 1, 2, 4)]).any(0)
    assert torch.equal(mask, expected)
    assert torch.equal(flat_butterfly_mask(8, 8, max_stride=1), torch.eye(8, dtype=torch.bool))
    assert torch.equal(flat_butterfly_mask(4, 4, max_stride=2), torch.kron(torch.eye(2), torch.ones(2, 2)).bool())
    stretched = flat_butterfly_mask(4, 8, max_stride=4)
    assert torch.equal(stretched, flat_butterfly_mask(8, 8, max_stride=4).reshape(4, 2, 8).any(1))
    for mb, nb in ((1, 1), (3, 7), (12, 5), (1, 9)):
        m = flat_butterfly_mask(mb, nb)
        assert m.shape == (mb, nb) and m.any(0).all() and m.any(1).all()
    with pytest.raises(ValueError, match="max_stride must be a power of two from 1 to 8"):
        flat_butterfly_mask(8, 5, max_stride=6)


def test_errors():
    mask = random_mask(3, 4)
    with pytest.raises(TypeError, match="mask must be a bool tensor"):
        BlockLayout.from_mask(mask.int(), 16)
    with pytest.raises(ValueError, match=r"mask must be \(mb, nb\)"):
        BlockLayout.from_mask(mask[0], 16)
    with pytest.raises(ValueError, match="block must be positive"):
        BlockLayout.from_mask(mask, (0, 16))
    with pytest.raises(ValueError, match="shape must be within"):
        BlockLayout.from_mask(mask, 16, shape=(32, 64))
    with pytest.raises(ValueError, match="super-blocks of at most 128"):
        BlockLayout.from_mask(mask, 64, coarsening=4)
    layout = BlockLayout.from_mask(mask, 16)
    assert layout == layout and hash(layout) != hash(layout.to("cpu"))
    x, values, u, v, bias, _ = make(layout, 3, torch.float32)
    with pytest.raises(ValueError, match=r"x must be \(\*batch, tokens, 64\)"):
        block_sparse(x[:, :-1], values, layout)
    with pytest.raises(ValueError, match="values must be"):
        block_sparse(x, values[1:], layout)
    with pytest.raises(ValueError, match="u and v must be given together"):
        block_sparse(x, values, layout, u=u)
    with pytest.raises(ValueError, match=r"u must be \(\*batch, 48, r\)"):
        block_sparse(x, values, layout, u=u[1:], v=v)
    with pytest.raises(ValueError, match=r"v must be \(\*batch, 8, 64\)"):
        block_sparse(x, values, layout, u=u, v=v[1:])
    with pytest.raises(ValueError, match=r"bias must be \(\*batch, 48\)"):
        block_sparse(x, values, layout, bias=bias[1:])
    with pytest.raises(TypeError, match="values must have x's dtype"):
        block_sparse(x, values.half(), layout)
    with pytest.raises(ValueError, match="layout must be on x's device"):
        block_sparse(x, values, layout.to("meta"))
    with pytest.raises(ValueError, match="at most 128"):
        large = BlockLayout.from_mask(torch.tensor([[True]]), 130)
        block_sparse(torch.zeros(1, 130), torch.zeros(1, 130, 130), large, backend="triton")


@pytest.mark.gpu
def test_graph_stream_and_repetition():
    layout = BlockLayout.from_mask(flat_butterfly_mask(8, 8), 32).to("cuda")
    values = make(layout, 2500, torch.bfloat16, "cuda", rank=16)

    def step():
        operands = leaves(values)  # of the current stream, which a captured gradient waits for
        y = run(layout, operands)
        return (y, *torch.autograd.grad(y.sum(), operands))

    expected = step()
    again = step()
    assert all(torch.equal(a, b) for a, b in zip(expected, again, strict=True))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        elsewhere = step()
    torch.cuda.current_stream().wait_stream(stream)
    assert all(torch.equal(a, b) for a, b in zip(expected, elsewhere, strict=True))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for t in captured:
        t.detach().fill_(float("nan"))
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(expected, captured, strict=True))


@pytest.mark.gpu
def test_offsets_beyond_32_bits():
    layout = BlockLayout.from_mask(torch.eye(32, dtype=torch.bool), 128).to("cuda")
    tokens = 2**19 + 300  # 2^31 elements and some, at n = 4096
    x = torch.empty(tokens, 4096, dtype=torch.bfloat16, device="cuda").normal_()
    values = make(layout, 1, torch.bfloat16, "cuda")[1].requires_grad_()
    y = block_sparse(x, values, layout, backend="triton")
    tail = slice(tokens - 500, tokens)
    expected = dense_tail = x[tail].double() @ to_dense(values.double(), layout).mT
    assert error(y[tail], dense_tail) <= 1e-2
    cotangent = torch.zeros_like(y)
    cotangent[tail] = 1
    (gradient,) = torch.autograd.grad(y, values, cotangent)
    (right,) = torch.autograd.grad(expected.sum(), values)
    assert error(gradient, right) <= 1e-2
