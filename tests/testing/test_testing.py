"""The checks can fail: each is given an operator that breaks its promise."""

import dataclasses

import pytest
import torch

import structmat as sm
from structmat.base import StructuredMatrix, matrix, static
from structmat.testing import CHECKS, Entry, assert_close, check_all, dense_by_definition, market, relative_error


@matrix
class Scalar(StructuredMatrix):
    """A multiple of the identity, with a fault on demand."""

    value: torch.Tensor
    n: int = static(default=5)
    fault: str = static(default="")

    @property
    def shape(self):
        return torch.Size((*self.value.shape, self.n, self.n))

    def _linear(self, x):
        y = x * self.value[..., None, None]
        if self.fault == "wrong":
            return y + 1e-6
        if self.fault == "in_place":
            return x.mul_(self.value[..., None, None])
        if self.fault == "detached":
            return x * self.value.detach()[..., None, None]
        if self.fault == "float32":
            return y.float().to(y.dtype)
        if self.fault == "densifies":
            return x @ self.to_dense().mT
        if self.fault == "not_linear":
            return y.abs()
        if self.fault == "python_branch":
            return y if float(y.detach().sum()) > -1e9 else -y
        return y

    def _linear_mT(self, x):
        return self._linear(x) * (2 if self.fault == "transpose" else 1)

    def to_dense(self):
        return torch.diag_embed(self.value[..., None].expand(*self.value.shape, self.n))

    @property
    def flops(self):
        return self.n * self.value.numel()

    def _solve(self, b):
        return b / self.value[..., None, None] * (1.001 if self.fault == "solve" else 1)

    def _solve_mT(self, b):
        return self._solve(b)

    def slogdet(self):
        return self.value.sgn() ** self.n, self.n * self.value.abs().log()

    def randomize_(self, std=3**-0.5, generator=None):
        with torch.no_grad():
            self.value.fill_(std * (1.5 if self.fault == "std" else 1))
        return self

    def diagonal(self):
        return self.value[..., None].expand(*self.value.shape, self.n) * (3 if self.fault == "diagonal" else 1)


def entry(fault=""):
    return Entry(
        fault or "scalar",
        lambda dtype, device: Scalar(torch.rand((), dtype=dtype).add(0.5).to(device), 5, fault),
        dense=lambda A: A.value * torch.eye(5, dtype=A.dtype, device=A.device),
        invertible=True,
    )


def test_a_users_operator_passes_all_checks():
    assert check_all(entry()) == list(CHECKS)


@pytest.mark.parametrize(
    ("fault", "check"),
    [
        ("wrong", "products"),
        ("float32", "products"),
        ("transpose", "adjoint"),
        ("in_place", "linearity"),
        ("not_linear", "linearity"),
        ("detached", "gradients"),
        ("detached", "per_sample_gradients"),
        ("densifies", "structure"),
        ("python_branch", "compile"),
        ("python_branch", "vmap"),
        ("solve", "solve"),
        ("std", "initialisation"),
        ("diagonal", "entries"),
    ],
)
def test_a_fault_is_found(fault, check):
    with pytest.raises(AssertionError, match=f"{fault} fails the check '{check}'"):
        check_all(entry(fault), only=[check])


def test_an_undeclared_inverse_is_found():
    with pytest.raises(AssertionError, match="declare the entry invertible"):
        check_all(dataclasses.replace(entry(), invertible=False), only=["solve"])


def test_a_class_without_a_transpose_says_so():
    @matrix
    class Half(StructuredMatrix):
        value: torch.Tensor

        @property
        def shape(self):
            return torch.Size((1, 1))

        def _linear(self, x):
            return x * self.value

    with pytest.raises(NotImplementedError, match="must define mT or _linear_mT"):
        Half(torch.ones(())).mT.linear(torch.ones(2, 1))


def test_unknown_check_and_definition():
    with pytest.raises(ValueError, match="unknown checks"):
        check_all(entry(), only=["speed"])
    with pytest.raises(TypeError, match="no definition of Scalar"):
        dense_by_definition(entry()())


def test_every_class_is_in_the_market():
    kinds = {type(e()) for e in market()}
    public = {v for v in vars(sm).values() if isinstance(v, type) and issubclass(v, StructuredMatrix)}
    assert public - {StructuredMatrix} <= kinds


def test_relative_error_sees_nan_and_shapes():
    with pytest.raises(AssertionError):
        assert_close(torch.tensor([torch.nan]), torch.ones(1))
    with pytest.raises(AssertionError, match="shape"):
        relative_error(torch.ones(2), torch.ones(1, 2))
    with pytest.raises(AssertionError):
        assert_close(torch.ones(1) + 1j, torch.ones(1))


def test_matrix_needs_the_base_class():
    with pytest.raises(TypeError, match="StructuredMatrix"):

        @matrix
        class Plain:
            pass
