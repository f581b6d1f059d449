"""The reader and writer of safetensors files, against the reference implementation."""

from __future__ import annotations

import json
import stat
import struct

import pytest
import safetensors.torch
import torch

from structmat.surgery.stream import DTYPES, Entry, TensorFile, tensor_writer


def tensors():
    torch.manual_seed(0)
    made = {}
    for name, dtype in DTYPES.items():
        values = torch.randint(0, 2, (3, 5))
        made[f"t.{name}"] = values.to(dtype)
    made |= {"scalar": torch.tensor(1.5), "empty": torch.empty(0, 4), "strided": torch.randn(4, 6).T[1:]}
    return made


def write(path, items, metadata=None):
    with tensor_writer(path, {k: Entry.of(k, t) for k, t in items.items()}, metadata or {}) as writer:
        for name in reversed(items):  # any order
            writer.write(name, items[name])


def test_every_dtype_both_ways(tmp_path):
    items = tensors()
    write(tmp_path / "ours", items, {"note": "ä"})
    theirs = safetensors.torch.load_file(tmp_path / "ours")
    assert set(theirs) == set(items)
    for name, tensor in items.items():
        assert theirs[name].dtype == tensor.dtype
        assert torch.equal(theirs[name].view(tensor.shape).to(torch.complex64), tensor.to(torch.complex64)), name
    safetensors.torch.save_file({k: t.contiguous() for k, t in items.items()}, tmp_path / "theirs", {"note": "ä"})
    for file in (TensorFile(tmp_path / "ours"), TensorFile(tmp_path / "theirs")):
        assert file.metadata == {"note": "ä"}
        for name, tensor in items.items():
            read = file.read(name)
            assert (read.dtype, read.shape) == (tensor.dtype, tensor.shape)
            assert torch.equal(read.to(torch.complex64), tensor.to(torch.complex64)), name
            assert b"".join(file.chunks(name)) == read.flatten().view(torch.uint8).numpy().tobytes()
    aligned = TensorFile(tmp_path / "ours")
    assert all(e.start % DTYPES[e.dtype].itemsize == 0 for e in aligned.entries.values())


def test_conjugated_and_negated_views(tmp_path):
    z = torch.randn(3, dtype=torch.complex64)
    write(tmp_path / "z", {"conj": z.conj(), "neg": z.conj().imag})
    assert torch.equal(TensorFile(tmp_path / "z").read("conj"), z.conj().resolve_conj())
    assert torch.equal(TensorFile(tmp_path / "z").read("neg"), -z.imag)


def test_unknown_dtypes_are_carried_but_not_read(tmp_path):
    header = json.dumps({"x": {"dtype": "F4", "shape": [4], "data_offsets": [0, 2]}}).encode()
    (tmp_path / "f4").write_bytes(struct.pack("<Q", len(header)) + header + b"ab")
    file = TensorFile(tmp_path / "f4")
    with pytest.raises(ValueError, match="x has dtype F4, which torch"):
        file.read("x")
    with tensor_writer(tmp_path / "copy", file.entries, {}) as writer:
        writer.write_chunks("x", file.chunks("x"))
    assert list(TensorFile(tmp_path / "copy").chunks("x")) == [b"ab"]


@pytest.mark.parametrize(
    ("header", "data", "why"),
    [
        ("[1]", b"", "not a JSON object"),
        ("{,}", b"", "not JSON"),
        ('{"x": 3}', b"", "entry of 'x' is malformed"),
        ('{"x": {"dtype": "U8", "shape": [2], "data_offsets": [0, 3]}}', b"abc", "has 3 bytes"),
        ('{"x": {"dtype": "U8", "shape": [-2], "data_offsets": [0, 2]}}', b"ab", "of shape"),
        ('{"x": {"dtype": "U8", "shape": [2], "data_offsets": [1, 3]}}', b"abc", "overlap or leave gaps"),
        ('{"x": {"dtype": "U8", "shape": [2], "data_offsets": [-2, 0]}}', b"", "overlap or leave gaps"),
        ('{"x": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}}', b"abc", "1 bytes follow"),
        ('{"x": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}}', b"a", "cut short"),
        ('{"__metadata__": [1]}', b"", "metadata are not"),
    ],
)
def test_damaged_files(tmp_path, header, data, why):
    (tmp_path / "bad").write_bytes(struct.pack("<Q", len(header)) + header.encode() + data)
    with pytest.raises(ValueError, match=why):
        TensorFile(tmp_path / "bad")


def test_the_writer_checks_what_it_is_given(tmp_path):
    path, x = tmp_path / "x", torch.ones(2)
    with pytest.raises(ValueError, match="left without x"), tensor_writer(path, {"x": Entry.of("x", x)}, {}):
        pass
    with pytest.raises(ValueError, match="was announced as F32"), tensor_writer(path, {"x": Entry.of("x", x)}, {}) as w:
        w.write("x", x.double())
    with pytest.raises(ValueError, match="has 1 bytes, 8 were"), tensor_writer(path, {"x": Entry.of("x", x)}, {}) as w:
        w.write_chunks("x", [b"a"])
    assert list(tmp_path.iterdir()) == []


def test_permissions_are_those_of_any_new_file(tmp_path):
    write(tmp_path / "x", {"x": torch.ones(2)})
    (tmp_path / "plain").touch()
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)
