"""The gated MLP of M2, of two structured layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from structmat._checks import check_int
from structmat.config import Config, config_from_dict
from structmat.models._build import check_dropout
from structmat.nn.linear import StructuredLinear
from structmat_kernels.gated_gelu import gated_gelu


def linear(
    in_features: int, out_features: int, bias: bool, structure: Config | Mapping[str, Any] | None
) -> nn.Linear | StructuredLinear:
    """A dense layer, or one of a structure."""
    if structure is None:
        return nn.Linear(in_features, out_features, bias)
    config = structure if isinstance(structure, Config) else config_from_dict(dict(structure))
    return StructuredLinear(config.random((out_features, in_features)), bias)


class M2MLP(nn.Module):
    """``out(gelu(a) * b)`` with ``(a, b) = gate(x)``, the two layers block-diagonal, Monarch or what a config says.

    Block-diagonal layers in k blocks cost 3 d I / k parameters where dense ones cost 3 d I. Of M2-BERT's four blocks
    the first two make a, the last two b.

    Args:
        dim: size d of the last dimension of input and output.
        hidden: hidden units I.
        structure: config of the layers, or its dictionary; None makes them dense.
        dropout: probability, before the second layer.

    Raises:
        ValueError: if the structure does not exist for the sizes.

    Shape:
        (*, dim) to (*, dim).

    Source: Fu et al. 2023, "Monarch Mixer"; the gate is that of Shazeer 2020, "GLU variants improve transformer".

    Example:
        >>> import torch, structmat
        >>> from structmat.models.m2 import M2MLP
        >>> mlp = M2MLP(64, 256, structmat.BlockDiagonalConfig(nblocks=4))
        >>> mlp(torch.ones(2, 7, 64)).shape, mlp.gate.weight().blocks.shape
        (torch.Size([2, 7, 64]), torch.Size([4, 128, 16]))
    """

    def __init__(
        self, dim: int, hidden: int, structure: Config | Mapping[str, Any] | None = None, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.gate = linear(check_int("dim", dim), 2 * check_int("hidden", hidden), False, structure)
        self.out = linear(hidden, dim, True, structure)
        self.dropout = nn.Dropout(check_dropout(dropout))

    def forward(self, x: Tensor) -> Tensor:
        """Map x of shape (*, dim) to the same shape."""
        return self.out(self.dropout(gated_gelu(self.gate(x))))
