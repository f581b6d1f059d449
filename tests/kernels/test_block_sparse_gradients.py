"""Derivatives of block-sparse products: of some operands, of batches, of second order, mapped, compiled."""

import dataclasses
import functools

import pytest
import torch

from structmat.testing import relative_error
from structmat_kernels.block_sparse import BlockLayout, block_sparse, to_dense


@pytest.mark.parametrize("layout", ["random"], indirect=True)
def test_without_low_rank_bias_and_gamma(device, layout, sparse, poisoned):
    layout = layout.to(device)
    operands = sparse.operands(layout, 37, torch.float32, device)
    x, values = sparse.leaves(operands[:2])
    exact_x, exact_values = sparse.leaves(operands[:2], torch.float64)
    y = block_sparse(x, values, layout, gamma=-1.5, backend="triton")
    expected = -1.5 * exact_x @ to_dense(exact_values, layout).mT
    assert relative_error(y, expected) <= 5e-6
    assert not y[:, -16:].any()  # an empty row is written
    y.square().sum().backward()
    expected.square().sum().backward()
    assert relative_error(x.grad, exact_x.grad) <= 5e-6 and relative_error(values.grad, exact_values.grad) <= 5e-6
    zero = block_sparse(x, values, layout, u=operands[2], v=operands[3], gamma=0.0, backend="triton")
    assert relative_error(zero, operands[0].double() @ (operands[2].double() @ operands[3].double()).mT) <= 5e-6


@pytest.mark.parametrize("layout", ["random", "supers"], indirect=True)
def test_batches_and_strides(device, layout, sparse, poisoned):
    layout = layout.to(device)
    operands = sparse.operands(layout, 5, torch.float32, device, batch=(2, 3))
    expected = sparse.dense(layout, [t.double() for t in operands])
    assert relative_error(sparse.run(layout, operands), expected) <= 5e-6
    # factors without a batch: x's goes into the tokens
    single = [operands[0], *(t[0, 0] for t in operands[1:5]), operands[5]]
    assert relative_error(sparse.run(layout, single), sparse.dense(layout, [t.double() for t in single])) <= 5e-6
    # a batch on values only, and a gamma for each
    gamma = torch.tensor([0.5, -1.0, 2.0], device=device).requires_grad_()
    got = block_sparse(operands[0][0, 0], operands[1][0], layout, gamma=gamma, backend="triton")
    b = to_dense(operands[1][0].double(), layout)
    product = operands[0][0, 0].double() @ b.mT
    assert relative_error(got, gamma[:, None, None] * product) <= 5e-6
    got.sum().backward()
    assert relative_error(gamma.grad, product.sum((1, 2))) <= 5e-6
    # strides: transposed features, skipped tokens, one token and one output gradient for all
    x = single[0][0, 0]
    for view in (x.mT.contiguous().mT, x.repeat_interleave(2, 0)[::2], x[:1].expand(7, -1)):
        leaf = view.detach().requires_grad_()
        y = sparse.run(layout, [leaf, *single[1:]])
        assert relative_error(y, sparse.dense(layout, [t.double() for t in [view, *single[1:]]])) <= 5e-6
        y.sum().backward()
        weight = sparse.weight(layout, [t.double() for t in single])
        assert relative_error(leaf.grad, weight.sum(0).expand(view.shape)) <= 5e-6


@pytest.mark.parametrize("layout", ["random"], indirect=True)
def test_only_wanted_gradients(device, layout, sparse):
    layout = layout.to(device)
    operands = sparse.operands(layout, 37, torch.float32, device)
    expected = torch.autograd.grad(
        sparse.dense(layout, exact := sparse.leaves(operands, torch.float64)).square().sum(), exact
    )
    for i in range(6):
        mine = [t.clone().requires_grad_(i == j) for j, t in enumerate(operands)]
        (got,) = torch.autograd.grad(sparse.run(layout, mine).square().sum(), mine[i])
        assert relative_error(got, expected[i]) <= 1e-5, sparse.NAMES[i]


@pytest.mark.parametrize("layout", ["cropped"], indirect=True)
@pytest.mark.parametrize("transposed", [False, True])
def test_second_derivatives_and_forward_mode(device, layout, sparse, transposed):
    layout = layout.to(device)
    operands = sparse.operands(layout, 5, torch.float32, device, transposed=transposed)

    def second(function, tensors):
        first = torch.autograd.grad(function(tensors).sin().sum(), tensors, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), tensors)

    got = second(lambda ts: sparse.run(layout, ts, transposed), sparse.leaves(operands))
    expected = second(lambda ts: sparse.dense(layout, ts, transposed), sparse.leaves(operands, torch.float64))
    for name, a, b in zip(sparse.NAMES, got, expected, strict=True):
        assert relative_error(a, b) <= 1e-5, name
    tangents = tuple(torch.ones_like(t) for t in operands)
    _, mine = torch.func.jvp(lambda *ts: sparse.run(layout, ts, transposed), tuple(operands), tangents)
    exact = tuple(t.double() for t in operands)
    _, right = torch.func.jvp(
        lambda *ts: sparse.dense(layout, ts, transposed), exact, tuple(t.double() for t in tangents)
    )
    assert relative_error(mine, right) <= 5e-6


@pytest.mark.parametrize("layout", ["supers"], indirect=True)
def test_vmap(device, layout, sparse):
    layout = layout.to(device)
    operands = sparse.operands(layout, 5, torch.float32, device, batch=(3,))
    exact = [t.double() for t in operands]
    gamma = operands[5]

    def call(x, values, u, v, bias):
        return sparse.run(layout, [x, values, u, v, bias, gamma])

    got = torch.func.vmap(call)(*operands[:5])
    assert relative_error(got, sparse.dense(layout, exact)) <= 5e-6
    # weights shared, inputs mapped over their second dimension: per-sample gradients
    shared = [t[0] for t in operands[1:5]]
    grads = torch.func.vmap(torch.func.grad(lambda x, w: call(x, w, *shared[1:]).square().sum(), argnums=1),
                            in_dims=(1, None))(operands[0].transpose(0, 1), shared[0])  # fmt: skip
    for i in range(3):
        leaf = shared[0].double().requires_grad_()
        y = sparse.dense(layout, [exact[0][i], leaf, *(t.double() for t in shared[1:]), exact[5]])
        (expected,) = torch.autograd.grad(y.square().sum(), leaf)
        assert relative_error(grads[i], expected) <= 1e-5


@pytest.mark.parametrize("layout", ["supers"], indirect=True)
@pytest.mark.parametrize("transposed", [False, True])
def test_compile(device, layout, sparse, transposed):
    torch._dynamo.reset()
    layout = layout.to(device)
    operands = sparse.operands(layout, 5, torch.float32, device, transposed=transposed)
    eager, compiled = sparse.leaves(operands), sparse.leaves(operands)
    f = torch.compile(lambda ts: sparse.run(layout, ts, transposed), fullgraph=True, backend="aot_eager")
    y, z = sparse.run(layout, eager, transposed), f(compiled)
    assert torch.equal(y, z)
    y.square().sum().backward()
    z.square().sum().backward()
    for a, b in zip(eager, compiled, strict=True):
        assert torch.equal(a.grad, b.grad)


def test_vmap_over_tables(device):
    """Matrices of different patterns with equally many blocks are stacked with their tables."""
    masks = [torch.eye(4, dtype=torch.bool), torch.eye(4, dtype=torch.bool).flip(0)]
    layouts = [BlockLayout.from_mask(mask, 16).to(device) for mask in masks]
    generator = torch.Generator().manual_seed(0)
    x, values = (torch.randn(2, *s, generator=generator).to(device) for s in ((3, 64), (4, 16, 16)))

    def loss(values, x, table, backend):
        y = block_sparse(x, values, dataclasses.replace(layouts[0], table=table), backend=backend)
        return y.sin().sum(), y

    function = functools.partial(loss, backend="triton")
    mapped = torch.vmap(torch.func.grad(function, has_aux=True))
    grads, products = mapped(values, x, torch.stack([layout.table for layout in layouts]))
    for i, layout in enumerate(layouts):
        grad, y = torch.func.grad(functools.partial(loss, backend="torch"), has_aux=True)(values[i], x[i], layout.table)
        assert relative_error(products[i], y) <= 1e-6
        assert relative_error(grads[i], grad) <= 1e-6
