"""The networks of implicit filters: those of all directions as one, features of positions along the columns."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from structmat.matrices.displacement._convolution import working


def evaluate(mlps: nn.ModuleList, z: Tensor, frequency: Tensor, times: Tensor, rates: Tensor, shift: float) -> Tensor:
    """The networks' values at positions, times ``exp(-rates[c] times[i]) + shift``.

    Args:
        mlps: for every direction its layers, a sine between any two of them.
        z: positions, shape (1, length, features).
        frequency: of the sines, shape (1, width).
        times: shape (length,).
        rates: shape (channels,).
        shift: what the decay tends to.

    Returns:
        Shape (directions, channels, length). Where all layers are dense and alike, a product for each layer of all
        directions, and nothing is transposed.
    """
    times, rates = times.to(z.dtype), rates.to(z.dtype)  # buffers, which may have been left in another one
    networks = [list(mlp) for mlp in mlps]  # pyright: ignore[reportArgumentType]
    *hidden, last = zip(*networks, strict=True)
    if all([_dense(layers, True) for layers in hidden]) and _dense(last, False):
        weight = _stacked([layer.weight for layer in last])
        values = torch.bmm(weight, _together(hidden, z, frequency))
    else:
        values = torch.stack([_alone(layers, z, frequency) for layers in networks])
    decay = torch.exp(-rates.unsqueeze(-1) * times)
    return values * (decay + shift if shift else decay)


def _dense(layers: Sequence[nn.Module], bias: bool) -> bool:
    return all([isinstance(layer, nn.Linear) and (layer.bias is not None) == bias for layer in layers])


def _together(hidden: list[tuple], z: Tensor, frequency: Tensor) -> Tensor:
    """The last hidden units of all directions, shape (directions, width, length)."""
    first, *others = hidden
    directions, rows = len(first), frequency.mT
    # Sines of frequency * (weight @ h + bias): multiplying the weights is cheaper than multiplying at every position,
    # above all in the backward pass, whose sums over positions are then those of products.
    biases = (_stacked([layer.bias for layers in hidden for layer in layers]).unsqueeze(-1) * rows).split(directions)
    weight = _stacked([layer.weight for layer in first]) * rows
    h = torch.addmm(biases[0].flatten(0, 1), weight.flatten(0, 1), z.squeeze(0).mT).sin()
    h = h.unflatten(0, (directions, rows.shape[0]))
    if others:
        weights = _stacked([layer.weight for layers in others for layer in layers]) * rows
        for weight, bias in zip(weights.split(directions), biases[1:], strict=True):
            h = torch.baddbmm(bias, weight, h).sin()
    return h


def _stacked(tensors: list[Tensor]) -> Tensor:
    tensors = [working(t) for t in tensors]
    return tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack(tensors)


def _alone(layers: Sequence[nn.Module], z: Tensor, frequency: Tensor) -> Tensor:
    """The network of one direction, shape (channels, length), of layers of any kind."""
    h = z
    for index, layer in enumerate(layers):
        h = torch.sin(frequency * h) if index else h
        if isinstance(layer, nn.Linear):
            h = F.linear(h, working(layer.weight), None if layer.bias is None else working(layer.bias))
        else:  # what surgery has put in its place
            h = layer(h)
    return h.squeeze(0).mT
