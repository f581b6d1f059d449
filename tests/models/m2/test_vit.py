"""M2-ViT and the parts that all M2 models are made of."""

import pytest
import torch
import torch.nn.functional as F

import structmat
from structmat.models.m2 import M2MLP, M2SequenceMixer, M2ViTForImageClassification, M2ViTModel
from structmat.nn.longconv import long_convolution
from structmat.testing import relative_error


def test_every_patch_reaches_every_other(vit_config, stir):
    model = stir(M2ViTModel(vit_config())).double()
    x = torch.randn(1, 2, 12, 8, dtype=torch.float64, requires_grad=True)
    out = model(x).last_hidden_state
    assert out.shape == (1, 6, 16)
    for patch in range(6):
        (gradient,) = torch.autograd.grad(out[0, patch].square().sum(), x, retain_graph=True)
        assert F.avg_pool2d(gradient.abs(), 4).min() > 0


def test_classifier_trains(vit_config):
    torch.manual_seed(0)
    model = M2ViTForImageClassification(vit_config())
    x, labels = torch.randn(20, 2, 12, 8), torch.arange(20) % 5
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(40):
        out = model(x, labels=labels)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        losses.append(out.loss.item())
    assert losses[-1] < 0.2 < 1 < losses[0]


def test_logits_are_those_of_the_mean(vit_config):
    model = M2ViTForImageClassification(vit_config()).eval()
    x = torch.randn(3, 2, 12, 8)
    expected = model.classifier(model.model(x).last_hidden_state.mean(1))
    assert torch.equal(model(x).logits, expected)
    labels = torch.tensor([0, 4, 2])
    torch.testing.assert_close(model(x, labels=labels, return_dict=False)[0], F.cross_entropy(expected, labels))


def test_images_of_another_size_are_refused(vit_config):
    with pytest.raises(ValueError, match=r"x must have shape \(batch, 2, 12, 8\), got \(3, 2, 8, 12\)"):
        M2ViTModel(vit_config())(torch.ones(3, 2, 8, 12))
    with pytest.raises(ValueError, match="patch_size must divide image_size"):
        vit_config(patch_size=5)


@pytest.mark.parametrize("mode", ["causal", "bidirectional"])
@pytest.mark.parametrize("length", [1, 2, 3, 13])
@pytest.mark.parametrize("residual", [False, True])
def test_mixer_is_its_formula(mode, length, residual):
    torch.manual_seed(0)
    mixer = M2SequenceMixer(6, 13, mode, residual=residual, width=8).double()
    x = torch.randn(2, length, 6, dtype=torch.float64)
    x1, x2, v = mixer.short(mixer.project(x).mT).chunk(3, 1)

    def convolve(layer, u):
        taps = layer.filter(length)
        return long_convolution(u, taps[0], taps[1] if mode == "bidirectional" else None, layer.skip)

    y = x2 * convolve(mixer.long, x1 * v)
    if residual:
        y = y + convolve(mixer.residual, x.mT)
    assert relative_error(mixer(x).detach(), mixer.out(y.mT).detach()) <= 1e-12


def test_mixer_refuses_more_than_its_length():
    with pytest.raises(ValueError, match="at most 13"):
        M2SequenceMixer(6, 13, width=8)(torch.ones(1, 14, 6))
    with pytest.raises(ValueError, match="mode must be 'causal' or 'bidirectional', got 'circular'"):
        M2SequenceMixer(6, 13, "circular")


@pytest.mark.parametrize("dim", [1, 6, 7])
@pytest.mark.parametrize("hidden", [1, 5, 8])
def test_mlp_is_its_formula(dim, hidden):
    torch.manual_seed(0)
    for structure in (None, structmat.BlockDiagonalConfig(nblocks=1), structmat.MonarchConfig(nblocks=1).to_dict()):
        mlp = M2MLP(dim, hidden, structure).double()
        gate, out = (
            layer.weight if isinstance(layer.weight, torch.Tensor) else layer.weight().to_dense()
            for layer in (mlp.gate, mlp.out)
        )
        x = torch.randn(3, 2, dim, dtype=torch.float64)
        a, b = (x @ gate.T).split(hidden, -1)
        expected = F.gelu(a) * b @ out.T + mlp.out.bias
        assert relative_error(mlp(x).detach(), expected.detach()) <= 1e-12
