"""What the tests of long convolutions share: a seed, and the convolution written as a matrix, entry by entry."""

import pytest
import torch


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def _dense(u, k, k_rev=None, skip=None, pre_gate=None, post_gate=None, circular=False):
    given = [v for v in (u, k, k_rev, skip, pre_gate, post_gate) if v is not None]
    wide = torch.complex128 if any(v.is_complex() for v in given) else torch.float64
    length, channels = u.shape[-1], u.shape[-2]
    batch = torch.broadcast_shapes(k.shape[:-2], () if k_rev is None else k_rev.shape[:-2])
    matrix = torch.zeros(*batch, channels, length, length, dtype=wide)
    for t in range(length):
        for s in range(length):
            if circular:
                for tap in range((t - s) % length, k.shape[-1], length):
                    matrix[..., t, s] += k[..., tap]
            elif s <= t < s + k.shape[-1]:
                matrix[..., t, s] = k[..., t - s]
            elif k_rev is not None and t < s <= t + k_rev.shape[-1]:
                matrix[..., t, s] = k_rev[..., s - t - 1]
    x = u.to(wide) if pre_gate is None else pre_gate.to(wide) * u.to(wide)
    y = (matrix @ x.unsqueeze(-1)).squeeze(-1)
    if skip is not None:
        y = y + skip.to(wide)[:, None] * x
    return y if post_gate is None else post_gate.to(wide) * y


@pytest.fixture
def dense():
    """``dense(u, k, k_rev, skip, pre_gate, post_gate, circular)`` in double precision."""
    return _dense
