"""Shortlist search of the nearest words against the full search, on features of real images.

    python -m benchmarks.bench_search --images 'imagenette/train-*.tar' --teacher mobilenetv1_100.safetensors

Counts the rows whose nearest word differs, and how far down the shortlist the nearest word stands by rough products:
with TF32 factors (ten bits), which a GPU uses, and with bfloat16 factors (seven bits). On a CPU the rough factors are
rounded and multiplied in float32, which is what tensor cores compute; only the GPU's order of summation is missing.
Words are k-means centroids of a part of the same features. `--device cuda` measures the time of both searches.
"""

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.report import arguments, machine, publish, seconds
from semdict.cli import main as semdict
from semdict.pipeline.common.device import to_device
from semdict.pipeline.common.nearest import SHORTLIST, exact_float32, full_search, rows_per_chunk, shortlist_search
from semdict.pipeline.execute.store import split_rows
from semdict.pipeline.images.batches import CropRecipe, stream_batches
from semdict.pipeline.images.crops import Crop, expand_views
from semdict.pipeline.kmeans.clustering import train_centroids
from semdict.pipeline.manifest.table import load_manifest
from semdict.pipeline.tokenizers import load_features

KEPT_BITS = {"tf32": 10, "bfloat16": 7}  # of a float32's 23 explicit bits


def rounded(values: Tensor, kept: int) -> Tensor:
    """Float32 rounded to `kept` bits of mantissa, to nearest, ties to even."""
    bits, dropped = values.contiguous().view(torch.int32), 23 - kept
    half = (1 << (dropped - 1)) - 1 + ((bits >> dropped) & 1)
    return ((bits + half) & ~((1 << dropped) - 1)).view(torch.float32)


@torch.inference_mode()
def features_of(images: str, model: str, weights: str, layer: int, count: int, device: str) -> Tensor:
    """(N, D) float16 features of every cell of the first `count` images."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "manifest.parquet"
        override = f"manifest.images={{train: '{images}'}}"
        if semdict(["manifest", "--set", override, "--out", str(path), "--metrics", f"{folder}/m.json"]):
            raise SystemExit("semdict manifest failed")
        manifest = load_manifest(path)
        teacher = load_features(model, weights, layer=layer, device=device)
        recipe = CropRecipe(Crop("resize", 256), tuple(expand_views(["centre"])))
        chunks = split_rows(min(count, len(manifest)), 1024)
        parts = []
        for batch in stream_batches(manifest.reader({"train": images}), manifest, chunks, recipe, 64):
            parts.append(teacher(to_device(batch.pixels[:, 0], torch.device(device))).flatten(0, 1).half().cpu())
    return torch.cat(parts)


def compare(features_ND: Tensor, words_KD: Tensor) -> dict[str, Any]:
    """By kind of rough products: rows whose word differs from the full search, and the deepest place of the nearest."""
    norms_K = words_KD.square().sum(1)
    codes = {kind: rounded(words_KD, bits) for kind, bits in KEPT_BITS.items()}
    result = {kind: {"different": 0, "deepest": 0, "not_first": 0} for kind in KEPT_BITS}
    for part in features_ND.split(rows_per_chunk(words_KD)):
        points_ND = part.to(words_KD.device).float()
        ids_N, _ = full_search(points_ND, words_KD, norms_K)
        for kind, bits in KEPT_BITS.items():
            with exact_float32():
                rough_NK = torch.addmm(norms_K, rounded(points_ND, bits), codes[kind].T, alpha=-2)
            place_N = (rough_NK < rough_NK.gather(1, ids_N[:, None])).sum(1)  # words that look nearer than the nearest
            result[kind]["deepest"] = max(result[kind]["deepest"], int(place_N.max()) + 1)
            result[kind]["not_first"] += int((place_N > 0).sum())
            short_N, _ = shortlist_search(points_ND, words_KD, norms_K, rough_NK)
            result[kind]["different"] += int((short_N != ids_N).sum())
    return result


def main() -> None:
    parser = arguments(__doc__, "search")
    parser.add_argument("--images", help="as manifest.images; default: random clusters instead of features")
    parser.add_argument("--teacher", help="file of the teacher's weights")
    parser.add_argument("--model", default="mobilenetv1_100")
    parser.add_argument("--layer", type=int, default=-2)
    parser.add_argument("--count", type=int, default=4000, help="images, 256 features each")
    parser.add_argument("--words", type=int, default=16_384)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    if args.images:
        features_ND = features_of(args.images, args.model, args.teacher, args.layer, args.count, args.device)
    else:
        rng = torch.Generator().manual_seed(0)
        centres = torch.randn(300, 64, generator=rng)
        features_ND = (centres.repeat(20, 1) + torch.randn(6000, 64, generator=rng) / 2).half()
    words = 512 if args.small else args.words
    sample = features_ND[:: max(1, len(features_ND) // (16 * words))]
    words_KD = torch.from_numpy(train_centroids(sample, words, iterations=2, engine="torch").centroids).to(args.device)
    figures = {
        **machine(args.device),
        "features": len(features_ND),
        "width": features_ND.shape[1],
        "words": words,
        "shortlist": SHORTLIST,
        **compare(features_ND, words_KD),
    }
    if args.device.startswith("cuda"):
        points_ND, norms_K = features_ND[:16_384].to(args.device).float(), words_KD.square().sum(1)
        for name, search in (("full", full_search), ("short", shortlist_search)):
            time = seconds(lambda search=search: search(points_ND, words_KD, norms_K), device=args.device)
            figures[f"{name}_ms_per_16384_rows"] = 1000 * time
    publish(args.out, figures)


if __name__ == "__main__":
    main()
