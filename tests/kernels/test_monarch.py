"""Every path of the Monarch product against the float64 reference."""

import importlib

import pytest
import torch

from structmat_kernels.monarch import monarch, monarch_transposed, reference, rules

pytest.importorskip("triton")  # only that may be missing: an error in our own modules is no reason to skip
launch = importlib.import_module("structmat_kernels.monarch.launch")

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
STAGES = {"path": "stages", "TT": 16, "BA": 16, "JB": 4, "BU": 16, "BR": 16, "BATCHED": False, "STAGES": 2}
STAGES |= {"num_warps": 4, "right_warps": 4}
PATHS = {
    "small": {"path": "small", "TT": 4, "BI": 16, "num_warps": 4},
    "resident": {"path": "resident", "TT": 16, "JB": 16, "STAGES": 2, "CTAS": 1, "num_warps": 4},
    "stages": STAGES,
    "stages, wide": STAGES | {"TT": 32, "JB": 16, "BA": 64, "BU": 64, "BR": 64},
    "batched": STAGES | {"JB": 16, "TX": 32, "BATCHED": True},
    "left in registers": STAGES | {"JB": 4, "CTAS": 1},
    "cublas": {"path": "cublas"},
}
# These need every group of left blocks to meet one right block at a time, and cublas whole right blocks.
ALIGNED = {"resident", "cublas"}


def serves(path, shape):
    l, q = shape[0], shape[4]
    if l > 16 and PATHS[path].get("JB", 4) == 4 and path != "cublas":  # many programs, nothing new
        return False
    return path not in ALIGNED or q % l == 0 or (path != "cublas" and l % 16 == 0 and q % 16 == 0)


CASES = [(path, name) for path in PATHS for name in SHAPES if serves(path, SHAPES[name])]


def exact(x, left, right, bias, nrows, activation=""):
    x, left, right, bias = (t.double() for t in (x, left, right, bias))
    z = reference.monarch(x, left, right, nrows) + (bias.unsqueeze(-2) if bias.numel() else 0)
    return reference.ACTIVATIONS[activation](z) if activation else z


def close(got, expected, bound=None, name=""):
    assert got.shape == expected.shape, name
    error = (got.detach().double() - expected).norm()
    bound = BOUND[got.dtype] if bound is None else bound
    assert error <= bound * expected.norm(), f"{name}: {error / expected.norm()}"


def tokens_for(path):
    return 5 if path == "small" else 19  # "small" makes a program of each left block and 4 tokens


@pytest.mark.parametrize(("path", "name"), CASES)
def test_every_path_on_awkward_sizes(device, path, name, monarch_operands, poisoned):
    shape, activation = SHAPES[name], ["", "relu", "gelu", "silu"][len(name) % 4]
    args = monarch_operands(shape, tokens_for(path), torch.float32, device, (1,), bias=len(name) % 3 > 0)
    if device == "cuda" and (path, name) == ("resident", "long"):  # 2.4 MB of factors do not fit on the chip
        with pytest.raises(Exception, match="out of resource: shared memory"):
            launch.forward(*args, shape[6], activation, PATHS[path])
        return
    got = launch.forward(*args, shape[6], activation, PATHS[path])
    close(got, exact(*args, shape[6], activation))


@pytest.mark.parametrize("activation", ["", "relu", "gelu", "silu"])
@pytest.mark.parametrize("path", PATHS)
def test_epilogues(device, path, activation, monarch_operands, poisoned):
    for bias in (True, False) if activation == "" else (activation != "relu",):
        args = monarch_operands(SHAPES["rectangular"], 5, torch.float32, device, (1,), bias=bias)
        close(launch.forward(*args, 13, activation, PATHS[path]), exact(*args, 13, activation))


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("path", PATHS)
def test_half_precision(device, path, dtype, monarch_operands, poisoned):
    # The factors of "long" are too large for the chip.
    for name in ("rectangular", "one block") if path in ("small", "resident") else ("rectangular", "long"):
        args = monarch_operands(SHAPES[name], 6, dtype, device, (1,))
        got = launch.forward(*args, SHAPES[name][6], "gelu", PATHS[path])
        assert got.dtype == dtype
        close(got, exact(*args, SHAPES[name][6], "gelu"))


@pytest.mark.parametrize("path", PATHS)
def test_batched_factors_and_token_counts(device, path, monarch_operands, poisoned):
    for tokens in (0, 1, 17):
        args = monarch_operands(SHAPES["rectangular"], tokens, torch.float32, device, (2,))
        close(launch.forward(*args, 13, "relu", PATHS[path]), exact(*args, 13, "relu"))


@pytest.mark.parametrize("path", PATHS)
def test_strides(device, path, monarch_operands):
    x, left, right, bias = monarch_operands(SHAPES["rectangular"], 5, torch.float32, device, (2,))
    for some, b in (
        (x[1:2].expand(2, -1, -1), bias[:1].expand(2, -1)),  # one batch entry for all
        (x[:, :1].expand(-1, 5, -1), bias[:, :1].expand(-1, 13)),  # one token, one bias
        (x[..., :1].expand(x.shape), bias.mT.contiguous().mT),
        (x.mT.contiguous().mT, bias.repeat_interleave(2, 1)[:, ::2]),
    ):
        args = (some, left.mT.contiguous().mT, right.movedim(1, 0).contiguous().movedim(0, 1), b)
        close(launch.forward(*args, 13, "", PATHS[path]), exact(*args, 13))


RULES = {
    "small": (SHAPES["prime"], 3),
    "stages, a few tokens": ((2, 3, 8, 8, 2, 121, 6, 967), 17),
    "resident": ((2, 3, 2, 2, 2, 64, 6, 127), 129),
    "resident, 32 blocks": ((32, 3, 2, 2, 32, 64, 95, 127), 129),
    "stages, left in registers": ((18, 3, 2, 3, 12, 43, 53, 129), 129),
    "stages, joined": ((6, 5, 2, 4, 3, 33, 29, 131), 129),
    "stages": ((18, 64, 64, 18, 64, 8, 1151, 143), 129),
    "cublas": ((2, 130, 4, 2, 4, 3, 255, 5), 129),
    "stages, large": ((3, 130, 4, 6, 2, 3, 255, 5), 129),
    "stages, large blocks, a few tokens": ((2, 130, 4, 2, 4, 3, 255, 5), 5),
    "stages, large blocks, some tokens": ((3, 130, 4, 6, 2, 3, 255, 5), 19),
}


@pytest.mark.parametrize("name", RULES)
def test_rule(device, name, monkeypatch, monarch_operands, poisoned):
    """What the rule chooses without a measurement is right."""
    monkeypatch.setattr(rules, "lookup", lambda *_: None)
    shape, tokens = RULES[name]
    args = monarch_operands(shape, tokens, torch.float32, device, (1,))
    sizes = rules.Factors(*shape[:6])
    configs = rules.choose(sizes, tokens, torch.float32, args[0].device)
    assert configs[0]["path"] == name.split(",")[0]
    close(launch.forward(*args, shape[6], ""), exact(*args, shape[6]))
    if len(configs) > 1:  # what any device has room for
        close(launch.forward(*args, shape[6], "", configs[-1]), exact(*args, shape[6]))


def test_measurements_come_before_the_rule(monkeypatch, monarch_operands):
    args = monarch_operands(SHAPES["prime"], 3, torch.float32, "cpu", (1,))
    for path in ("cublas", "stages"):
        monkeypatch.setattr(rules, "lookup", lambda *_, config=PATHS[path]: config)
        assert rules.choose(rules.Factors(*SHAPES["prime"][:6]), 3, torch.float32, args[0].device) == [PATHS[path]]
    assert launch.forward(*args, 31, "", {"path": "reference"}) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_blocks_without_a_kernel(device, dtype, monarch_operands):
    """Wide blocks and q no multiple of l."""
    shape = (3, 130, 4, 6, 2, 3, 255, 5)
    x, left, right, bias = monarch_operands(shape, 5, dtype, device)
    close(monarch(x, left, right, 255, bias, "silu", backend="triton"), exact(x, left, right, bias, 255, "silu"))
    y = monarch(x, left, right, 255, backend="triton").detach()
    expected = reference.monarch_transposed(y.double(), left.double(), right.double(), 5)
    close(monarch_transposed(y, left, right, 5, backend="triton"), expected)


@pytest.mark.parametrize("path", PATHS)
def test_error_is_that_of_a_dense_product(device, path, monarch_operands):
    """At most 1.5 times the dense product's: one rounding more, that of the hidden entries (the root of 2)."""
    shape = (16, 16, 16, 16, 16, 16, 256, 256)
    tokens = 48 if device == "cuda" else 2 if path == "small" else 16
    # Triton's interpreter truncates to bfloat16 where the device rounds.
    for dtype in HALF if device == "cuda" else HALF[:1]:
        x, left, right, none = monarch_operands(shape, tokens, dtype, device, (1,), bias=False)
        eye = torch.eye(256, dtype=torch.float64, device=device)
        weight = reference.monarch(eye, left[0].double(), right[0].double(), 256).mT
        # The dense product has a weight of its own: it is not charged with the rounding of a product of factors.
        own = weight.to(dtype)
        dense = ((x @ own.mT).double() - x.double() @ own.double().mT).norm() / (x.double() @ own.double().mT).norm()
        close(launch.forward(x, left, right, none, 256, "", PATHS[path]), x.double() @ weight.mT, 1.5 * dense)


def test_errors():
    x, left, right = torch.zeros(4, 14), torch.zeros(3, 5, 4), torch.zeros(2, 6, 7)
    bias = torch.zeros(15)
    for wrong in ((left[1:], right), (left[0], right), (left, right[0]), (left, right[0, 0])):
        with pytest.raises(
            ValueError, match=r"left \(\*batch, l, s, r\) and right \(\*batch, k, q, p\).* k q = l r, got"
        ):
            monarch(x, *wrong, 15)
        with pytest.raises(ValueError, match="must satisfy k q = l r, got"):
            monarch_transposed(bias[None], *wrong, 14)
    with pytest.raises(ValueError, match=r"x must have shape \(\*batch, tokens, up to 14\), got \(4, 15\)"):
        monarch(torch.zeros(4, 15), left, right, 15)
    with pytest.raises(ValueError, match=r"up to 14\), got \(14,\)"):
        monarch(x[0], left, right, 15)
    with pytest.raises(ValueError, match=r"y must have shape \(\*batch, tokens, up to 15\), got \(4, 16\)"):
        monarch_transposed(torch.zeros(4, 16), left, right, 14)
    for size in (0, 16):
        with pytest.raises(ValueError, match=f"nrows must be from 1 to l s = 15, got {size}"):
            monarch(x, left, right, size)
    for size in (0, 15):
        with pytest.raises(ValueError, match=f"ncols must be from 1 to k p = 14, got {size}"):
            monarch_transposed(bias[None], left, right, size)
    with pytest.raises(ValueError, match=r"activation must be None or one of \['gelu', 'relu', 'silu'\], got 'tanh'"):
        monarch(x, left, right, 15, bias, "tanh")
    with pytest.raises(ValueError, match=r"bias must have shape \(15,\), got \(14,\)"):
        monarch(x, left, right, 15, bias[1:])
    with pytest.raises(TypeError, match=r"bias must have the dtype and device of x, .*got torch.float64 on cpu"):
        monarch(x, left, right, 15, bias.double())
    with pytest.raises(TypeError, match=r"left must have the dtype and device of x, .*got torch.float16 on cpu"):
        monarch(x, left.half(), right, 15)
    with pytest.raises(TypeError, match=r"right must have the dtype and device of y, .*got torch.float32 on meta"):
        monarch_transposed(bias[None], left, right.to("meta"), 14)
    with pytest.raises(RuntimeError, match="broadcast"):
        monarch(x.expand(2, 4, 14), left.expand(3, 3, 5, 4), right, 15, backend="triton")
    with pytest.raises(TypeError, match=r"bfloat16, float16, float32, got torch\.float64"):
        monarch(x.double(), left.double(), right.double(), 15, backend="triton")


def test_sizes_of_zero(device):
    x, none = torch.ones(4, 5, device=device), torch.ones(4, 0, device=device)
    bias = torch.arange(5.0, device=device)
    for entries, r, q in ((x, 0, 0), (none, 2, 2)):
        left, right = torch.ones(2, 3, r, device=device), torch.ones(2, q, 3, device=device)
        assert torch.equal(monarch(entries, left, right, 5, bias, backend="triton"), bias.expand(4, 5))
