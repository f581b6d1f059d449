"""Checkpoints of HazyResearch's fly: the same numbers under other names."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

_RENAMED = {"blkdiag1": "weight.right", "blkdiag2": "weight.left"}


def convert_fly_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the tensors of fly's ``MonarchLinear`` and ``BlockdiagLinear`` for this library's layers.

    ``blkdiag1`` (k, q, p) becomes ``weight.right``, ``blkdiag2`` (l, s, r) becomes ``weight.left``, and a
    three-dimensional ``weight`` (nblocks, out, in), a ``BlockdiagLinear`` without shuffle, becomes ``weight.blocks``.
    All other tensors keep their names. Load the result with ``model.load_state_dict``.

    Args:
        state_dict: fly's state dict.

    Returns:
        A new dictionary over the same tensors.

    Raises:
        ValueError: if only one of the two factors of a layer is there.

    Example:
        >>> import torch, structmat
        >>> old = {"fc.blkdiag1": torch.ones(4, 2, 3), "fc.blkdiag2": torch.ones(4, 5, 2), "fc.bias": torch.ones(20)}
        >>> sorted(structmat.nn.convert_fly_state_dict(old))
        ['fc.bias', 'fc.weight.left', 'fc.weight.right']
    """
    converted: dict[str, Tensor] = {}
    for name, tensor in state_dict.items():
        prefix, _, last = name.rpartition(".")
        dot = prefix + "." if prefix else ""
        if last in _RENAMED:
            for partner in _RENAMED:
                if dot + partner not in state_dict:
                    raise ValueError(f"the state dict has {name} but not {dot + partner}")
            converted[dot + _RENAMED[last]] = tensor
        elif last == "weight" and tensor.ndim == 3:
            converted[dot + "weight.blocks"] = tensor
        else:
            converted[name] = tensor
    return converted
