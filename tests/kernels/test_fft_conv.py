"""The long convolution kernels against the definition, entry by entry, and against the reference."""

import importlib

import pytest
import torch

from structmat.testing import relative_error
from structmat_kernels.fft_conv import fft_conv
from structmat_kernels.fft_conv import op as conv_op
from structmat_kernels.fft_conv.reference import fft_conv as reference

pytest.importorskip("triton")  # only that may be missing: an error in our own modules is no reason to skip
kernel = importlib.import_module("structmat_kernels.fft_conv.kernel")
half = importlib.import_module("structmat_kernels.fft_conv.half")
transforms = importlib.import_module("structmat_kernels.fft_conv.transforms")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
#: Of float16 arithmetic: about five roundings on the way. The interpreter truncates float32 to bfloat16.
BOUND = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 8e-3}
#: batch, channels, length, taps, taps behind
SIZES = [
    (1, 1, 1, 1, 0),
    (2, 3, 2, 5, 4),
    (3, 2, 37, 3, 0),
    (5, 1, 127, 127, 126),
    (4, 2, 129, 400, 300),
    (1, 2, 512, 512, 0),
    (7, 1, 600, 17, 599),
    (2, 1, 1025, 1025, 3),
    (3, 1, 2500, 2500, 2500),
]


def operands(batch, channels, length, taps, behind, dtype=torch.float64, device="cpu", seed=0):
    """u, k, k_rev, skip, pre_gate, post_gate; filters in float32 at least, decaying."""
    generator = torch.Generator().manual_seed(seed)
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    decay = torch.exp(-torch.arange(max(taps, behind, 1), dtype=torch.float64) / 40)
    given = [draw(batch, channels, length), draw(channels, taps) * decay[:taps]]
    given += [draw(channels, behind) * decay[:behind] if behind else None, draw(channels)]
    given += [draw(batch, channels, length), draw(batch, channels, length)]
    kinds = (dtype, wide, wide, wide, dtype, dtype)
    return [None if t is None else t.to(device, d) for t, d in zip(given, kinds, strict=True)]


def doubled(given):
    return [None if t is None else t.detach().double().requires_grad_() for t in given]


def by_entries(u, k, k_rev=None, skip=None, pre_gate=None, post_gate=None):
    """The definition, with a matrix for every channel."""
    x = u if pre_gate is None else u * pre_gate
    length = u.shape[-1]
    matrix = torch.zeros(u.shape[1], length, length, dtype=u.dtype)
    for t in range(length):
        for s in range(length):
            if s <= t < s + k.shape[1]:
                matrix[:, t, s] = k[:, t - s]
            elif k_rev is not None and t < s <= t + k_rev.shape[1]:
                matrix[:, t, s] = k_rev[:, s - t - 1]
    y = torch.einsum("cts,bcs->bct", matrix, x)
    y = y if skip is None else y + skip[:, None] * x
    return y if post_gate is None else y * post_gate


@pytest.mark.parametrize("sizes", SIZES[:5], ids=str)
def test_the_reference_is_the_definition(sizes):
    given = operands(*sizes)
    assert relative_error(reference(*given), by_entries(*given)) < 1e-13
    assert relative_error(reference(given[0], given[1]), by_entries(given[0], given[1])) < 1e-13


@pytest.mark.parametrize("points", transforms.RADICES)
def test_matrices_and_twiddles_make_a_transform(points):
    """Stage by stage in NumPy's way of thinking: the tables, in the order in which the kernels read them."""
    n1, n2, n3 = transforms.RADICES[points]
    assert n1 * n2 * n3 == points
    table = transforms.tables(points, torch.device("cpu")).double()
    sizes = [4 * n * n for n in (n1, n2, n3)] * 2 + [2 * points, 2 * points, 2 * n2 * n3, 2 * n2 * n3]
    f1, f2, f3, i1, i2, i3, first, _, second, _ = table.split(sizes)
    x = torch.randn(points, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def turned(rows, twiddles):
        return torch.view_as_real(torch.view_as_complex(rows) * torch.view_as_complex(twiddles))

    rows = x.view(n1, n2, n3, 2).permute(1, 2, 0, 3).reshape(n2 * n3, 2 * n1) @ f1.view(2 * n1, -1)
    rows = rows.view(n2, n3, n1, 2).permute(2, 1, 0, 3).contiguous()
    rows = turned(rows, first.view(n1, n3, n2, 2)).reshape(n1 * n3, 2 * n2) @ f2.view(2 * n2, -1)
    if n3 > 1:
        rows = rows.view(n1, n3, n2, 2).permute(0, 2, 1, 3).contiguous()
        rows = turned(rows, second.view(1, n2, n3, 2)).reshape(n1 * n2, 2 * n3) @ f3.view(2 * n3, -1)
    wanted = torch.fft.fft(torch.view_as_complex(x)).view(n3, n2, n1).permute(2, 1, 0).reshape(points)
    assert relative_error(torch.view_as_complex(rows.reshape(points, 2)), wanted) < 1e-6
    for n, ahead, back in ((n1, f1, i1), (n2, f2, i2), (n3, f3, i3)):
        identity = ahead.view(2 * n, 2 * n) @ back.view(2 * n, 2 * n)
        assert relative_error(identity, torch.eye(2 * n).double()) < 1e-6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("gates", [False, True])
def test_parity_on_poisoned_memory(sizes, dtype, gates, device, poisoned):
    given = operands(*sizes, dtype, device)[: 6 if gates else 4]
    wanted = reference(*doubled(given))
    found = fft_conv(*given, backend="triton")
    assert found.dtype == dtype
    assert relative_error(found, wanted) < BOUND[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES[1:], ids=str)
@pytest.mark.parametrize("gates", [False, True])
def test_gradients_on_poisoned_memory(sizes, dtype, gates, device, poisoned):
    given = operands(*sizes, dtype, device)[: 6 if gates else 4]
    leaves = [None if t is None else t.requires_grad_() for t in given]
    wide = doubled(given)
    direction = torch.randn(given[0].shape, generator=torch.Generator().manual_seed(9)).to(device, dtype)
    wanted = torch.autograd.grad(reference(*wide), [t for t in wide if t is not None], direction.double())
    y = fft_conv(*leaves, backend="triton")
    found = torch.autograd.grad(y, [t for t in leaves if t is not None], direction)
    for g, w, t in zip(found, wanted, [t for t in leaves if t is not None], strict=True):
        assert g.dtype == t.dtype and g.shape == t.shape
        if w.norm() > 0:
            # Of sums of very few products the relative error of a single one shows.
            assert relative_error(g, w) < (3 if w.numel() > 8 else 10) * BOUND[dtype]


@pytest.mark.parametrize("which", range(6))
def test_only_the_gradients_that_are_asked_for(which, device):
    given = operands(3, 2, 70, 70, 9, torch.float32, device)
    wide = doubled(given)
    leaves = [t.requires_grad_(i == which) for i, t in enumerate(given)]
    y = fft_conv(*leaves, backend="triton")
    (found,) = torch.autograd.grad(y.square().sum(), [leaves[which]])
    (wanted,) = torch.autograd.grad(reference(*wide).square().sum(), [wide[which]])
    assert relative_error(found, wanted) < 1e-5


def test_accurate_half_precision(device):
    given = operands(3, 2, 300, 300, 0, torch.float16, device)[:4]
    wanted = reference(*doubled(given))
    rounded = relative_error(wanted.half(), wanted)
    assert relative_error(fft_conv(*given, accurate=True, backend="triton"), wanted) < 1.1 * rounded
    assert relative_error(fft_conv(*given, backend="triton"), wanted) > 1.5 * rounded


def test_scales_of_neighbours_do_not_meet(device):
    """Sequences of very different sizes, side by side, keep their own accuracy; zeros stay zeros."""
    u, k, *_ = operands(6, 2, 200, 200, 0, torch.float32, device)
    sizes = torch.tensor([1e-7, 1e6, 0.0, 1.0, 1e30, 1e-30], device=device)[:, None, None]
    u = (u * sizes).bfloat16() if device == "cuda" else (u * sizes.clamp(1e-3, 1e3) * (sizes > 0)).half()
    y, wanted = fft_conv(u, k, backend="triton"), reference(u.double(), k.double())
    for found, row in zip(y, wanted, strict=True):
        assert (found == 0).all() if row.norm() == 0 else relative_error(found, row) < 5e-3


def test_views_and_strides(device):
    u, k, rev, skip, pre, post = operands(4, 3, 90, 90, 5, torch.float32, device)
    wanted = reference(u, k, rev, skip, pre, post)
    strided = u.mT.contiguous().mT
    wide = torch.stack([pre, post], 2)
    taps = torch.stack([k, k], -1)[..., 0]
    found = fft_conv(strided, taps, rev, skip, wide[:, :, 0], wide[:, :, 1], backend="triton")
    assert relative_error(found, wanted) < 2e-6
    assert relative_error(fft_conv(u[1:3], k, backend="triton"), reference(u[1:3], k)) < 2e-6
    assert (
        relative_error(fft_conv(u[:1].expand(4, -1, -1), k, backend="triton"), reference(u[:1], k).expand(4, 3, 90))
        < 2e-6
    )


@pytest.mark.parametrize("shape", [(0, 2, 5), (2, 0, 5), (2, 2, 0)])
def test_empty_operands(shape, device):
    u = torch.zeros(shape, device=device, requires_grad=True)
    k = torch.ones(shape[1], 3, device=device)
    y = fft_conv(u, k, backend="triton")
    assert y.shape == shape
    y.sum().backward()
    assert u.grad.shape == shape


def test_no_taps(device):
    u, k, _, skip, *_ = operands(2, 3, 20, 4, 0, torch.float32, device)
    assert relative_error(fft_conv(u, k[:, :0], None, skip, backend="triton"), skip[:, None] * u) < 1e-5
    assert relative_error(fft_conv(u, k, k[:, :0], backend="triton"), reference(u, k)) < 1e-5


def test_second_derivatives_and_forward_mode(device):
    given = operands(2, 1, 6, 4, 3, torch.float32, device)

    def total(*some):
        return fft_conv(*some, backend="triton").square().sum()

    def wanted(*some):
        return reference(*some).square().sum()

    wide = [t.double() for t in given]
    found = torch.func.hessian(total, argnums=(0, 1))(*given)
    expected = torch.func.hessian(wanted, argnums=(0, 1))(*wide)
    for a, b in zip(found, expected, strict=True):
        for c, d in zip(a, b, strict=True):
            assert relative_error(c, d) < 1e-4
    _, tangent = torch.func.jvp(total, tuple(given), tuple(given))
    _, exact = torch.func.jvp(wanted, tuple(wide), tuple(wide))
    assert relative_error(tangent, exact) < 1e-4


@pytest.mark.parametrize("dims", [(0, None), (None, 0), (1, 2)])
def test_vmap(dims, device):
    generator = torch.Generator().manual_seed(0)
    u, k = torch.randn(4, 3, 2, 40, generator=generator), torch.randn(4, 2, 25, generator=generator)
    u, k = (t[0] if dim is None else t.movedim(0, dim) for t, dim in zip((u, k), dims, strict=True))
    u, k = u.to(device), k.to(device)

    def call(some, taps):
        return fft_conv(some, taps, backend="triton")

    found, wanted = (torch.func.vmap(f, in_dims=dims)(u, k) for f in (call, reference))
    assert found.shape == (4, 3, 2, 40)
    assert relative_error(found, wanted) < 2e-6
    for which in (0, 1):
        found, wanted = (
            torch.func.vmap(torch.func.grad(lambda *some, f=f: f(*some).square().sum(), which), in_dims=dims)(u, k)
            for f in (call, reference)
        )
        assert relative_error(found, wanted) < 1e-5


def test_compiled(device):
    given = [t.requires_grad_() for t in operands(3, 2, 50, 50, 7, torch.float32, device)]
    compiled = torch.compile(lambda *some: fft_conv(*some, backend="triton"), backend="aot_eager", fullgraph=True)
    found, wanted = compiled(*given), fft_conv(*given, backend="triton")
    assert torch.equal(found, wanted)
    pairs = zip(torch.autograd.grad(found.sum(), given), torch.autograd.grad(wanted.sum(), given), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_operations_are_registered_properly(device):
    u, k, rev, skip, pre, post = operands(2, 2, 30, 30, 4, torch.float32, device)
    nothing = u.new_empty(0)
    torch.library.opcheck(conv_op._forward, (u, k, rev, skip, pre, post, False))
    torch.library.opcheck(conv_op._forward, (u, k, nothing, nothing, nothing, nothing, False))
    needs = [True, False, True, False, True, False]
    torch.library.opcheck(conv_op._backward, (u, u, k, rev, skip, pre, post, False, needs))


@pytest.mark.gpu
def test_same_bits_again(same_bits_everywhere):
    given = operands(9, 5, 700, 700, 0, torch.bfloat16, "cuda")[:2]

    def step():
        leaves = [t.detach().requires_grad_() for t in given]  # a graph takes none of another stream
        y = fft_conv(*leaves, backend="triton")
        return [y.detach(), *torch.autograd.grad(y.float().square().sum(), leaves)]

    same_bits_everywhere(step)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("batch", "channels", "length"),
    [(64, 40, 1000), (17, 33, 2048), (6, 300, 4096), (33, 64, 256), (66, 600, 512), (9, 3, 129)],
)
def test_many_sequences(batch, channels, length, dtype):
    given = [t.requires_grad_() for t in operands(batch, channels, length, length, 0, dtype, "cuda") if t is not None]
    wide = doubled(given)

    def call(function, u, k, skip, pre, post):
        return function(u, k, None, skip, pre, post)

    found = call(lambda *a: fft_conv(*a, backend="triton"), *given)
    wanted = call(reference, *wide)
    rounded = relative_error(wanted.to(dtype), wanted)
    assert relative_error(found, wanted) < (1.5 * rounded if dtype == torch.bfloat16 else 1e-5)
    direction = torch.randn_like(found)
    pairs = zip(
        torch.autograd.grad(found, given, direction), torch.autograd.grad(wanted, wide, direction.double()), strict=True
    )
    for g, w in pairs:
        assert relative_error(g, w) < (5e-3 if dtype == torch.bfloat16 else 2e-5)


def test_bad_operands_are_named():
    u, k, rev, skip, pre, post = operands(2, 3, 20, 5, 5, torch.float32)
    for bad, error, words in (
        (lambda: fft_conv(u[0], k), ValueError, r"u must have shape \(batch, channels, length\)"),
        (lambda: fft_conv(u, k[:2]), ValueError, r"k must have shape \(3, taps\), got \(2, 5\)"),
        (lambda: fft_conv(u, k, rev[0]), ValueError, "k_rev must have shape"),
        (lambda: fft_conv(u, k, None, skip[:1]), ValueError, r"skip must have shape \(3\)"),
        (lambda: fft_conv(u, k, None, None, pre[..., :4]), ValueError, "pre_gate must have the shape of u"),
        (lambda: fft_conv(u, k, None, None, None, post.double()), TypeError, "post_gate must have the dtype"),
        (lambda: fft_conv(u.double(), k.double(), backend="triton"), TypeError, "float64"),
        (lambda: fft_conv(u.repeat(1, 1, 20_000), k, backend="triton"), ValueError, "up to 262144, got 400000"),
    ):
        with pytest.raises(error, match=words):
            bad()


def test_half_precision_is_chosen_by_itself(monkeypatch):
    u, k, *_ = operands(1, 1, 8, 8, 0, torch.float32)
    half = u.bfloat16()
    monkeypatch.setattr(conv_op._backend, "use_triton", lambda *a: True)
    monkeypatch.setattr(conv_op, "MEASURED", False)
    assert not conv_op.supported(half, k)
    assert conv_op.supported(half, k, backend="triton")
    monkeypatch.setattr(conv_op, "MEASURED", True)
    assert conv_op.supported(half, k)
    assert not conv_op.supported(u, k)
    assert conv_op.supported(u, k, backend="triton")
    assert not conv_op.supported(half, k.double())
    assert not conv_op.supported(half.repeat(1, 1, 40_000), k)


@pytest.mark.parametrize("batch", [1, 4, 64])
@pytest.mark.parametrize("points", half.RADICES)
def test_tiles_have_64_columns(points, batch):
    """Narrower ones give wrong results on a GPU, which the interpreter does not know."""
    _, n2, n3 = half.RADICES[points]
    assert half.config(batch, points)["P"] * n2 * n3 >= 64
