"""The Fashion-MNIST example: its own layers against their definitions, idx files, and a quick run of all layers."""

import csv
import gzip
import importlib.util
import json
import struct
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch

SCRIPT = Path(__file__).resolve().parents[1] / "examples" / "fashion_mnist.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("fashion_mnist", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_idx(path, array):
    data = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Idx files of a few images of noise, a bright row of which tells the label; the test files are gzipped."""
    path, rng = tmp_path_factory.mktemp("idx"), np.random.default_rng(0)
    for part, count, end in (("train", 240, ""), ("t10k", 40, ".gz")):
        labels = np.arange(count) % 10
        images = rng.integers(0, 100, (count, 28, 28))
        images[np.arange(count), 2 * labels + 4] = 255
        write_idx(path / f"{part}-images-idx3-ubyte{end}", images)
        write_idx(path / f"{part}-labels-idx1-ubyte{end}", labels)
    return path


@pytest.mark.parametrize(("n", "rank"), [(1, 1), (2, 1), (5, 2), (12, 3)])
def test_toeplitz_like_is_a_sum_of_circulants_times_skew_circulants(example, n, rank):
    torch.manual_seed(n)
    layer = example.ToeplitzLikeLinear(n, rank).double()
    D = layer.displacement()
    left, right = D.left.detach().numpy(), D.right.detach().numpy()
    expected = np.zeros((n, n))
    for g, last_row in zip(left.T, right, strict=True):
        column = last_row[::-1]
        skew = scipy.linalg.toeplitz(column, np.concatenate([column[:1], -column[:0:-1]]))
        assert np.allclose(skew[-1], last_row)
        expected += scipy.linalg.circulant(g) @ skew
    # Z T - T Z' is twice the generators' product, and the layer scales by 2 / sqrt(n).
    T = layer.matrix().detach().numpy()
    assert np.linalg.norm(T - expected / np.sqrt(n)) <= 1e-13 * np.linalg.norm(T)
    x = torch.randn(3, n, dtype=torch.float64)
    assert torch.allclose(layer(x), x @ torch.from_numpy(T).T + layer.bias)


def test_circulant_layer_is_scipys(example):
    layer = example.CirculantLinear(12).double()
    x = torch.randn(3, 12, dtype=torch.float64)
    C = torch.from_numpy(scipy.linalg.circulant(layer.column.detach().numpy()))
    assert torch.allclose(layer(x), x @ C.T)


def test_own_layers_have_the_variance_of_a_dense_one(example):
    torch.manual_seed(0)
    x = torch.randn(500, example.N)
    for name in ("circulant", "Toeplitz-like, r = 11"):
        assert example.LAYERS[name]()(x).std().item() == pytest.approx(3**-0.5, rel=0.1), name


def test_layers_of_a_budget_are_equally_large(example):
    sizes = [example.num_weights(make()) for make in example.LAYERS.values()]
    assert sizes == [784**2, 784] + [17248] * 6 + [34496] * 6


def test_quick_run(example, folder, tmp_path, capsys):
    example.main(["--data", str(folder), "--quick", "--out", str(tmp_path)])
    rows = list(csv.DictReader((tmp_path / "fashion-mnist.csv").open()))
    assert [row["layer"] for row in rows] == list(example.LAYERS)
    assert all(0 <= float(row["accuracy_mean"]) <= 100 for row in rows)
    facts = json.loads((tmp_path / "fashion-mnist.json").read_text())
    assert (facts["train_images"], facts["validation_images"], facts["test_images"]) == (240, 40, 40)
    assert "| butterfly | 17,248 | 35.6 |" in capsys.readouterr().out


def test_a_butterfly_learns(example, folder):
    (x, y), (x_test, y_test) = example.load(folder, "train"), example.load(folder, "t10k")
    torch.manual_seed(0)
    model = example.train("butterfly", 1e-2, 0, x, y, epochs=40)
    assert example.accuracy(model, x_test, y_test) >= 90


def test_missing_and_broken_files_are_named(example, folder, tmp_path):
    with pytest.raises(SystemExit, match=r"no train-images-idx3-ubyte\[.gz\] in .*dataset-fashion-mnist"):
        example.main(["--data", str(tmp_path)])
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(b"\0\0\x08\x01\0\0\0\x05ab")
    with pytest.raises(SystemExit, match="not an idx file"):
        example.read_idx(tmp_path, "t10k-labels-idx1-ubyte")
    (tmp_path / "train-labels-idx1-ubyte").write_bytes((folder / "train-labels-idx1-ubyte").read_bytes())
    write_idx(tmp_path / "train-images-idx3-ubyte", np.zeros((240, 8, 8)))
    with pytest.raises(SystemExit, match="28 x 28"):
        example.load(tmp_path, "train")
