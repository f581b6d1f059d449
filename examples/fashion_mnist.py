"""Compress the hidden layer of a small network on Fashion-MNIST with structured matrices of equal size.

The network is 784 -> 784 -> ReLU -> 10, as in section 4.2 of Dao et al. 2019, "Learning fast algorithms for linear
transforms using butterfly factorizations". Its hidden layer's 784 x 784 weight is dense, or structured with one of two
numbers of parameters: that of a butterfly over the prime factors of 784, 2·2·2·2·7·7, which needs no padding, and
twice that, a kaleidoscope's. All others are sized to have exactly as many, the circulant matrix excepted: it has 784.

Each layer is trained with AdamW at every learning rate of one grid on 50,000 of the 60,000 training images; the rate
that is best on the other 10,000 then trains it on all of them, from as many seeds as asked for. Only these models see
the test images, once, after the last epoch.

    apt-get install dataset-fashion-mnist    # or --data FOLDER with the four idx files, gzipped or not
    OMP_NUM_THREADS=1 python examples/fashion_mnist.py [--seeds 3] [--epochs 8] [--out demo-output]
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import math
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

import structmat
from structmat import LowRank, transforms
from structmat.nn import (
    ButterflyLinear,
    KaleidoscopeLinear,
    LowRankLinear,
    MatrixParameters,
    MonarchLinear,
    OrthogonalButterflyLinear,
    parameter_groups,
)

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
N, CLASSES = 28 * 28, 10
BATCH, WEIGHT_DECAY = 250, 0.01
RATES = (0.002, 0.005, 0.012, 0.03)
COLUMNS = ("layer", "weights", "compression", "rate", "accuracy_mean", "accuracy_std", "accuracies", "epoch_seconds")


# -------------------------------------------------------------------- layers
class CirculantLinear(nn.Module):
    """``y = C x + b`` with the circulant matrix C of a learned first column."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.column = nn.Parameter(torch.empty(n).uniform_(-(n**-0.5), n**-0.5))
        self.bias = nn.Parameter(torch.zeros(n))
        self.out_features = n

    def forward(self, x: Tensor) -> Tensor:
        return transforms.circulant(self.column).linear(x, self.bias)


class ToeplitzLikeLinear(nn.Module):
    """``y = T x + b`` with T a sum of r products of a circulant and a skew-circulant matrix.

    Such are the matrices of displacement rank r: ``Z T - T Z' = 2 G H`` with the cyclic shift Z, the skew one Z', the
    circulants' first columns for columns of G and the skew-circulants' last rows for rows of H (Sindhwani et al. 2015).
    Here the low-rank displacement is learned, scaled for nn.Linear's variance. T is made from it by sums along
    diagonals, in O(r n^2): once a batch, that is less work than 2 r FFTs for each of the batch's vectors.
    """

    def __init__(self, n: int, rank: int) -> None:
        super().__init__()
        self.displacement = MatrixParameters(LowRank.random((n, n), rank))
        self.bias = nn.Parameter(torch.zeros(n))
        self.out_features = n
        i, j = torch.arange(n)[:, None], torch.arange(n)
        self.register_buffer("diagonals", (i + j + 1) % n)
        self.register_buffer("back", (i - j) % n)

    def matrix(self) -> Tensor:
        """T, dense."""
        steps = self.displacement().to_dense().gather(0, self.diagonals)
        # An entry less its step is the next one on the diagonal; once around, all signs have changed.
        entries = steps.sum(1, keepdim=True) / 2 - steps.cumsum(1) + steps
        return 2 / math.sqrt(len(steps)) * entries.gather(0, self.back)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.matrix(), self.bias)


LAYERS: dict[str, Callable[[], Any]] = {
    "dense": lambda: nn.Linear(N, N),
    "circulant": lambda: CirculantLinear(N),
    "butterfly": lambda: ButterflyLinear(N, N),
    "orthogonal butterfly": lambda: OrthogonalButterflyLinear(N, N),
    "Monarch, 8 and 14 blocks": lambda: MonarchLinear(N, N, nblocks=(8, 14), rank=1),
    "Toeplitz-like, r = 11": lambda: ToeplitzLikeLinear(N, 11),
    "low rank, r = 11": lambda: LowRankLinear(N, N, rank=11),
    "dense, 22 hidden units": lambda: nn.Linear(N, 22),
    "kaleidoscope": lambda: KaleidoscopeLinear(N, N),
    "butterfly, radices 2, 14, 28": lambda: ButterflyLinear(N, N, radices=(2, 14, 28)),
    "Monarch, 16 and 28 blocks": lambda: MonarchLinear(N, N, nblocks=(16, 28), rank=1),
    "Toeplitz-like, r = 22": lambda: ToeplitzLikeLinear(N, 22),
    "low rank, r = 22": lambda: LowRankLinear(N, N, rank=22),
    "dense, 44 hidden units": lambda: nn.Linear(N, 44),
}


def num_weights(layer: nn.Module) -> int:
    """Parameters of the hidden layer without its bias."""
    return sum(p.numel() for name, p in layer.named_parameters() if name != "bias")


# -------------------------------------------------------------------- data
def read_idx(folder: Path, name: str) -> Tensor:
    """The bytes of an idx file, gzipped or not, in the shape that its header says."""
    paths = [folder / name, folder / f"{name}.gz"]
    path = next((p for p in paths if p.is_file()), None)
    if path is None:
        raise SystemExit(f"no {name}[.gz] in {folder}: apt-get install dataset-fashion-mnist, or --data FOLDER")
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    start = 4 + 4 * data[3] if len(data) > 3 else 0
    shape = np.frombuffer(data[4:start], ">u4").tolist()
    if data[:3] != b"\0\0\x08" or len(data) - start != math.prod(shape):
        raise SystemExit(f"{path} is not an idx file of bytes")
    return torch.from_numpy(np.frombuffer(data, np.uint8, offset=start).reshape(shape).copy())


def load(folder: Path, part: str) -> tuple[Tensor, Tensor]:
    """Images of shape (count, 784), from 0 to 1, and labels."""
    images, labels = read_idx(folder, f"{part}-images-idx3-ubyte"), read_idx(folder, f"{part}-labels-idx1-ubyte")
    if images.shape[1:] != (28, 28) or labels.shape != images.shape[:1]:
        shapes = f"{[*images.shape]} and {[*labels.shape]}"
        raise SystemExit(f"{folder}: {part} images must be 28 x 28 with a label each, got shapes {shapes}")
    return images.reshape(-1, N) / 255, labels.long()


# -------------------------------------------------------------------- training
def train(layer: str, rate: float, seed: int, x: Tensor, y: Tensor, epochs: int) -> nn.Module:
    """A network with this hidden layer, trained with a one-cycle schedule that ends at a rate of zero."""
    torch.manual_seed(seed)
    hidden = LAYERS[layer]()
    model = nn.Sequential(hidden, nn.ReLU(), nn.Linear(hidden.out_features, CLASSES))
    # The factors of structured weights are not decayed, dense ones are.
    optimizer = torch.optim.AdamW(parameter_groups(model, WEIGHT_DECAY), rate)
    steps = epochs * math.ceil(len(x) / BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps, pct_start=0.2, cycle_momentum=False)
    for _ in range(epochs):
        for batch in torch.randperm(len(x)).split(BATCH):
            nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    return model


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """In percent."""
    return (model(x).argmax(-1) == y).double().mean().item() * 100


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown, as in the documentation."""
    lines = ["| hidden layer | parameters | compression | test accuracy, % |", "| --- | ---: | ---: | ---: |"]
    for row in rows:
        score = f"{row['accuracy_mean']:.2f} ± {row['accuracy_std']:.2f}"
        lines.append(f"| {row['layer']} | {row['weights']:,} | {row['compression']:.1f} | {score} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DEBIAN, help="folder with the four idx files (default: Debian's)")
    parser.add_argument("--layers", nargs="+", choices=LAYERS, default=list(LAYERS), metavar="LAYER", help="only these")
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    parser.add_argument("--epochs", type=int, default=8, help="of a training; half as many where rates are compared")
    parser.add_argument("--rates", type=float, nargs="+", default=RATES, help="learning rates to choose from")
    parser.add_argument("--quick", action="store_true", help="a check that it runs: one epoch, seed, rate; 500 images")
    parser.add_argument("--out", type=Path, default=Path("demo-output"), help="folder for fashion-mnist.{csv,json}")
    args = parser.parse_args(argv)
    if args.quick:
        args.seeds, args.epochs, args.rates = 1, 1, args.rates[:1]
    (x, y), (x_test, y_test) = load(args.data, "train"), load(args.data, "t10k")
    if args.quick:
        x, y, x_test, y_test = x[:500], y[:500], x_test[:500], y_test[:500]
    mean, std = x.mean(), x.std()
    x, x_test = (x - mean) / std, (x_test - mean) / std
    held = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    held, rest = held[: len(x) // 6], held[len(x) // 6 :]

    half, rows, validation = max(1, args.epochs // 2), [], {}
    args.out.mkdir(parents=True, exist_ok=True)
    started = time.process_time()
    with tqdm(total=len(args.layers) * (len(args.rates) + args.seeds), unit="model") as progress:
        for name in args.layers:
            progress.set_description(name)
            found = validation[name] = {}
            for rate in args.rates:
                found[rate] = round(accuracy(train(name, rate, 0, x[rest], y[rest], half), x[held], y[held]), 2)
                progress.update()
            best, scores, before = max(found, key=found.__getitem__), [], time.process_time()
            for seed in range(1, args.seeds + 1):
                scores.append(accuracy(train(name, best, seed, x, y, args.epochs), x_test, y_test))
                progress.update()
            weights = num_weights(LAYERS[name]())
            row: dict[str, Any] = {"layer": name, "weights": weights, "compression": round(N * N / weights, 2)}
            row |= {"rate": best, "accuracy_mean": round(statistics.mean(scores), 3)}
            row["accuracy_std"] = round(statistics.stdev(scores), 3) if len(scores) > 1 else 0.0
            row["accuracies"] = " ".join(f"{s:.2f}" for s in scores)
            row["epoch_seconds"] = round((time.process_time() - before) / args.seeds / args.epochs, 2)
            rows.append(row)
            with (args.out / "fashion-mnist.csv").open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
                writer.writeheader()
                writer.writerows(rows)
    facts = {"epochs": args.epochs, "epochs_tuning": half, "seeds": args.seeds, "batch": BATCH}
    facts |= {"weight_decay": WEIGHT_DECAY, "validation_accuracy_by_rate": validation}
    facts |= {"train_images": len(x), "validation_images": len(held), "test_images": len(x_test)}
    facts |= {"cpu_seconds": round(time.process_time() - started), "threads": torch.get_num_threads()}
    facts |= {"machine": platform.machine(), "python": platform.python_version()}
    facts["versions"] = {"structmat": structmat.__version__, "torch": torch.__version__}
    (args.out / "fashion-mnist.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    print(table(rows))


if __name__ == "__main__":
    main()
