"""Compressed models exported: the graphs hold factors, never the dense weights, and compute the same."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import structmat
from structmat import surgery

CONFIGS = [
    structmat.MonarchConfig(nblocks=4, ratio=0.5),
    structmat.LowRankConfig(ratio=0.25),
    structmat.BlockDiagonalConfig(nblocks=4),
    structmat.PixelflyConfig(ratio=0.5, block=8),
    structmat.ButterflyConfig(),
]


class Logits(nn.Module):
    """A transformers model with a tensor for an output."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids):
        found = self.model(input_ids, use_cache=False) if "GPT2" in type(self.model).__name__ else self.model(input_ids)
        return found.logits if hasattr(found, "logits") else found.last_hidden_state


def stack(config):
    m, n = (256, 256) if config.structure == "butterfly" else (48, 96)  # a small butterfly is multiplied as one block
    model = nn.Sequential(nn.Linear(m, n), nn.GELU(), nn.Linear(n, m, bias=False))
    surgery.compress_(model, config)
    return model.eval(), torch.randn(3, m)


def bert(config):
    transformers = pytest.importorskip("transformers")
    sizes = {"num_attention_heads": 2, "intermediate_size": 64, "max_position_embeddings": 16, "num_hidden_layers": 1}
    made = transformers.BertConfig(vocab_size=50, hidden_size=32, attn_implementation="eager", **sizes)
    model = Logits(transformers.BertModel(made, add_pooling_layer=False))
    surgery.compress_(model, config)
    return model.eval(), torch.randint(50, (3, 9))


def gpt2(config):
    transformers = pytest.importorskip("transformers")
    made = transformers.GPT2Config(
        n_embd=32, n_layer=1, n_head=2, n_positions=16, vocab_size=50, attn_implementation="eager"
    )
    model = Logits(transformers.GPT2LMHeadModel(made))
    surgery.compress_(model, config)
    return model.eval(), torch.randint(50, (3, 9))


def cases(*slow):
    """Every structure in a stack, and two in real architectures; those of slow makers are for `make slow`."""
    every = [(stack, config) for config in CONFIGS] + [(make, c) for make in (bert, gpt2) for c in CONFIGS[:2]]
    return [
        pytest.param(*case, id=f"{case[0].__name__}-{case[1].structure}", marks=[pytest.mark.slow] * (case[0] in slow))
        for case in every
    ]


def made(make, config):
    torch.manual_seed(0)
    model, inputs = make(config)
    with torch.no_grad():
        return model, inputs, model(inputs)


def dense_shapes(model):
    """The shapes that the dense weights of the structured layers would have, in either layout."""
    layers = [m for m in model.modules() if isinstance(m, structmat.nn.StructuredLinear)]
    assert layers
    return {shape for m in layers for shape in ((m.out_features, m.in_features), (m.in_features, m.out_features))}


def squeezed(shape):
    return tuple(size for size in shape if size != 1)


def error(found, expected):
    return (torch.linalg.vector_norm(found - expected) / torch.linalg.vector_norm(expected)).item()


@pytest.mark.parametrize(("make", "config"), cases())
def test_export_with_any_batch(make, config):
    model, inputs, _ = made(make, config)
    program = torch.export.export(model, (inputs,), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},))
    assert not dense_shapes(model) & {squeezed(t.shape) for t in (*program.parameters(), *program.buffers())}
    for batch in (inputs, torch.cat([inputs, inputs.flip(0), inputs]), inputs[:2]):
        assert error(program.module()(batch), model(batch)) < 1e-6


@pytest.mark.parametrize(("make", "config"), cases(bert, gpt2))
def test_compile(make, config):
    model, inputs, expected = made(make, config)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    assert error(compiled(inputs), expected) < 1e-6
    assert error(compiled(torch.cat([inputs, inputs])), torch.cat([expected, expected])) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize(("make", "config"), cases())
def test_onnx(make, config, tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    model, inputs, _ = made(make, config)
    shapes = ({0: torch.export.Dim("batch", min=1, max=64)},)
    path = str(tmp_path / "model.onnx")
    torch.onnx.export(model, (inputs,), path, dynamo=True, dynamic_shapes=shapes, external_data=False, verbose=False)
    graph = onnx.load(path).graph
    sizes = [torch.Size(tensor.dims).numel() for tensor in graph.initializer]
    assert not dense_shapes(model) & {squeezed(tensor.dims) for tensor in graph.initializer}
    layers = [m for m in model.modules() if isinstance(m, structmat.nn.StructuredLinear)]
    factors = sum(p.numel() for layer in layers for p in layer.weight.parameters())
    others = sum(p.numel() for p in model.parameters()) - factors
    # Of a butterfly the graph holds the two block-diagonal factors that it is multiplied as: more than its parameters.
    assert factors <= sum(sizes) < others + 0.75 * sum(m.in_features * m.out_features for m in layers)
    runtime = pytest.importorskip("onnxruntime")
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    for batch in (inputs, torch.cat([inputs, inputs])):
        found = torch.from_numpy(session.run(None, {name: batch.numpy()})[0])
        with torch.no_grad():
            assert error(found, model(batch)) < 1e-5
