"""Measure a tokenizer: reconstruction, use of the codebook, first-k-token probe, and samples of its AR model."""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from semdict.pipeline.common.device import resolve_device
from semdict.pipeline.common.errors import UsageError
from semdict.pipeline.common.files import write_json
from semdict.pipeline.config import paths as places
from semdict.train.eval import image_scores as scores
from semdict.train.eval.common import write_table
from semdict.train.eval.fid import score_samples
from semdict.train.eval.first_k import first_k_probe
from semdict.train.eval.vcq_latents import Latents, Originals, Pictures, Place, latents_of
from semdict.train.vcq.tokenizer import Tokenizer1d, load_vcq_tokenizer
from semdict.train.vcq.usage import CodeUsage

if TYPE_CHECKING:
    from semdict.pipeline.config.schema import Params

EXAMPLE = """examples:
  semdict vcq evaluate --tokenizer runs/demo/vcq
  semdict vcq evaluate --samples guided=runs/demo/ar-samples-guided --samples unguided=runs/demo/ar-samples-unguided

Writes evaluate.json, utilisation.csv and reconstructions.png. Reconstructions are scored as section scores says: rFID
with the Inception weights, or the teacher's distance under its own name. Pixels and latents wait in --work meanwhile:
about 10 GB for ImageNet-1k's validation images and 11 GB for the latents of its training images."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which tokenizer and samples; the rest stands in params.yaml, sections vcq_evaluate and scores."""
    parser.add_argument("--params", default="params.yaml", type=Path, help="default: params.yaml")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override a parameter")
    parser.add_argument("--tokenizer", type=Path, help="run of `semdict vcq train` (default runs/<preset>/vcq)")
    parser.add_argument("--manifest", type=Path, help="default: data/<preset>/manifest/manifest.parquet")
    parser.add_argument(
        "--samples", action="append", default=[], metavar="NAME=DIR", help="output of `semdict ar sample`, to be scored"
    )
    parser.add_argument("--out", type=Path, help="default: reports/<preset>/vcq")
    parser.add_argument("--work", default="work", type=Path, help="where pixels and latents wait (default: work)")


def run(args: argparse.Namespace) -> int:
    """Measure everything and write it."""
    from semdict.pipeline.config.params import load_params

    params = load_params(args.params, args.set)
    named = sample_folders(args.samples)
    path = args.tokenizer or Path("runs") / params.preset / "vcq"
    device = resolve_device(params.runtime.device)
    model = load_vcq_tokenizer(path, device)
    place = Place.of(args.manifest or places.manifest(params.preset), params)
    out = args.out or Path("reports") / params.preset / "vcq"
    args.work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.work, prefix="vcq-evaluate-") as folder:
        found, about = measure(model, place, params, Path(folder), out)
    missing = about.pop("missing")
    for name, samples in named.items():
        scored, of = score_samples(samples, params)
        found |= {f"{name}_{metric}": value for metric, value in scored.scores.items()}
        missing |= {f"{name}_{metric}": why for metric, why in scored.missing.items()}
        about[name] = of
    about |= {"tokenizer": model.identity, "device": str(device)}
    write_json(out / "evaluate.json", {**found, "missing": [missing], "protocol": [about]})
    tell(found, missing, out)
    return 0


def sample_folders(given: list[str]) -> dict[str, Path]:
    """NAME=DIR words; a folder of `semdict ar sample` stands for its samples.npz. UsageError for anything else."""
    found = {}
    for word in given:
        name, _, where = word.partition("=")
        if not (name.isidentifier() and where):
            raise UsageError(f"--samples {word}: give NAME=DIR, such as guided=runs/demo/ar-samples-guided")
        path = Path(where)
        found[name] = path / "samples.npz" if (path / "samples.npz").is_file() else path
        if not path.exists():
            raise UsageError(f"--samples {word}: {path} does not exist")
    return found


def measure(
    model: Tokenizer1d, place: Place, params: "Params", folder: Path, out: Path
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Numbers of the tokenizer itself, flat; and how they were made, with what is `missing`."""
    given = params.vcq_evaluate
    test = latents_of(model, place, given.test_splits, params, folder, copies=True)
    train = latents_of(model, place, given.train_splits, params, folder)
    found = reconstruction(place, test, given.shown, out)
    more, missing, extractor = distances(place, test, params)
    found |= more | utilisation(model, train, out)
    with torch.no_grad():
        codes_KD = model.quantizer.project(model.quantizer.codebook).cpu().numpy()
    found |= first_k_probe(train, test, codes_KD, given.probe, str(model.codebook_sizes.device))
    about = {"section": given.model_dump(), "extractor": extractor, "missing": missing}
    return found, about | {"test_images": len(test.rows), "train_images": len(train.rows)}


def reconstruction(place: Place, test: Latents, shown: int, out: Path) -> dict[str, float]:
    """Mean PSNR in dB over uint8 images; writes the grid of some beside their originals."""
    from semdict.pipeline.images.visualize import psnr, save_grid

    originals = Originals(place, test.rows)
    each = [psnr(originals.pixels(i)[None], test.copies[i : i + 1])[0] for i in range(len(originals))]
    at = np.linspace(0, len(originals) - 1, min(shown, len(originals))).astype(int)
    rows = [np.stack([originals.pixels(int(i)) for i in at]), test.copies[at]]
    save_grid(out / "reconstructions.png", rows, ["original", "tokens\nback to pixels"])
    return {"psnr": float(np.mean(each)), "images": len(each)}


def distances(place: Place, test: Latents, params: "Params") -> tuple[dict[str, float], dict[str, str], dict[str, Any]]:
    """Scores of the reconstructions against the same originals, what is missing and why, the network behind them."""
    originals, copies = Originals(place, test.rows), Pictures(test.copies, {"from": "reconstructions"})
    if params.scores.protocol == "teacher":
        scored = scores.teacher(copies, originals, params)
        missing = {"rfid_val50k": "scores.protocol is teacher; set it to val50k where Inception's weights are"}
    else:
        scored = scores.val50k(copies, originals, params, name="rfid_val50k")
        missing = {}
    named = {name if name.startswith("rfid") else f"reconstruction_{name}": v for name, v in scored.scores.items()}
    return named, missing | scored.missing, scored.extractor


def utilisation(model: Tokenizer1d, train: Latents, out: Path) -> dict[str, float]:
    """How evenly each position uses its codes, exp(H) / K_t, and how many it uses at all; the curve goes to a CSV."""
    usage = CodeUsage(model.codebook_sizes.cpu())
    for start in range(0, len(train.ids), 4096):
        usage.add(torch.from_numpy(train.ids[start : start + 4096].astype(np.int64)))
    even_L, used_L = usage.per_position()
    rows = zip(range(len(even_L)), model.quantizer.sizes, even_L.tolist(), used_L.tolist(), strict=True)
    write_table(out / "utilisation.csv", ["position", "k", "utilisation", "used"], rows)
    found = usage.summary()
    del found["images"]
    return found


def tell(found: dict[str, Any], missing: dict[str, str], out: Path) -> None:
    """The numbers, one per line, and what is not there."""
    width = max(map(len, found))
    for name, value in found.items():
        print(f"{name:<{width}}  {value:,.4g}" if isinstance(value, float) else f"{name:<{width}}  {value:,}")
    for name, why in missing.items():
        print(f"vcq evaluate: missing {name}: {why}", file=sys.stderr)
    print(f"vcq evaluate: {out}/evaluate.json", file=sys.stderr)
