"""Calibrations as files."""

from __future__ import annotations

import json
import struct

import pytest
import torch
from torch import nn

from structmat import surgery

KEY = "structmat.calibration"


@pytest.fixture(params=[torch.float32, torch.complex64], ids=["real", "complex"])
def calibration(request):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.unseen = nn.Linear(2, 3), nn.Linear(2, 2), nn.Linear(2, 2)
            self.alias = self.a

        def forward(self, x):
            return self.a(x).abs().sum() + self.b(x).abs().square().sum()

    torch.manual_seed(0)
    x = torch.randn(7, 2, dtype=request.param)
    return surgery.calibrate(Model().to(request.param), [x], gradients=True, loss_fn=lambda y, _: y)


def test_round_trip_is_exact(calibration, tmp_path):
    path = tmp_path / "calibration.safetensors"
    calibration.save(path)
    loaded = surgery.Calibration.load(path)
    assert repr(loaded) == repr(calibration)
    assert list(loaded) == ["a", "b"] and loaded.unseen == ("unseen",) and loaded.gradients
    assert loaded["alias"] is loaded["a"] and loaded.shapes == calibration.shapes
    for name, moments in calibration.items():
        for key in ("inputs", "mean", "outputs"):
            got, expected = getattr(loaded[name], key), getattr(moments, key)
            assert got.dtype == expected.dtype and torch.equal(got, expected)
        assert loaded[name].count == moments.count == 7
    assert loaded["a"].inputs is loaded["b"].inputs
    assert [p.name for p in tmp_path.iterdir()] == [path.name]  # no temporary file


def test_damaged_and_foreign_files(calibration, tmp_path):
    path = tmp_path / "calibration.safetensors"
    calibration.save(path)
    data = path.read_bytes()
    for broken in (b"", data[:20], data[:-8], b"x" * 100):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=str(path)):
            surgery.Calibration.load(path)
    surgery.save_file(nn.Linear(2, 2), path)
    with pytest.raises(ValueError, match=r"is not a calibration: its header has no 'structmat\.calibration'"):
        surgery.Calibration.load(path)
    with pytest.raises(FileNotFoundError):
        surgery.Calibration.load(tmp_path / "nothing")


def edit(path, change):
    """Rewrite the description in a file's header."""
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    text = json.loads(header["__metadata__"][KEY])
    change(text)
    header["__metadata__"][KEY] = json.dumps(text)
    new = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(new)) + new + data[8 + length :])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.update(version=2), "it is of version 2, this structmat reads 1"),
        (lambda text: text["layers"]["a"].update(shape=[3, 5]), "the moments of a are not of its shape"),
        (lambda text: text["layers"]["b"].update(inputs="nothing"), "nothing"),
        (lambda text: text["layers"]["b"].update(count=-1), "count must be positive"),
        (lambda text: text["layers"]["b"].update(mean=text["layers"]["b"]["inputs"]), "must have shape"),
        (lambda text: text.pop("aliases"), "aliases"),
        (lambda text: text.update(layers=[]), "is not a calibration that can be read"),
    ],
)
def test_descriptions_that_do_not_fit(calibration, tmp_path, change, message):
    path = tmp_path / "calibration.safetensors"
    calibration.save(path)
    edit(path, change)
    with pytest.raises(ValueError, match=message):
        surgery.Calibration.load(path)


def test_a_failed_save_leaves_the_old_file(calibration, tmp_path, monkeypatch):
    path = tmp_path / "calibration.safetensors"
    path.write_bytes(b"old")
    monkeypatch.setattr("structmat.surgery.stream.TensorWriter.write", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        calibration.save(path)
    assert path.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1
