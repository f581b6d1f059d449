"""The long convolution kernels that work block by block, with blocks small enough for the interpreter."""

import importlib

import pytest
import torch

from structmat.testing import relative_error
from structmat_kernels.fft_conv import fft_conv
from structmat_kernels.fft_conv import op as conv_op
from structmat_kernels.fft_conv.reference import fft_conv as reference

pytest.importorskip("triton")  # only that may be missing: an error in our own modules is no reason to skip
chain, half, kernel, long, transforms = (
    importlib.import_module(f"structmat_kernels.fft_conv.{name}")
    for name in ("chain", "half", "kernel", "long", "transforms")
)

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
#: Of float16 arithmetic: about seven roundings on the way. The interpreter truncates float32 to bfloat16.
BOUND = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 8e-3}
#: batch, channels, taps, taps behind, and the length, in blocks and entries
SIZES = [
    (1, 1, 1, 0, (1, 1)),
    (2, 2, 400, 0, (1, 1)),
    (3, 1, 4000, 3, (2, 0)),
    (1, 1, 4000, 4000, (3, -7)),
    (2, 1, 17, 4000, (3, 1)),
    (5, 1, 0.9, 1.1, (2, 9)),
]


def shrunk(dtype, accurate=False):
    """The configuration with the smallest blocks, and their size."""
    if dtype == torch.float32 or accurate:
        return {"radices": transforms.RADICES[256]}, 128
    return {"radices": (16, 8, 8)}, 512


@pytest.fixture
def small(monkeypatch, device):
    """Blocks as small as they can be, for the operation."""
    if device == "cpu":
        radices = {True: shrunk(torch.float16)[0]["radices"], False: shrunk(torch.float32)[0]["radices"]}
        monkeypatch.setattr(long, "RADICES", radices)
        monkeypatch.setattr(half, "LONGEST", 512)
        monkeypatch.setattr(kernel, "LONGEST", 128)


def operands(batch, channels, length, taps, behind, dtype=torch.float64, device="cpu"):
    """u, k, k_rev, skip, pre_gate, post_gate; filters in float32 at least, decaying."""
    generator = torch.Generator().manual_seed(0)
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    decay = torch.exp(-torch.arange(max(taps, behind, 1), dtype=torch.float64) / 200)
    given = [draw(batch, channels, length), draw(channels, taps) * decay[:taps]]
    given += [draw(channels, behind) * decay[:behind] if behind else None, draw(channels)]
    given += [draw(batch, channels, length), draw(batch, channels, length)]
    kinds = (dtype, wide, wide, wide, dtype, dtype)
    return [None if t is None else t.to(device, d) for t, d in zip(given, kinds, strict=True)]


def sized(sizes, dtype, block, device="cpu"):
    """Operands of SIZES: numbers of taps that are fractions are those of a block."""
    batch, channels, taps, behind, (blocks, more) = sizes
    taps, behind = (int(n * block) if isinstance(n, float) else n for n in (taps, behind))
    return operands(batch, channels, blocks * block + more, taps, behind, dtype, device)


def doubled(given):
    return [None if t is None else t.detach().double().requires_grad_() for t in given]


@pytest.mark.parametrize(("dtype", "gates"), list(zip(DTYPES, (True, True, False), strict=True)), ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_values_and_gradients_on_poisoned_memory(sizes, dtype, gates, poisoned):
    config, block = shrunk(dtype)
    given = sized(sizes, dtype, block) if gates else [*sized(sizes, dtype, block)[:4], None, None]
    wide = doubled(given)
    wanted = reference(*wide)
    y = long.forward_conv(*given, config=config)
    assert y.dtype == dtype and y.is_contiguous()
    assert relative_error(y, wanted) < BOUND[dtype]
    direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(9)).to(dtype)
    leaves = [t for t in wide if t is not None]
    exact = iter(torch.autograd.grad(wanted, leaves, direction.double()))
    found = long.backward_conv(direction, *given, [t is not None for t in given], config=config)
    for g, t in zip(found, given, strict=True):
        assert (g is None) == (t is None)
        if t is not None:
            w = next(exact)
            assert g.dtype == t.dtype and g.shape == t.shape
            if w.norm() > 0:
                # Of sums of very few products the relative error of a single one shows.
                assert relative_error(g, w) < (3 if w.numel() > 8 else 10) * BOUND[dtype]
            else:
                assert (g == 0).all()


@pytest.mark.parametrize("carried", [False, True])
@pytest.mark.parametrize(
    "sizes", [(3, 2, 700, 0, (1, 5)), (2, 1, 17, 0, (3, -7)), (5, 1, 1.0, 0, (3, 0)), (3, 1, 4000, 0, (4, -3))], ids=str
)
def test_spectra_carried_or_not(carried, sizes):
    """With gates and without."""
    config, block = shrunk(torch.float16)
    for given in (sized(sizes, torch.float16, block), [*sized(sizes, torch.float16, block)[:4], None, None]):
        c = config | {"carried": carried}
        wide = doubled(given)
        wanted = reference(*wide)
        assert relative_error(long.forward_conv(*given, config=c), wanted) < BOUND[torch.float16]
        direction = torch.ones_like(given[0])
        found = long.backward_conv(direction, *given, [i == 0 for i in range(6)], config=c)[0]
        (exact,) = torch.autograd.grad(wanted, [wide[0]], direction.double())
        assert relative_error(found, exact) < 3 * BOUND[torch.float16]


@pytest.mark.parametrize(("behind", "pairs", "length", "taps", "points"), [
    (0, 2, 2000, 2000, 1024), (0, 1, 2000, 2000, 2048), (9, 2, 2000, 2000, 2048), (0, 2, 4000, 4000, 2048),
    (0, 2, 4000, 1500, 1024), (0, 2, 9000, 600, 1024), (0, 2, 3000, 1536, 1024),
])  # fmt: skip
def test_when_spectra_are_carried(behind, pairs, length, taps, points, monkeypatch):
    """Up to four windows of 512 taps and their predecessors, two of 1024; forwards, of enough sequences."""
    monkeypatch.setattr(long, "processors", lambda device: 2)
    monkeypatch.setattr(long, "CARRIED", {1024: 4, 2048: 2})
    monkeypatch.setattr(long, "RADICES", {True: (32, 8, 8)})
    monkeypatch.setattr(chain, "RADICES", {1024: (16, 8, 8), 2048: (32, 8, 8)})
    u, k, k_rev, *_ = operands(1, pairs, length, taps, behind, torch.float16)
    plan = long._plan(u, k, k_rev, False, None, True)
    assert (plan.points, plan.carried) == (points, points == 1024)
    assert not long._plan(u, k, k_rev, False, None, False).carried


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_operation_above_the_border(dtype, device, small):
    length = 8193 if device == "cuda" else 513 if dtype != torch.float32 else 129
    given = operands(2, 2, length, length + 5, 30, dtype, device)
    leaves, wide = [t.requires_grad_() for t in given], doubled(given)
    y, wanted = fft_conv(*leaves, backend="triton"), reference(*wide)
    assert relative_error(y, wanted) < BOUND[dtype]
    direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(9)).to(device, dtype)
    found = torch.autograd.grad(y, leaves, direction)
    exact = torch.autograd.grad(wanted, wide, direction.double())
    for g, w in zip(found, exact, strict=True):
        assert relative_error(g, w) < 10 * BOUND[dtype]


@pytest.mark.parametrize(("dtype", "accurate", "length"), [(torch.float16, False, 513), (torch.float32, True, 129)])
def test_which_lengths_work_block_by_block(dtype, accurate, length, device, small, monkeypatch):
    if device == "cuda":
        length = half.LONGEST + 1 if dtype == torch.float16 else kernel.LONGEST + 1
    seen, launch = [], long.forward_conv
    monkeypatch.setattr(long, "forward_conv", lambda *a, **k: seen.append(a[0].shape[-1]) or launch(*a, **k))
    for n in (length - 1, length):
        u, k, *_ = operands(1, 1, n, 9, 0, dtype, device)
        assert relative_error(fft_conv(u, k, accurate=accurate, backend="triton"), reference(u, k)) < 2e-3
    assert seen == [length]


@pytest.mark.parametrize("which", range(6))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_only_the_gradients_that_are_asked_for(which, dtype):
    config, block = shrunk(dtype)
    given = operands(3, 1, block + 40, 60, 9, dtype)
    wide, direction = doubled(given), torch.ones_like(given[0])
    found = long.backward_conv(direction, *given, [i == which for i in range(6)], config=config)
    (wanted,) = torch.autograd.grad(reference(*wide), [wide[which]], direction.double())
    assert [g is not None for g in found] == [i == which for i in range(6)]
    assert relative_error(found[which], wanted) < 10 * BOUND[dtype]


def test_accurate_half_precision():
    config, block = shrunk(torch.float16, True)
    given = operands(3, 2, 2 * block + 1, 200, 0, torch.float16)[:4]
    wanted = reference(*doubled(given))
    rounded = relative_error(wanted.half(), wanted)
    assert relative_error(long.forward_conv(*given, None, None, True, config), wanted) < 1.1 * rounded


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_channels_in_parts_have_the_same_bits(dtype):
    """Also of operands that are not contiguous."""
    config, block = shrunk(dtype)
    given = operands(2, 3, block + 9, 30, 7, dtype)
    given[0] = given[0].mT.contiguous().mT
    direction = torch.randn(given[0].shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    found = []
    for chunk in (long.CHUNK, 2 * 2 * 2 * block * (4 if dtype == torch.float16 else 8)):  # all, two and one
        c = config | {"chunk": chunk}
        gradients = long.backward_conv(direction, *given, [True] * 6, config=c)
        found.append([long.forward_conv(*given, config=c), *gradients])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_many_sequences_of_one_channel(monkeypatch):
    """The sum over the batch is shared by programs, whatever their number."""
    config, block = shrunk(torch.float32)
    u, k, *_ = operands(9, 1, block + 5, 50, 0, torch.float32)
    for count in (1, 2, 50):
        monkeypatch.setattr(long, "processors", lambda device, count=count: count)
        wide = doubled([u, k])
        (wanted,) = torch.autograd.grad(reference(*wide), [wide[1]], u.double())
        needs = [False, True, False, False, False, False]
        found = long.backward_conv(u, u, k, None, None, None, None, needs, config=config)[1]
        assert relative_error(found, wanted) < 5e-6


@pytest.mark.parametrize("carried", [False, True])
def test_scales_of_neighbours_and_of_blocks(carried):
    """Sequences of very different sizes keep their own accuracy; zeros stay zeros, blocks of them are nearly that."""
    config, block = shrunk(torch.float16)
    config["carried"] = carried
    u, k, *_ = operands(6, 1, 2 * block, 200, 0, torch.float32)
    u = (u * torch.tensor([1e-3, 1e3, 0.0, 1.0, 1e-2, 1e2])[:, None, None]).half()
    u[3, :, :block] = 0
    for size in (1.0, 1e-20, 1e20):
        y = long.forward_conv(u.float().mul(1 / size).bfloat16(), k * size, None, None, None, None, config=config)
        wanted = reference(u.float().mul(1 / size).bfloat16().double(), k.double() * size)
        for found, row in zip(y, wanted, strict=True):
            assert (found == 0).all() if row.norm() == 0 else relative_error(found, row) < 1e-2
        assert y[3, :, :block].double().norm() < 1e-4 * y[3].double().norm()


@pytest.mark.parametrize("carried", [False, True])
def test_a_constant_and_a_filter_that_removes_it(carried):
    """Spectra of which one entry is far larger than the others, and the other one zero there."""
    config, block = shrunk(torch.float16)
    config["carried"] = carried
    u = torch.randn(2, 1, 2 * block, generator=torch.Generator().manual_seed(0)).add(30).half()
    k = torch.tensor([[1.0, -1.0]])
    wanted = reference(u.double(), k.double())
    # Errors are relative to the largest spectrum: float16's roundings of 30 are as large.
    found = long.forward_conv(u, k, None, None, None, None, config=config)
    assert relative_error(found, wanted) < 0.05
    ones = torch.ones(1, 1, 2 * block).half()
    found = long.forward_conv(ones, torch.ones(1, 2 * block), None, None, None, None, config=config)
    assert relative_error(found, torch.arange(1, 2 * block + 1).double()[None, None]) < 2e-3


def test_too_long_is_named():
    assert conv_op.LONGEST == long.LONGEST
    u = torch.zeros(1, 1, conv_op.LONGEST + 1)
    with pytest.raises(ValueError, match="lengths up to 262144, got 262145"):
        fft_conv(u, u[0], backend="triton")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("batch", "channels", "length"),
    [(3, 5, 8200), (16, 40, 16384), (4, 16, 65536), (1, 3, 100_003), (33, 1, 20_000), (1, 1, 262_144)],
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


@pytest.mark.gpu
def test_same_bits_again(same_bits_everywhere):
    given = operands(5, 3, 20_000, 20_000, 0, torch.bfloat16, "cuda")[:2]

    def step():
        leaves = [t.detach().requires_grad_() for t in given]  # a graph takes none of another stream
        y = fft_conv(*leaves, backend="triton")
        return [y.detach(), *torch.autograd.grad(y.float().square().sum(), leaves)]

    same_bits_everywhere(step)
