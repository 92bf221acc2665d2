"""Linear probe from cached features against features computed in every epoch, in one process.

    python -m benchmarks.bench_probe [--small] [--device cuda] [--out benchmarks/results/probe.json]

One epoch of each is timed on the same images: from the memory-mapped cache; from tokens, through the encoder; from
pixels, through VQGAN and encoder, as the published probe works (pixels are there already: no decoding is counted).
`ratio_90_epochs` is the time of Table A.2's 90 epochs against making the features once and then 90 epochs from the
cache. Also: one epoch from a cache of ImageNet-1k's size, and k-NN against it.
"""

import math
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.memory import status
from benchmarks.report import arguments, machine, publish
from benchmarks.timing import alternate, wait
from semdict.pipeline.tokenizers.mage import RELEASED, MageTokenizer
from semdict.train.eval.features import FeatureStore, encoder_features
from semdict.train.eval.knn import knn
from semdict.train.eval.linear_head import ArrayBatches, HeadConfig, fit_head
from semdict.train.eval.sources import TokenBatch
from semdict.train.masked.encoder import Encoder
from semdict.train.masked.model import MaskedTokenTransformer, model_config

EPOCHS, CLASSES, CODES, CELLS = 90, 1000, 1024, 256
IMAGENET, VALIDATION, WIDTH = 1_281_167, 50_000, 768


class Tokens:
    """Random tokens as a source."""

    def __init__(self, rows: int, device: str) -> None:
        rng = torch.Generator().manual_seed(0)
        self.ids = torch.randint(0, CODES, (rows, CELLS), generator=rng).to(device)
        self.labels = torch.randint(0, CLASSES, (rows,), generator=rng).numpy()
        self.names, self.views, self.left_out = [str(n) for n in range(CLASSES)], ["centre"], 0
        self.identity, self.about = {"tokens": "random", "rows": rows}, {}

    def stream(self, view: str, batch: int) -> Iterator[TokenBatch]:
        for start in range(0, len(self.ids), batch):
            yield TokenBatch(start, self.ids[start : start + batch])


class Recomputed:
    """Training batches whose features are computed for every batch."""

    def __init__(self, compute: Callable[[np.ndarray], Tensor], like: ArrayBatches) -> None:
        self.compute, self.like, self.steps, self.width = compute, like, like.steps, like.width

    def __call__(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        order = np.random.default_rng(epoch).permutation(len(self.like.labels))
        for start in range(0, self.steps * self.like.batch, self.like.batch):
            at = order[start : start + self.like.batch]
            yield self.compute(at), self.like.labels[torch.from_numpy(at).to(self.like.device)]


def epochs(args: Any, size: str, rows: int, root: Path) -> dict[str, Any]:
    """Seconds of one epoch with each kind of batches, and of computing the features once."""
    device, batch = args.device, args.batch
    precision = "bfloat16" if device.startswith("cuda") else "float32"
    model = MaskedTokenTransformer(model_config("mage", size)).to(device).eval()
    encoder = Encoder(model, size, f"random {size}", None, None)
    source, features = Tokens(rows, device), encoder_features(model, precision)
    store = FeatureStore(encoder, root, torch.device(device), precision, "float32", batch)
    wait(device)
    began = perf_counter()
    kept = store.get(source, [])
    once = perf_counter() - began
    cached = ArrayBatches(kept.first, kept.labels, rows // 2, 0, device)
    sizes = replace(RELEASED, stem=32, widths=(32,) * 5, blocks=1, decoder_blocks=1) if args.small else RELEASED
    vqgan = MageTokenizer(sizes).to(device).eval().requires_grad_(False)
    pixels = torch.rand(min(batch, rows), 3, 256, 256, generator=torch.Generator().manual_seed(0)).to(device)

    def from_tokens(at: np.ndarray) -> Tensor:
        return torch.cat([features(part) for part in source.ids[torch.from_numpy(at).to(device)].split(batch)])

    def from_pixels(at: np.ndarray) -> Tensor:
        sizes = [len(part) for part in np.split(at, range(batch, len(at), batch))]
        return torch.cat([features(vqgan.encode(pixels[:n])) for n in sizes])

    cfg = HeadConfig(epochs=1, batch=rows // 2)
    batches: dict[str, Any] = {"cached": cached, "tokens_anew": Recomputed(from_tokens, cached)}
    batches["pixels_anew"] = Recomputed(from_pixels, cached)
    runs = {name: lambda b=b: fit_head(b, CLASSES, cfg, device) for name, b in batches.items()}
    wall, _ = alternate(runs, args.repeats, device)
    whole = once + EPOCHS * wall["cached"]
    ratios = {name: round(EPOCHS * wall[name] / whole, 1) for name in ("tokens_anew", "pixels_anew")}
    shape = {"model": size, "rows": rows, "batch": batch, "precision": precision}
    return {**shape, "features_once_s": once, "epoch_s": wall, "ratio_90_epochs": ratios}


def imagenet(args: Any, root: Path) -> dict[str, Any]:
    """One epoch and k-NN at ImageNet-1k's size (a tenth of it with --small), from a float16 map on disk."""
    rows, queries = (IMAGENET // 10, VALIDATION // 100) if args.small else (IMAGENET, VALIDATION // args.share)
    path, rng = root / "large.npy", np.random.default_rng(0)
    written = np.lib.format.open_memmap(path, mode="w+", dtype=np.float16, shape=(rows, WIDTH))
    for start in range(0, rows, 1 << 14):
        written[start : start + (1 << 14)] = rng.standard_normal((min(1 << 14, rows - start), WIDTH), np.float32)
    del written
    features = np.load(path, mmap_mode="c")
    labels = rng.integers(0, CLASSES, rows)
    batches = ArrayBatches(features, labels, 4096, 0, args.device)
    before, began = status("VmRSS"), perf_counter()
    fit_head(batches, CLASSES, HeadConfig(epochs=1), args.device)
    wait(args.device)
    epoch = perf_counter() - began
    began = perf_counter()
    knn(features, labels, features[:queries], device=args.device, classes=CLASSES)
    vote = perf_counter() - began
    grown = round((status("VmRSS") - before) / 2**20)  # includes pages of the map, which the kernel may take back
    return {"rows": rows, "width": WIDTH, "probe_epoch_s": epoch, "probe_90_epochs_min": EPOCHS * epoch / 60,
            "knn_queries": queries, "knn_s": vote, "knn_50000_queries_min": vote * VALIDATION / queries / 60,
            "resident_mb": grown, "map_mb": math.ceil(path.stat().st_size / 2**20)}  # fmt: skip


def main() -> None:
    """Measure, print ratios, write JSON."""
    parser = arguments(__doc__.splitlines()[0], "probe")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=16, help="images per forward pass")
    parser.add_argument("--rows", type=int, default=64, help="images of the timed epoch")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--share", type=int, default=10, help="one in so many of the 50,000 k-NN queries is timed")
    args = parser.parse_args()
    size = "tiny" if args.small else "vit_base"
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        result = {"epochs": epochs(args, size, args.rows, root), "imagenet_size": imagenet(args, root)}
    setting = {"threads": torch.get_num_threads(), "load": os.getloadavg()[0]}
    publish(args.out, {**result, "setting": setting, "machine": machine(args.device)})


if __name__ == "__main__":
    main()
