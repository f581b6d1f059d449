"""long_convolution and circular_convolution against matrices written out."""

import itertools

import pytest
import torch

from structmat.nn.longconv import circular_convolution, long_convolution
from structmat.testing import assert_close, relative_error

WAYS = [("fft", 2), ("monarch", 1), ("monarch", 2), ("monarch", 3), ("monarch", 4)]
ways = pytest.mark.parametrize(("algorithm", "order"), WAYS, ids=str)
double = torch.float64


@ways
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
def test_every_length_and_number_of_taps(dense, algorithm, order, dtype):
    for length, taps, later in itertools.product((1, 2, 3, 7, 16, 31), (0, 1, 5, 31, 40), (None, 0, 1, 5, 40)):
        u = torch.randn(2, 3, length, dtype=dtype)
        k = torch.randn(3, taps, dtype=double)
        k_rev = None if later is None else torch.randn(3, later, dtype=double)
        y = long_convolution(u, k, k_rev, algorithm=algorithm, order=order)
        assert y.dtype == dtype
        assert_close(y, dense(u, k, k_rev), 1e-12)


@ways
def test_skip_and_gates(dense, algorithm, order):
    u, pre, post = (torch.randn(2, 3, 17, dtype=double) for _ in range(3))
    k, k_rev, skip = torch.randn(3, 17, dtype=double), torch.randn(3, 16, dtype=double), torch.randn(3, dtype=double)
    for given in itertools.product((None, k_rev), (None, skip), (None, pre), (None, post)):
        y = long_convolution(u, k, *given, algorithm=algorithm, order=order)
        assert_close(y, dense(u, k, *given), 1e-12)


@ways
@pytest.mark.parametrize("length", [101, 1000, 2048])
def test_float32_at_larger_lengths(algorithm, order, length):
    u, k = torch.randn(2, 4, length), torch.randn(4, length)
    exact = long_convolution(u.double(), k.double(), k.double(), algorithm="fft")
    assert_close(long_convolution(u, k, k, algorithm=algorithm, order=order), exact, 2e-6)


@ways
@pytest.mark.parametrize("shape", [(3, 9), (1, 3, 9), (2, 5, 3, 9), (0, 3, 9), (2, 3, 0), (0, 3, 0)], ids=str)
def test_batches(dense, algorithm, order, shape):
    u, k, k_rev = torch.randn(shape, dtype=double), torch.randn(3, 4, dtype=double), torch.randn(3, 9, dtype=double)
    y = long_convolution(u, k, k_rev, algorithm=algorithm, order=order)
    assert y.shape == shape
    if u.numel():
        assert_close(y, dense(u, k, k_rev), 1e-12)


def test_filters_of_every_row_and_shared_filters(dense):
    u = torch.randn(2, 5, 3, 9, dtype=double)
    for k, k_rev in itertools.product((3, 1), ((5, 3), (2, 1, 1), (3,))):
        taps, later = torch.randn(2, 1, k, 6, dtype=double), torch.randn(*k_rev, 4, dtype=double)
        wide, wide_later = (v.expand(2, 5, 3, v.shape[-1]) for v in (taps, later))
        assert_close(long_convolution(u, taps, later), dense(u, wide, wide_later), 1e-12)
    assert long_convolution(u[0, 0], torch.randn(7, 3, 4, dtype=double)).shape == (7, 3, 9)


def test_memory_layout_does_not_matter(dense):
    u = torch.randn(9, 2, 3, dtype=double).permute(1, 2, 0)
    k = torch.randn(8, 3, dtype=double).mT[:, ::2]
    gate = torch.randn(2, 3, 1, dtype=double).expand(2, 3, 9)
    assert_close(long_convolution(u, k, None, None, gate), dense(u, k, None, None, gate), 1e-12)


def test_complex_filters(dense):
    u, k = torch.randn(2, 3, 9, dtype=double), torch.randn(3, 9, dtype=torch.complex128)
    for algorithm, order in WAYS:
        assert_close(long_convolution(u, k, k, algorithm=algorithm, order=order), dense(u, k, k), 1e-12)
    assert_close(circular_convolution(u, k), dense(u, k, circular=True), 1e-12)


@pytest.mark.parametrize("place", range(4), ids=["k_rev", "skip", "pre_gate", "post_gate"])
def test_one_complex_operand_makes_the_output_complex(dense, place):
    u, k = torch.randn(2, 3, 9, dtype=double), torch.randn(3, 9, dtype=double)
    shape = ((3, 5), (3,), u.shape, u.shape)[place]
    others = [None] * 4
    others[place] = torch.randn(shape, dtype=torch.complex128)
    for algorithm, order in WAYS:
        y = long_convolution(u, k, *others, algorithm=algorithm, order=order)
        assert y.dtype == torch.complex128
        assert_close(y, dense(u, k, *others), 1e-12)
    if place:
        assert_close(circular_convolution(u, k, *others[1:]), dense(u, k, *others, circular=True), 1e-12)


@ways
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_is_rounded_once(algorithm, order, dtype, autocast):
    u, pre, post = (torch.randn(2, 3, 33).to(dtype) for _ in range(3))
    k, skip = torch.randn(3, 33), torch.randn(3)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = long_convolution(u, k, k.to(dtype), skip, pre, post, algorithm=algorithm, order=order)
    exact = long_convolution(u.float(), k, k.to(dtype).float(), skip, pre.float(), post.float())
    assert y.dtype == dtype
    # At most one unit in the last place away, where the float32 result lies near the middle of two numbers.
    assert ((y != exact.to(dtype)).float().mean()) < 0.01
    assert_close(y.double(), exact.double(), torch.finfo(dtype).eps / 2)


def test_wrapped_taps_in_half_precision():
    u, k = torch.randn(2, 3, 33).bfloat16(), torch.randn(3, 999).bfloat16()
    exact = circular_convolution(u.double(), k.double())
    assert (circular_convolution(u, k) != exact.bfloat16()).float().mean() < 0.01  # rounded once


def test_autocast_changes_nothing():
    u, k = torch.randn(2, 3, 33), torch.randn(3, 33)
    for algorithm, order in WAYS:
        plain = long_convolution(u, k, algorithm=algorithm, order=order)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(long_convolution(u, k, algorithm=algorithm, order=order), plain)


@ways
def test_gradients(algorithm, order):
    def inputs(length, taps, later):
        shapes = [(2, 2, length), (2, taps), (2, later), (2,), (2, 2, length), (2, 2, length)]
        return [torch.randn(shape, dtype=double, requires_grad=True) for shape in shapes]

    def convolution(*args):
        return long_convolution(*args, algorithm=algorithm, order=order)

    for sizes in [(5, 5, 4), (4, 7, 2), (1, 1, 1)]:
        assert torch.autograd.gradcheck(convolution, inputs(*sizes))
    assert torch.autograd.gradgradcheck(convolution, inputs(3, 3, 1))


def test_gradients_of_complex_and_circular_convolutions():
    u = torch.randn(2, 5, dtype=torch.complex128, requires_grad=True)
    k = torch.randn(2, 3, dtype=torch.complex128, requires_grad=True)
    real = torch.randn(2, 7, dtype=double, requires_grad=True)
    for algorithm in ("fft", "monarch"):
        assert torch.autograd.gradcheck(lambda *a, w=algorithm: long_convolution(*a, algorithm=w), (u, k, real))
    assert torch.autograd.gradcheck(circular_convolution, (u, k))
    assert torch.autograd.gradgradcheck(circular_convolution, (real, u.real.detach().requires_grad_()))


@pytest.mark.parametrize("length", [1, 2, 7, 12])
def test_circular(dense, length):
    for taps in (1, 5, 7, 30):
        u, k, skip = torch.randn(2, 3, length, dtype=double), torch.randn(3, taps, dtype=double), torch.ones(3).double()
        y = circular_convolution(u, k, skip, u, u)
        assert_close(y, dense(u, k, None, skip, u, u, circular=True), 1e-12)
    assert circular_convolution(u[:0], k).shape == (0, 3, length)
    assert circular_convolution(u[..., :0], k).shape == (2, 3, 0)


@ways
def test_outputs_do_not_depend_on_later_inputs(algorithm, order):
    u, k = torch.randn(2, 4, 300), torch.randn(4, 300)
    other = torch.cat([u[..., :200], 3 * torch.randn(2, 4, 100)], -1)
    y, z = (long_convolution(v, k, algorithm=algorithm, order=order) for v in (u, other))
    assert (y - z)[..., :200].abs().max() < 1e-5 * y.abs().max()
    jacobian = torch.autograd.functional.jacobian(
        lambda v: long_convolution(v, k[:1, :9].double(), algorithm=algorithm, order=order), u[0, :1, :9].double()
    )
    assert jacobian[0, :, 0].triu(1).abs().max() < 1e-13


u, k = torch.randn(2, 3, 8), torch.randn(3, 8)


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        ((u, [1.0]), TypeError, "k must be a torch.Tensor, got list"),
        ((u[0, 0], k), ValueError, "u must have at least 2 dimensions"),
        ((u.int(), k), TypeError, "u must be floating point or complex, got torch.int32"),
        ((u, k.int()), TypeError, "k must be floating point"),
        ((u, k[:2]), ValueError, r"k must have shape \(.., 3, taps\) or \(.., 1, taps\)"),
        ((u, k.expand(4, 3, 8)), ValueError, "do not broadcast"),
        ((u, k.double()), TypeError, "k has dtype torch.float64 but u has torch.float32"),
        ((u.double(), k.bfloat16()), TypeError, "k has dtype torch.bfloat16 but u has torch.float64"),
        ((u, k, k[:2]), ValueError, "k_rev must have shape"),
        ((u, k, None, k), ValueError, r"skip must have shape \(3,\)"),
        ((u, k, None, None, u[0]), ValueError, r"pre_gate must have shape \(2, 3, 8\), got \(3, 8\)"),
        ((u, k, None, None, None, u[..., :7]), ValueError, "post_gate must have shape"),
        ((u, k, None, None, u.double()), TypeError, "pre_gate has dtype torch.float64"),
        ((u, k.to("meta")), ValueError, "k is on meta but u is on cpu"),
    ],
)
def test_errors(args, error, message):
    with pytest.raises(error, match=message):
        long_convolution(*args)


@pytest.mark.filterwarnings("ignore:ComplexHalf")
def test_complex_half_is_refused():
    with pytest.raises(TypeError, match=r"u must not be complex32.* use .to\(torch.complex64\)"):
        long_convolution(u.to(torch.complex32), k)


def test_unknown_ways():
    with pytest.raises(ValueError, match="algorithm must be one of fft, monarch, got 'butterfly'"):
        long_convolution(u, k, algorithm="butterfly")
    with pytest.raises(ValueError, match="order must be at most 4, got 5"):
        long_convolution(u, k, algorithm="monarch", order=5)
    with pytest.raises(TypeError, match="order must be an integer"):
        long_convolution(u, k, algorithm="monarch", order=2.0)


def test_the_kernel_gives_the_same(dense):
    pytest.importorskip("triton")
    u, pre, post = (torch.randn(2, 3, 4, 37) for _ in range(3))
    k, k_rev, skip = torch.randn(1, 37), torch.randn(4, 50), torch.randn(4)
    found = long_convolution(u, k, k_rev, skip, pre, post, backend="triton")
    wanted = dense(*(t.double() for t in (u, k.expand(4, -1), k_rev, skip, pre, post)))
    assert relative_error(found, wanted) < 2e-6
    found = long_convolution(u[0], k, backend="triton")
    assert relative_error(found, dense(u[0].double(), k.expand(4, -1).double())) < 2e-6
    with pytest.raises(ValueError, match=r"filters of shape \(channels, taps\)"):
        long_convolution(u, k.expand(3, 4, 37), backend="triton")
    with pytest.raises(TypeError, match="float64"):
        long_convolution(u.double(), k.double(), backend="triton")
