"""The backward kernels of the Monarch product, every path against the float64 reference."""

import importlib

import pytest
import torch

from structmat_kernels.monarch import reference, rules

pytest.importorskip("triton")  # only that may be missing: an error in our own modules is no reason to skip
launch_backward = importlib.import_module("structmat_kernels.monarch.launch_backward")

BOUND = {torch.float32: 5e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
HALF = [torch.float16, torch.bfloat16]
# l, s, r, k, q, p, nrows, ncols
SHAPES = {
    "square": (4, 4, 4, 4, 4, 4, 16, 16),
    "rectangular": (3, 5, 4, 2, 6, 7, 13, 11),
    "prime": (5, 7, 3, 3, 5, 11, 31, 29),
    "long": (2, 17, 66, 2, 66, 70, 33, 137),  # more rows and columns in a block than in a tile
    "sixteens": (32, 3, 2, 4, 16, 5, 95, 20),  # 32 left blocks, of which a right block meets 16
    "one row": (3, 1, 2, 2, 3, 1, 3, 1),
    "one block": (1, 6, 9, 1, 9, 5, 6, 4),
    "one": (1, 1, 1, 1, 1, 1, 1, 1),
    "empty block": (4, 2, 4, 4, 4, 2, 5, 5),  # cropping leaves nothing of the last right block
    "uneven": (6, 5, 2, 4, 3, 3, 29, 11),  # q is no multiple of l
    "uneven wide": (4, 20, 3, 2, 6, 33, 77, 65),
}
RIGHT = {"TX": 32, "STAGES": 1, "num_warps": 4, "programs": 64}
HIDDEN = {"TX": 32, "BA": 16, "RSTAGES": 1, "right_warps": 4}
GENERAL = {"path": "general", "TT": 16, "STAGES": 1, "num_warps": 4, "programs": 64, "hidden": HIDDEN, "right": RIGHT}
WIDE = {"path": "wide", "TT": 16, "TX": 32, "SIDE": 16, "BK": 16, "STAGES": 1, "num_warps": 4, "programs": 64}
WIDE |= {"hidden": HIDDEN}
BACKWARD = {"general": GENERAL, "wide": WIDE, "cublas": {"path": "cublas"}}


def close(got, expected, bound=None, name=""):
    assert got.shape == expected.shape, name
    error = (got.detach().double() - expected).norm()
    bound = BOUND[got.dtype] if bound is None else bound
    assert error <= bound * expected.norm(), f"{name}: {error / expected.norm()}"


def backward_serves(path, shape):
    l, q = shape[0], shape[4]
    return path != "cublas" or q % l == 0


@pytest.fixture
def operands(monarch_operands, embed):
    """Makes a gradient of the outputs, x, left, right of size about 1, with NaN around them."""

    def make(name, tokens, dtype, device, batch=(1,)):
        shape = SHAPES.get(name, name)
        x, left, right, _ = monarch_operands(shape, tokens, dtype, device, batch)
        gy = torch.randn(*batch, tokens, shape[6], generator=torch.Generator().manual_seed(5))
        return embed(gy.to(device, dtype)), x, left, right

    return make


def check_backward(config, gy, x, left, right, wants=((True, True),), bound=None):
    """The gradients of x, of the factors, and of a bias, with and without the last."""
    expected = (
        *reference.monarch_backward(gy.double(), x.double(), left.double(), right.double()),
        gy.double().sum(-2),
    )
    for want_x, want_w in wants:
        want_b = len(wants) == 1 or not (want_x and want_w)
        got = launch_backward.backward(
            gy, x if want_w else None, left, right, x.shape[-1], want_x, want_w, config, want_b=want_b
        )
        wanted = (want_x, want_w, want_w, want_b)
        for name, g, e, want in zip(("x", "left", "right", "bias"), got, expected, wanted, strict=True):
            assert (g is None) == (not want)
            if want:
                assert g.dtype == gy.dtype
                close(g, e, bound, name)


@pytest.mark.parametrize(("path", "name"), [(p, n) for p in BACKWARD for n in SHAPES if backward_serves(p, SHAPES[n])])
def test_on_awkward_sizes(device, path, name, operands, poisoned):
    check_backward(BACKWARD[path], *operands(name, 19, torch.float32, device))


@pytest.mark.parametrize("path", BACKWARD)
def test_of_batches_and_token_counts(device, path, operands, poisoned):
    for tokens in (0, 1, 19):
        args = operands("square", tokens, torch.float32, device, (2,))
        check_backward(BACKWARD[path], *args, wants=((True, True), (True, False), (False, True))[: tokens + 1])


@pytest.mark.parametrize("path", BACKWARD)
def test_strides(device, path, operands):
    gy, x, left, right = operands("square", 5, torch.float32, device, (2,))
    left, right = left.mT.contiguous().mT, right.movedim(0, 2).contiguous().movedim(2, 0)
    check_backward(BACKWARD[path], gy[:, :1, :1].expand_as(gy), x[:1, :, :1].expand_as(x), left, right)
    check_backward(BACKWARD[path], gy[:1].expand_as(gy), x[:, :1].expand_as(x), left, right)
    check_backward(BACKWARD[path], gy.mT.contiguous().mT, x.mT.contiguous().mT, left, right)


@pytest.mark.parametrize("path", BACKWARD)
def test_in_half_precision(device, path, operands, poisoned):
    for dtype in HALF:
        args = operands("rectangular", 19, dtype, device)
        check_backward(BACKWARD[path], *args)


def test_ranges_of_tokens_are_added(device, operands, poisoned):
    """However many programs share the tokens, each of which takes every so many-th tile."""
    args = operands("square", 67, torch.float32, device)
    for path in ("general", "wide"):
        for count in (1, 1000):
            check_backward(BACKWARD[path] | {"programs": count, "right": RIGHT | {"programs": count}}, *args)


def test_rule(device, monkeypatch, operands, poisoned):
    monkeypatch.setattr(rules, "lookup", lambda *_: None)
    seen = set()
    large = ((2, 20, 130, 2, 130, 70, 33, 137), (2, 5, 512, 2, 512, 3, 9, 5))
    names = ("sixteens", "rectangular", "prime", *large)
    for name, dtype in zip(names, (torch.float16, torch.float16, *3 * [torch.float32]), strict=True):
        gy, x, left, right = operands(name, 19, dtype, device)
        configs = rules.choose_backward(rules.Factors(*left.shape[1:], *right.shape[1:]), 19, dtype, x.device)
        seen.add(configs[0]["path"])
        for config in configs:
            check_backward(config, gy, x, left, right)
    assert seen == {"general", "wide", "cublas"}
    monkeypatch.setattr(rules, "lookup", lambda *_: GENERAL)
    assert rules.choose_backward(rules.Factors(4, 4, 4, 4, 4, 4), 19, torch.float16, x.device) == [GENERAL]


@pytest.mark.parametrize("path", BACKWARD)
def test_error_is_that_of_a_dense_product(device, path, operands):
    for dtype in HALF if device == "cuda" else HALF[:1]:
        gy, x, left, right = operands((16, 16, 16, 16, 16, 16, 256, 256), 32, dtype, device)
        product = gy.double().mT @ x.double()
        dense = ((gy.mT @ x).double() - product).norm() / product.norm()
        check_backward(BACKWARD[path], gy, x, left, right, bound=1.5 * dense)
