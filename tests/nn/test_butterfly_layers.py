"""Butterfly layers beyond what every layer is tested for."""

import pytest
import torch
from torch import nn

from structmat import Butterfly, Monarch, surgery
from structmat.nn import ButterflyLinear, OrthogonalButterflyLinear, StructuredLinear, parameter_groups
from structmat.testing import assert_close


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize(
    ("size", "dtype"), [((8, 8), torch.float32), ((6, 6), torch.complex64), ((15, 4), torch.float32)], ids=str
)
def test_orthogonal_stays_orthogonal(size, dtype):
    """Rows or columns, after 1000 steps of Adam towards a matrix that is not."""
    layer = OrthogonalButterflyLinear(*size, bias=False, dtype=dtype)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.05)
    target = torch.randn(size[1], size[0], dtype=dtype)
    first = last = None
    for _ in range(1000):
        loss = (layer.weight().to_dense() - target).abs().square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        last = loss.item()
        first = last if first is None else first
    assert last < 0.9 * first
    W = layer.weight().to_dense().detach()
    gram = W @ W.mH if size[1] <= size[0] else W.mH @ W
    assert (gram - torch.eye(len(gram))).abs().max() < 1e-5


@pytest.mark.parametrize(
    "make",
    [
        lambda: ButterflyLinear(24, 36),
        lambda: ButterflyLinear(10, 12, nblocks=3, increasing_stride=False),
        lambda: OrthogonalButterflyLinear(12, 12),
    ],
)
def test_every_parameter_changes_in_one_step(make):
    layer = make()
    before = {name: p.detach().clone() for name, p in layer.named_parameters()}
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    layer(torch.randn(50, layer.in_features)).square().mean().backward()
    optimizer.step()
    for name, p in layer.named_parameters():
        changed = p != before[name]
        if "generators" in name:  # an exponential's generator: all but the diagonals, which it does not use
            changed |= torch.eye(p.shape[-2], dtype=torch.bool)[:, :, None]
        assert changed.all(), name


@pytest.mark.parametrize("width", [1, 2, 3, 4])
@pytest.mark.parametrize("size", [(8, 64), (64, 8), (1000, 1000)], ids=str)
def test_output_variance_at_every_number_of_blocks(size, width):
    """That of nn.Linear: over many draws, for the squares of products of many factors have heavy tails."""
    draws = 4000 if size[0] < 100 else 4
    layer = ButterflyLinear(*size, bias=False, nblocks=width)
    B = Butterfly.random((draws, size[1], size[0]), nblocks=width)
    assert layer.weight().patterns == B.patterns
    variance = B.to_dense().square().sum(-1).mean().item()  # of outputs of inputs from N(0, 1)
    assert abs(3 * variance - 1) < 0.1


def test_a_fast_transform_is_learned_from_samples():
    """The Hadamard transform of size 8, from random pairs."""
    n = 8
    H = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    dense = torch.kron(H, torch.kron(H, H)) / n**0.5
    layer = ButterflyLinear(n, n, bias=False)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.02)
    for _ in range(1000):
        x = torch.randn(32, n)
        loss = (layer(x) - x @ dense.mT).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert_close(layer.weight().to_dense(), dense.double(), 1e-2)


def test_factors_are_not_decayed():
    model = nn.Sequential(ButterflyLinear(6, 6), nn.LayerNorm(6), nn.Linear(6, 4), nn.Linear(4, 4))
    model[3].requires_grad_(False)
    decayed, others = parameter_groups(model, 0.3)
    assert decayed["params"] == [model[2].weight] and decayed["weight_decay"] == 0.3
    assert {id(p) for p in others["params"]} == {
        id(p) for p in model.parameters() if p is not model[2].weight and p.requires_grad
    }
    assert others["weight_decay"] == 0


def test_a_layer_computes_with_its_butterfly():
    layer = ButterflyLinear(30, 12, nblocks=2, dtype=torch.float64)
    x = torch.randn(3, 30, dtype=torch.float64)
    assert_close(layer(x), x @ layer.weight().to_dense().mT + layer.bias)
    with pytest.raises(ValueError, match="nblocks must be at least 1"):
        ButterflyLinear(4, 4, nblocks=0)


# ---------------------------------------------------------------- batches of matrices
BATCHED = {
    "butterfly": lambda **kw: ButterflyLinear(10, 12, matrix_batch=3, **kw),
    "blocks": lambda **kw: ButterflyLinear(7, 12, nblocks=2, pad=True, increasing_stride=False, matrix_batch=3, **kw),
    "one": lambda **kw: ButterflyLinear(1, 1, matrix_batch=1, **kw),
    "orthogonal": lambda **kw: OrthogonalButterflyLinear(12, 8, matrix_batch=2, **kw),
    "monarch": lambda bias=True, **kw: StructuredLinear(Monarch.random((3, 8, 12), 2, **kw), bias),
}
batched = pytest.mark.parametrize("make", BATCHED.values(), ids=BATCHED)


@batched
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
def test_a_batch_is_so_many_layers(make, dtype):
    layer = make(dtype=dtype)
    W, b, N = layer.weight().to_dense(), layer.bias, layer.matrix_batch
    assert W.shape == (N, layer.out_features, layer.in_features) and b.shape == W.shape[:-1]
    for lead in [(), (0,), (5,), (2, 3)]:
        x = torch.randn(*lead, N, layer.in_features, dtype=dtype)
        y = layer(x)
        assert y.shape == (*lead, N, layer.out_features)
        for i in range(N):
            assert_close(y[..., i, :], x[..., i, :] @ W[i].mT + b[i])
    bare = make(bias=False, dtype=dtype)
    assert bare.bias is None
    x = torch.randn(N, 4, layer.in_features, dtype=dtype).transpose(0, 1)
    assert_close(bare(x), torch.einsum("tni,noi->tno", x, bare.weight().to_dense()))


@batched
def test_a_batch_trains_compiles_and_casts(make):
    layer = make()
    x = torch.randn(50, layer.matrix_batch, layer.in_features)
    before = {name: p.detach().clone() for name, p in layer.named_parameters()}
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    torch.compiler.reset()
    y = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    assert_close(y, layer(x))
    y.square().mean().backward()
    optimizer.step()
    assert all((p != before[name]).any() for name, p in layer.named_parameters())
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    assert_close(layer.bfloat16()(x.bfloat16()), layer.double()(x.double()))
    assert f"matrix_batch={layer.matrix_batch}" in repr(layer)
    decayed, others = parameter_groups(layer, 0.1)
    assert decayed["params"] == [] and len(others["params"]) == len(before)


@pytest.mark.parametrize("size", [(8, 64), (64, 8)], ids=str)
@pytest.mark.parametrize("width", [1, 2, 4])
def test_output_variance_of_a_batch(size, width):
    layer = ButterflyLinear(*size, bias=False, nblocks=width, matrix_batch=4000)
    variance = layer(torch.randn(16, 4000, size[0])).square().mean().item()
    assert abs(3 * variance - 1) < 0.1


def test_a_batch_is_kept_by_surgery(tmp_path):
    model = nn.Sequential(ButterflyLinear(6, 4, matrix_batch=2), nn.Linear(4, 4), ButterflyLinear(4, 4))
    report = surgery.densify_(model)
    assert [row.skipped for row in report.rows] == ["it holds a batch of 2 matrices, which nn.Linear cannot", None]
    assert model[0].matrix_batch == 2 and type(model[2]) is nn.Linear
    surgery.save_file(model, tmp_path / "model.safetensors")
    twin = nn.Sequential(ButterflyLinear(6, 4, matrix_batch=2), nn.Linear(4, 4), nn.Linear(4, 4))
    surgery.load_file(twin, tmp_path / "model.safetensors")
    x = torch.randn(5, 2, 6)
    assert torch.equal(twin(x), model(x))


# ---------------------------------------------------------------- complex weights, and where they start
@pytest.mark.parametrize("size", [(8, 64), (64, 8), (30, 30)], ids=str)
def test_complex_layers(size):
    """Variance of outputs of inputs of modulus 1 as that of nn.Linear; a step of an optimiser moves both parts."""
    layer = ButterflyLinear(*size, dtype=torch.complex64)
    assert layer.bias.is_complex() and layer.bias.imag.abs().max() > 0
    x = torch.randn(16, size[0], dtype=torch.complex64)
    assert_close(layer(x), x.to(torch.complex128) @ layer.weight().to_dense().mT.to(torch.complex128) + layer.bias)
    many = ButterflyLinear(*size, bias=False, dtype=torch.complex64, matrix_batch=2000)
    variance = many(torch.randn(8, 2000, size[0], dtype=torch.complex64)).abs().square().mean().item()
    assert abs(3 * variance - 1) < 0.1
    target, losses = torch.randn(16, size[1], dtype=torch.complex64), []
    before = [p.detach().clone() for p in layer.parameters()]
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
    for _ in range(30):
        loss = (layer(x) - target).abs().square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    for p, old in zip(layer.parameters(), before, strict=True):
        assert (p.real != old.real).all() and (p.imag != old.imag).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("size", "structure"),
    [((16, 16), {}), ((12, 12), {"nblocks": 3}), ((8, 64), {}), ((64, 8), {"nblocks": 2}), ((1, 1), {})],
    ids=str,
)
def test_orthogonal_start(size, structure, dtype):
    for batch in (None, 3):
        layer = ButterflyLinear(*size, dtype=dtype, init="orthogonal", matrix_batch=batch, **structure)
        for _ in range(2):
            W = layer.weight().to_dense().detach().to(torch.complex128)
            gram = W @ W.mH if size[1] <= size[0] else W.mH @ W
            tol = {torch.float64: 1e-12, torch.complex64: 1e-5, torch.bfloat16: 5e-2}[dtype]
            assert_close(gram, torch.eye(min(size)).expand(gram.shape), tol)
            layer.reset_parameters()
            assert min(size) == 1 or not torch.equal(layer.weight().to_dense().to(W), W)


@pytest.mark.parametrize("structure", [{}, {"nblocks": 4}, {"increasing_stride": False}, {"pad": True}], ids=str)
def test_identity_start(structure):
    for n, batch in [(12, None), (7, 2), (1, None)]:
        layer = ButterflyLinear(n, n, bias=False, init="identity", matrix_batch=batch, dtype=torch.float64, **structure)
        x = torch.randn(5, *(() if batch is None else (batch,)), n, dtype=torch.float64)
        assert torch.equal(layer(x), x)
        layer.weight().randomize_()
        layer.reset_parameters()
        assert torch.equal(layer(x), x)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: ButterflyLinear(8, 8, init="zero"), '"random", "orthogonal" or "identity", got \'zero\''),
        (lambda: ButterflyLinear(8, 4, init="identity"), "square"),
        (lambda: ButterflyLinear(8, 8, init="identity", radices=[(2, 4), (4, 2)]), "square blocks"),
        (lambda: ButterflyLinear(8, 8, init="orthogonal", radices=[(2, 4), (4, 2)]), "OrthogonalButterflyLinear"),
        (lambda: ButterflyLinear(7, 7, init="orthogonal", pad=True), "no padding"),
        (lambda: ButterflyLinear(8, 8, matrix_batch=0), "matrix_batch must be at least 1"),
        (lambda: ButterflyLinear(8, 8, matrix_batch=2)(torch.ones(3, 8)), r"x must have shape \(\*, 2, 8\)"),
        (lambda: ButterflyLinear(8, 8, matrix_batch=2)(torch.ones(8)), "at least 2 dimensions"),
        (lambda: StructuredLinear(Butterfly.random((2, 4, 4)), torch.ones(4)), r"bias must have shape \(2, 4\)"),
    ],
)
def test_errors(make, text):
    with pytest.raises(ValueError, match=text):
        make()
