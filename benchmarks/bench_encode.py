"""Encode throughput: the stage (decode threads, batched models) against a loop over single images.

    python -m benchmarks.bench_encode --images demo/assets/images/train --vqgan demo/assets/vqgan.ckpt \
        --teacher demo/assets/teacher.pth

Both tokenise the same files with the same weights in one process. `equal_tokens` is below 1 where near-ties are
decided differently: the loop decodes with Pillow and encodes single, contiguous images.
"""

import argparse
import io
import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.report import arguments, machine, publish, seconds
from semdict.cli import main as semdict
from semdict.pipeline.encode.worker import EncodeJob
from semdict.pipeline.execute.store import split_rows
from semdict.pipeline.images.batches import CropRecipe
from semdict.pipeline.images.crops import Crop, expand_views
from semdict.pipeline.manifest.table import load_manifest
from semdict.pipeline.tokenizers.pair import PairSpec

MODEL = {"patch_size": 14, "embed_dim": 96, "depth": 6, "num_heads": 3}  # the demo's teacher


def loop(paths: list[Path], pair) -> np.ndarray:
    """The baseline: for each image open, resize, crop, and two forward passes with batch size 1."""
    tokens = []
    for path in paths:
        image = Image.open(io.BytesIO(path.read_bytes())).convert("RGB")
        scale = 256 / min(image.size)
        image = image.resize([round(side * scale) for side in image.size], Image.Resampling.BICUBIC)
        left, top = (round((side - 256) / 2) for side in image.size)  # as torchvision.transforms.CenterCrop
        pixels = np.asarray(image.crop((left, top, left + 256, top + 256)))
        batch = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 255
        pair_tokens = pair.tokens(batch, "float32")
        tokens.append(np.stack([pair_tokens["gen"][0].numpy(), pair_tokens["disc"][0].numpy()]))
    return np.stack(tokens)


def stage(job: EncodeJob, worker, chunks) -> np.ndarray:
    """The stage's worker on the same rows."""
    parts = [arrays for _, arrays in worker.process(chunks, lambda *_: None)]
    gen, disc = (np.concatenate([part[name] for part in parts])[:, 0] for name in ("gen", "disc"))
    return np.stack([gen, disc], axis=1)


def listed(images: str, folder: str) -> Path:
    """The manifest of a folder of images, made in `folder`."""
    path = Path(folder) / "manifest.parquet"
    override = f"manifest.images={{train: {images}}}"
    if semdict(["manifest", "--set", override, "--out", str(path), "--metrics", f"{folder}/m.json"]):
        raise SystemExit("semdict manifest failed")
    return path


def encode_job(args: argparse.Namespace, manifest: Path) -> EncodeJob:
    """One centre view of each image, on the CPU in float32."""
    spec = PairSpec(
        tokenizer={"path": args.vqgan},
        features={"model": args.model, "weights": args.teacher, "kwargs": args.kwargs},
        centroids=args.centroids,
        device="cpu",
        image_size=256,
    )
    return EncodeJob(
        fingerprint="benchmark",
        manifest=str(manifest),
        images=(("train", args.images),),
        recipe=CropRecipe(Crop("resize", 256), tuple(expand_views(["centre"]))),
        spec=spec,
        dtypes=(("gen", "uint16"), ("disc", "uint16")),
        length=256,
        batch=args.batch,
        workers=0,
        precision="float32",
    )


def main() -> None:
    parser = arguments(__doc__, "encode")
    parser.add_argument("--images", default="demo/assets/images/train")
    parser.add_argument("--vqgan", default="demo/assets/vqgan.ckpt")
    parser.add_argument("--teacher", default="demo/assets/teacher.pth")
    parser.add_argument("--model", default="deit_tiny_patch16_224")
    parser.add_argument("--kwargs", type=json.loads, default=MODEL, help="JSON arguments of the model")
    parser.add_argument("--centroids", default="data/demo/kmeans/centroids.npy")
    parser.add_argument("--count", type=int, default=96)
    parser.add_argument("--batch", type=int, default=16)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        manifest = listed(args.images, folder)
        job = encode_job(args, manifest)
        worker = job.open()
        sources = load_manifest(manifest).table.column("source").to_pylist()
        paths = [Path(args.images) / source for source in sources[: 32 if args.small else args.count]]
        chunks = split_rows(len(paths), len(paths))
        equal = float(np.mean(loop(paths[:8], worker.tokenizer) == stage(job, worker, split_rows(8, 8))))
        ours = seconds(lambda: stage(job, worker, chunks), repeats=2)
        plain = seconds(lambda: loop(paths, worker.tokenizer), repeats=2)
    result = {
        "images": len(paths),
        "batch": args.batch,
        "images_per_second": round(len(paths) / ours, 2),
        "images_per_second_one_at_a_time": round(len(paths) / plain, 2),
        "ratio": round(plain / ours, 3),
        "equal_tokens": equal,
    }
    publish(args.out, {**machine(), **result})


if __name__ == "__main__":
    main()
