"""fly's checkpoints load: the tensors below are made by fly's constructors' rules, the outputs by its einsums."""

import math

import pytest
import torch

from structmat.nn import BlockDiagonalLinear, MonarchLinear, convert_fly_state_dict
from structmat.testing import assert_close


def fly_monarch(n, m, nblocks):
    """Shapes as fly's MonarchLinear makes them: the inner width is the smaller of the two block sizes."""
    p, s = math.ceil(n / nblocks), math.ceil(m / nblocks)
    inner = min(p, s)
    g = torch.Generator().manual_seed(0)
    w1 = torch.randn(nblocks, inner, p, generator=g, dtype=torch.float64)
    w2 = torch.randn(nblocks, s, inner, generator=g, dtype=torch.float64)
    return {"blkdiag1": w1, "blkdiag2": w2, "bias": torch.randn(m, generator=g, dtype=torch.float64)}


def fly_forward(x, state, m):
    w1, w2 = state["blkdiag1"], state["blkdiag2"]
    (k, _, p), (l, s, r) = w1.shape, w2.shape
    x = torch.nn.functional.pad(x, (0, k * p - x.shape[-1])).reshape(-1, k, p)
    h = torch.einsum("kqp,bkp->bkq", w1, x).reshape(-1, r, l).transpose(1, 2)
    y = torch.einsum("lsr,blr->bsl", w2, h).reshape(-1, s * l)
    return y[:, :m] + state["bias"]


@pytest.mark.parametrize(("n", "m", "nblocks"), [(24, 48, 4), (48, 24, 4), (50, 37, 4), (37, 50, 3), (52, 52, 4)])
def test_monarch_linear(n, m, nblocks):
    state = fly_monarch(n, m, nblocks)
    layer = MonarchLinear(n, m, nblocks=nblocks, dtype=torch.float64)
    layer.load_state_dict(convert_fly_state_dict(state))
    x = torch.randn(5, n, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert_close(layer(x), fly_forward(x, state, m))


def test_names_inside_a_model():
    state = {f"encoder.0.fc.{k}": v for k, v in fly_monarch(24, 48, 4).items()}
    blocks = torch.randn(3, 5, 7, dtype=torch.float64)
    state |= {"head.weight": blocks, "norm.weight": torch.ones(48), "dense.weight": torch.ones(3, 3)}
    converted = convert_fly_state_dict(state)
    assert set(converted) == {
        *("encoder.0.fc.weight.left", "encoder.0.fc.weight.right", "encoder.0.fc.bias"),
        *("head.weight.blocks", "norm.weight", "dense.weight"),
    }
    layer = BlockDiagonalLinear(21, 15, bias=False, nblocks=3, dtype=torch.float64)
    layer.load_state_dict({"weight.blocks": converted["head.weight.blocks"]})
    assert_close(layer.weight().to_dense(), torch.block_diag(*blocks))


def test_half_a_layer_raises():
    with pytest.raises(ValueError, match=r"fc\.blkdiag1 but not fc\.blkdiag2"):
        convert_fly_state_dict({"fc.blkdiag1": torch.ones(4, 2, 2)})
