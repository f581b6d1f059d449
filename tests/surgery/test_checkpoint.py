"""save_file and load_file."""

from __future__ import annotations

import copy
import json

import pytest
import safetensors.torch
import torch
from torch import nn

import structmat
from structmat import surgery
from structmat.surgery.spec import KEY
from structmat.surgery.stream import TensorFile

CONFIG = {"0": structmat.MonarchConfig(nblocks=(3, 2)), "2": structmat.LowRankConfig(rank=3)}


def dense(seed=0, **kwargs):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(24, 30, **kwargs), nn.LayerNorm(30, **kwargs), nn.Linear(30, 20, bias=False, **kwargs)
    )


@pytest.fixture
def saved(tmp_path):
    model = dense()
    surgery.compress_(model, CONFIG)
    surgery.save_file(model, tmp_path / "model.safetensors")
    return model, tmp_path / "model.safetensors"


def edit(path, change):
    """Rewrite a file with its tensors and metadata changed by ``change(tensors, metadata)``."""
    file = TensorFile(path)
    tensors, metadata = {name: file.read(name) for name in file.entries}, dict(file.metadata)
    change(tensors, metadata)
    safetensors.torch.save_file(tensors, path, metadata)


def assert_equal_states(a, b):
    assert list(a.state_dict()) == list(b.state_dict())
    for key, value in a.state_dict().items():
        assert b.state_dict()[key].dtype == value.dtype
        assert torch.equal(b.state_dict()[key], value), key


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_round_trip_is_bit_equal(tmp_path, dtype):
    model = dense(dtype=dtype)
    surgery.compress_(model, CONFIG)
    surgery.save_file(model, tmp_path / "m.safetensors", metadata={"note": "mine"})
    other = dense(seed=1, dtype=dtype).eval().requires_grad_(False)
    assert surgery.load_file(other, tmp_path / "m.safetensors") == ([], [])
    assert_equal_states(model, other)
    assert type(other[0]) is structmat.nn.MonarchLinear
    assert type(other[2]) is structmat.nn.LowRankLinear
    assert not any(p.requires_grad for p in other.parameters())
    assert not any(m.training for m in other.modules())
    x = torch.randn(3, 24, dtype=dtype)
    assert torch.equal(model(x), other(x))
    assert TensorFile(tmp_path / "m.safetensors").metadata["note"] == "mine"
    # Any reader of the format gets the same numbers.
    tensors = safetensors.torch.load_file(tmp_path / "m.safetensors")
    assert set(tensors) == set(model.state_dict())
    assert all(torch.equal(tensors[key], value) for key, value in model.state_dict().items())


def test_loading_into_a_structured_model(saved):
    model, path = saved
    same = copy.deepcopy(model)
    with torch.no_grad():
        for p in same.parameters():
            p.zero_()
    layer = same[0]
    surgery.load_file(same, path)
    assert same[0] is layer
    assert_equal_states(model, same)
    other = dense(1)
    surgery.compress_(other, structmat.BlockDiagonalConfig(nblocks=2))
    surgery.load_file(other, path)
    assert type(other[0]) is structmat.nn.MonarchLinear
    assert_equal_states(model, other)


def test_dtype_of_the_model_wins(saved):
    model, path = saved
    other = dense(1, dtype=torch.bfloat16)
    surgery.load_file(other, path)
    assert {p.dtype for p in other.parameters()} == {torch.bfloat16}
    for key, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[key], value.to(torch.bfloat16)), key


def test_lazy_products_permutations_and_shared_factors(tmp_path):
    torch.manual_seed(0)
    M = structmat.Monarch.random((12, 12), 3)
    A = structmat.Product((M, structmat.Permutation.random((12, 12)), M, structmat.Diagonal.random((12, 12))))
    model = nn.Sequential(structmat.nn.StructuredLinear(A), nn.Linear(12, 12))
    assert model[0].weight.factors[0].left is model[0].weight.factors[2].left
    surgery.save_file(model, tmp_path / "m.safetensors")
    other = nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 12)).double()
    surgery.load_file(other, tmp_path / "m.safetensors")
    assert other[0].weight.factors[0].left is other[0].weight.factors[2].left
    assert other[0].weight.factors[1].perm.dtype == torch.int64
    x = torch.randn(3, 12, dtype=torch.float64)
    torch.testing.assert_close(other(x), copy.deepcopy(model).double()(x), rtol=1e-14, atol=1e-14)


def test_shared_modules_and_tied_parameters(tmp_path):
    def build():
        shared = nn.Linear(8, 8)
        model = nn.ModuleDict({"a": shared, "b": shared, "embed": nn.Embedding(5, 8), "head": nn.Linear(8, 5)})
        model["head"].weight = model["embed"].weight
        return model

    model = build()
    surgery.compress_(model, structmat.LowRankConfig(rank=2))
    surgery.save_file(model, tmp_path / "m.safetensors")
    assert set(TensorFile(tmp_path / "m.safetensors").entries) == {
        "a.weight.left",
        "a.weight.right",
        "a.bias",
        "embed.weight",
        "head.bias",
    }
    other = build()
    assert surgery.load_file(other, tmp_path / "m.safetensors") == ([], [])
    assert other["a"] is other["b"]
    assert other["head"].weight is other["embed"].weight
    assert_equal_states(model, other)
    # A model without the ties gets the values all the same.
    untied = nn.ModuleDict({k: copy.deepcopy(m) for k, m in build().items()})
    assert surgery.load_file(untied, tmp_path / "m.safetensors") == ([], [])
    assert untied["a"] is not untied["b"]
    assert_equal_states(model, untied)


def test_plain_dense_files(tmp_path):
    model, other = dense(), dense(1)
    safetensors.torch.save_file(model.state_dict(), tmp_path / "m.safetensors")
    surgery.load_file(other, tmp_path / "m.safetensors")
    assert_equal_states(model, other)
    surgery.compress_(other, CONFIG)
    with pytest.raises(ValueError, match=r"missing in the file: 0.weight.left.*\n.*not in the model: 0.weight"):
        surgery.load_file(other, tmp_path / "m.safetensors")


def test_an_own_class_comes_back_if_imported(tmp_path):
    class Loud(structmat.nn.LowRankLinear):
        pass

    model = nn.Sequential(Loud(4, 4, rank=2))
    surgery.save_file(model, tmp_path / "m.safetensors")
    other = nn.Sequential(nn.Linear(4, 4))
    surgery.load_file(other, tmp_path / "m.safetensors")
    assert type(other[0]) is Loud


# ---------------------------------------------------------------- errors
def assert_refused(model, path, match):
    modules = list(model.named_modules())
    values = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=match):
        surgery.load_file(model, path)
    assert list(model.named_modules()) == modules
    for key, value in model.state_dict().items():
        assert value.is_meta or torch.equal(value, values[key])


def change_layers(change):
    def edited(tensors, metadata):
        data = json.loads(metadata[KEY])
        change(data)
        metadata[KEY] = json.dumps(data)

    return edited


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda t, m: t.pop("1.bias"), "missing in the file: 1.bias"),
        (lambda t, m: t.update(extra=torch.ones(2)), "not in the model: extra"),
        (lambda t, m: t.update({"1.bias": torch.ones(3)}), r"1.bias has shape \(3,\) in the file and \(30,\)"),
        (lambda t, m: t.pop("0.weight.left"), "'0' cannot be made: .* has no tensor 0.weight.left"),
        (lambda t, m: t.update({"0.weight.left": torch.ones(2, 2, 2)}), "'0' cannot be made: left .* k q = l r"),
        (lambda t, m: t.update({"0.weight.left": torch.ones(2, 15, 12, dtype=torch.complex64)}), "cannot be made"),
        (lambda t, m: m.update({KEY: "{"}), "structured layers is malformed"),
        (lambda t, m: m.update({KEY: "[]"}), "structured layers is malformed"),
        (change_layers(lambda d: d.update(version=2)), "format version 2, this structmat reads version 1"),
        (change_layers(lambda d: d["layers"]["0"].pop("matrix")), "structured layers is malformed"),
        (change_layers(lambda d: d["layers"]["0"].update({"matrix": 3})), "structured layers is malformed"),
        (change_layers(lambda d: d["layers"]["0"].update({"class": "Nope"})), "'Nope' is not a known subclass"),
        (change_layers(lambda d: d["layers"]["0"]["matrix"].update({"class": "Nope"})), "'Nope' is not a known"),
        (change_layers(lambda d: d["layers"]["0"]["matrix"]["static"].update(nrows=29)), r"\(29, 24\), not \(30, 24\)"),
        (change_layers(lambda d: d["layers"]["0"]["matrix"]["static"].update(odd=1)), "cannot be made"),
        (change_layers(lambda d: d["layers"]["0"].update(shape=[24, 30])), "of shape .24, 30., the model's"),
        (change_layers(lambda d: d["layers"].update(gone=d["layers"]["0"])), "layer 'gone', the model has no module"),
        (change_layers(lambda d: d["layers"].update({"1": d["layers"]["0"]})), "'1' cannot become one: it is a Layer"),
        (change_layers(lambda d: d["layers"]["0"].update(conv1d=True)), r"read as \(in, out\).*is a Linear"),
    ],
)
def test_files_that_do_not_fit(saved, change, match):
    _, path = saved
    edit(path, change)
    assert_refused(dense(1), path, f"(?s){match}")


def test_models_that_do_not_fit(saved):
    _, path = saved
    assert_refused(dense(device="meta"), path, "on the meta device")
    assert_refused(nn.Sequential(*dense()[:2]), path, "'2', the model has no module")
    odd = dense()
    torch.nn.utils.parametrizations.weight_norm(odd[0])
    with pytest.raises(ValueError, match="'0' cannot become one: it is parametrized"):
        surgery.load_file(odd, path)
    with pytest.raises(TypeError, match=r"must be a torch.nn.Module"):
        surgery.load_file({}, path)


def test_not_strict(saved):
    model, path = saved
    edit(path, lambda t, m: (t.pop("1.bias"), t.update(extra=torch.ones(2))))
    other = dense(1)
    assert surgery.load_file(other, path, strict=False) == (["1.bias"], ["extra"])
    assert torch.equal(other[1].weight, model[1].weight)


@pytest.mark.parametrize("keep", [0, 4, 8, 100, -1])
def test_truncated_files(saved, keep):
    _, path = saved
    path.write_bytes(path.read_bytes()[:keep])
    assert_refused(dense(1), path, "is not a safetensors file|is cut short")


def test_not_a_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        surgery.load_file(dense(), tmp_path / "none.safetensors")
    (tmp_path / "text").write_text("hello, this is not what you want")
    assert_refused(dense(), tmp_path / "text", "is not a safetensors file")


def test_what_cannot_be_saved(tmp_path):
    path = tmp_path / "m.safetensors"
    with pytest.raises(ValueError, match=r"0.weight is on the meta device"):
        surgery.save_file(dense(device="meta"), path)
    with pytest.raises(ValueError, match=r"weight.*complex128.*convert it to complex64"):
        surgery.save_file(nn.Linear(2, 2, dtype=torch.complex128), path)
    with pytest.raises(ValueError, match="'structmat' of the metadata is taken"):
        surgery.save_file(dense(), path, metadata={"structmat": "x"})

    class Extra(nn.Linear):
        def get_extra_state(self):
            return {"any": "thing"}

    with pytest.raises(TypeError, match="_extra_state in the state dict is a dict"):
        surgery.save_file(Extra(2, 2), path)
    with pytest.raises(FileNotFoundError, match=r"no/m.safetensors"):
        surgery.save_file(dense(), tmp_path / "no" / "m.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_save_leaves_the_old_file(saved, monkeypatch):
    model, path = saved
    old = path.read_bytes()
    with torch.no_grad():
        model[1].weight.add_(1)

    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("structmat.surgery.stream.TensorWriter.write_chunks", stop)
    with pytest.raises(KeyboardInterrupt):
        surgery.save_file(model, path)
    assert path.read_bytes() == old
    assert list(path.parent.iterdir()) == [path]
    monkeypatch.undo()
    surgery.save_file(model, path)
    assert path.read_bytes() != old


def test_hooks_survive_a_load(saved):
    _, path = saved
    model, seen = dense(1), []
    model[0].register_forward_hook(lambda *args: seen.append(1))
    surgery.load_file(model, path)
    model(torch.randn(2, 24))
    edit(path, lambda t, m: t.update({"1.bias": torch.ones(3)}))
    again = dense(1)
    handle = again[0].register_forward_hook(lambda *args: seen.append(2))
    assert_refused(again, path, "1.bias has shape")
    again(torch.randn(2, 24))
    handle.remove()
    again(torch.randn(2, 24))
    assert seen == [1, 2]
