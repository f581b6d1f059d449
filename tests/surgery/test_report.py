"""Report: totals, table, JSON and plot."""

from __future__ import annotations

import builtins
import json

import pytest
import torch
from torch import nn

import structmat
from structmat import surgery


def model(layers=3):
    torch.manual_seed(0)
    return nn.ModuleDict(
        {"encoder": nn.Sequential(*(nn.Linear(16, 16) for _ in range(layers))), "head": nn.Linear(16, 4)}
    )


@pytest.fixture
def report():
    return surgery.compress_(model(), {"encoder.*": structmat.LowRankConfig(rank=4)})


def test_totals(report):
    assert (report.params_before, report.params_after) == (3 * 256, 3 * 128)
    assert (report.flops_before, report.flops_after) == (3 * 512, 3 * 256)
    assert (report.model_params_before, report.model_params_after) == (3 * 272 + 68, 3 * 144 + 68)
    assert report.mean_error == pytest.approx(sum(row.error for row in report.compressed) / 3)
    assert report.seconds == sum(row.seconds for row in report.compressed) > 0
    assert all(0 < row.error < 1 and row.bound == pytest.approx(row.error, rel=1e-4) for row in report.compressed)


def test_table_is_aligned(report):
    lines = report.table().splitlines()
    assert lines == str(report).splitlines()
    assert lines[0].split() == ["layer", "shape", "structure", "params", "share", "flops", "error", "time"]
    assert lines[2].startswith("encoder.0  16x16  lowrank 4  256 -> 128  50.0%    512 -> 256  0.")
    assert len({line.index("lowrank") for line in lines[2:5]}) == 1
    assert len({len(line) for line in lines[:7]}) == 1
    assert lines[6].split()[:8] == ["3", "layers", "768", "->", "384", "50.0%", "1,536", "->"]
    assert lines[7] == "whole model: 884 -> 500 parameters (56.6%)"
    assert lines[8] == "left alone, no pattern matches its name: 1 (head)"
    assert len(lines) == 9


def test_json_round_trip(report, tmp_path):
    report.save(tmp_path / "r.json")
    text = (tmp_path / "r.json").read_text()
    assert surgery.Report.from_json(text) == report
    data = json.loads(text)
    assert data["totals"]["params_after"] == report.params_after
    assert data["rows"][0]["error"] == report.rows[0].error
    for broken in ("", "[]", "{}", '{"rows": [{}]}', '{"rows": 3, "unused_patterns": []}'):
        with pytest.raises(ValueError, match="not the JSON of a Report"):
            surgery.Report.from_json(broken)


def image_size(path):
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG")
    return int.from_bytes(data[16:20]), int.from_bytes(data[20:24])


@pytest.mark.parametrize("layers", [1, 36, 121])
@pytest.mark.parametrize("dry_run", [False, True])
def test_plot(tmp_path, layers, dry_run):
    pytest.importorskip("matplotlib")
    report = surgery.compress_(model(layers), {"encoder.*": structmat.LowRankConfig(rank=4)}, dry_run=dry_run)
    report.plot(tmp_path / "r.png")
    width, height = image_size(tmp_path / "r.png")
    assert width == 1500
    # A fifth of an inch for each name, so that they can be read; beyond 120 there are none.
    assert height == pytest.approx(150 * (13 if layers > 120 else 1.9 + 0.21 * max(layers, 5)), abs=1)


def test_plot_names_every_layer_once(tmp_path, report):
    pytest.importorskip("matplotlib")
    report.plot(tmp_path / "r.svg")
    text = (tmp_path / "r.svg").read_text()
    for words in ("<!-- 2 -->", "relative error", "bound of the structure", "3 layers of encoder"):
        assert words in text, words


def test_plot_errors(tmp_path, report, monkeypatch):
    pytest.importorskip("matplotlib")
    with pytest.raises(ValueError, match=r"r.xyz: a plot's suffix must be one of"):
        report.plot(tmp_path / "r.xyz")
    with pytest.raises(ValueError, match="no replaced layer"):
        surgery.Report((), 0, 0).plot(tmp_path / "r.png")
    real = builtins.__import__

    def without_matplotlib(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_matplotlib)
    with pytest.raises(ImportError, match=r"pip install structmat\[demo\]"):
        report.plot(tmp_path / "r.png")


@pytest.mark.parametrize("progress", [None, False, True])
def test_progress_bar(capsys, progress):
    surgery.compress_(model(), structmat.LowRankConfig(rank=2), progress=progress)
    assert ("compressing" in capsys.readouterr().err) == (progress is True)  # the tests run without a terminal
