"""`semdict vcq evaluate`: reconstruction, codebook use, first-k-token probe, and image scores of AR samples.

N images, L positions, D code width, K codes.
"""

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from semdict.pipeline.common.device import resolve_device
from semdict.pipeline.common.errors import ManifestError, UsageError
from semdict.pipeline.common.files import remove, sha256_json, write_json
from semdict.pipeline.config import paths
from semdict.pipeline.config.naming import REPORT, RUN, add_name_argument
from semdict.train.eval.common import same_classes, write_table
from semdict.train.eval.fid import score_samples
from semdict.train.eval.image_scores import teacher, val50k
from semdict.train.eval.image_sets import ArrayImages
from semdict.train.eval.linear_head import HeadConfig, linear_probe
from semdict.train.eval.vcq_latents import CroppedImages, Latents, Originals, latents_of
from semdict.train.vcq.tokenizer import Tokenizer1d, load_vcq_tokenizer
from semdict.train.vcq.usage import CodeUsage

if TYPE_CHECKING:
    from semdict.pipeline.config.schema import Params
    from semdict.pipeline.config.schema.vcq import FirstK

EXAMPLE = """examples:
  semdict vcq evaluate --tokenizer runs/demo/vcq
  semdict vcq evaluate --samples guided=runs/demo/ar-samples-guided --samples unguided=runs/demo/ar-samples-unguided

Writes evaluate.json, utilisation.csv and reconstructions.png. Reconstructions are scored as section scores says: rFID
with the Inception weights, or the teacher's distance under its own name. --work holds pixels and latents meanwhile:
about 10 GB for ImageNet-1k's validation images and 11 GB for the latents of its training images."""

Metrics = dict[str, float]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The tokenizer and the samples; the rest is in params.yaml, sections vcq_evaluate and scores."""
    from semdict.pipeline.config.params import add_params_arguments

    add_params_arguments(parser)
    add_name_argument(parser, tokenizer=RUN, out=REPORT)
    parser.add_argument("--tokenizer", type=Path, help="run of `semdict vcq train` (default runs/<preset>/vcq)")
    parser.add_argument("--manifest", type=Path, help="default: data/<preset>/manifest/manifest.parquet")
    parser.add_argument(
        "--samples", action="append", default=[], metavar="NAME=DIR", help="output of `semdict ar sample`, to be scored"
    )
    parser.add_argument("--out", type=Path, help="default: reports/<preset>/vcq")
    parser.add_argument("--work", default="work", type=Path, help="for pixels and latents meanwhile (default: work)")


def run(args: argparse.Namespace) -> int:
    """Measure everything and write it."""
    from semdict.pipeline.config.params import params_of

    params = params_of(args)
    folders = sample_folders(args.samples)
    path = args.tokenizer or Path("runs") / params.preset / "vcq"
    device = resolve_device(params.runtime.device)
    model = load_vcq_tokenizer(path, device)
    images = CroppedImages.of(args.manifest or paths.manifest(params.preset), params)
    out = args.out or Path("reports") / params.preset / "vcq"
    with scratch_folder(args.work, out) as folder:
        metrics, missing, protocol = measure(model, images, params, folder, out)
    for name, samples in folders.items():
        result, protocol[name] = score_samples(samples, params)
        metrics |= {f"{name}_{metric}": value for metric, value in result.scores.items()}
        missing |= {f"{name}_{metric}": why for metric, why in result.missing.items()}
    protocol |= {"tokenizer": model.identity, "device": str(device)}
    write_json(out / "evaluate.json", {**metrics, "missing": [missing], "protocol": [protocol]})
    print_metrics(metrics, missing, out)
    return 0


def sample_folders(words: list[str]) -> dict[str, Path]:
    """Name -> path of NAME=DIR words; a folder of `semdict ar sample` stands for its samples.npz.

    UsageError for anything else.
    """
    folders = {}
    for word in words:
        name, _, where = word.partition("=")
        if not (name.isidentifier() and where):
            raise UsageError(f"--samples {word}: give NAME=DIR, such as guided=runs/demo/ar-samples-guided")
        path = Path(where)
        folders[name] = path / "samples.npz" if (path / "samples.npz").is_file() else path
        if not path.exists():
            raise UsageError(f"--samples {word}: {path} does not exist")
    return folders


@contextmanager
def scratch_folder(work: Path, out: Path) -> Iterator[Path]:
    """An empty folder below `work`, removed at the end; one that a killed run with the same `out` left is reused."""
    from semdict.pipeline.execute.locks import interrupt_on_signals, lock

    name = f"vcq-evaluate-{sha256_json(str(out.resolve()))[:16]}"
    with lock(name, work), interrupt_on_signals():
        remove(work / name)
        (work / name).mkdir(parents=True)
        try:
            yield work / name
        finally:
            remove(work / name)


def measure(
    model: Tokenizer1d, images: CroppedImages, params: "Params", folder: Path, out: Path
) -> tuple[dict[str, Any], dict[str, str], dict[str, Any]]:
    """Metrics of the tokenizer itself, flat; missing metric -> why; protocol."""
    cfg = params.vcq_evaluate
    test = latents_of(model, images, cfg.test_splits, params, folder / "test", reconstruct=True)
    train = latents_of(model, images, cfg.train_splits, params, folder / "train")
    metrics: dict[str, Any] = reconstruction(images, test, cfg.shown, out)
    distances, missing, extractor = reconstruction_scores(images, test, params)
    metrics |= distances | utilisation(model, train, out)
    with torch.no_grad():
        codes_KD = model.quantizer.project(model.quantizer.codebook).cpu().numpy()
    metrics |= first_k_probe(train, test, codes_KD, cfg.probe, str(model.codebook_sizes.device))
    protocol = {"section": cfg.model_dump(), "extractor": extractor}
    return metrics, missing, protocol | {"test_images": len(test.rows), "train_images": len(train.rows)}


def reconstruction(images: CroppedImages, test: Latents, shown: int, out: Path) -> Metrics:
    """Mean PSNR in dB over uint8 images; writes a grid of `shown` reconstructions beside their originals."""
    from semdict.pipeline.images.visualize import psnr, save_grid

    originals, copies = Originals(images, test.rows), test.reconstructions
    each = [psnr(originals.pixels(i)[None], copies[i : i + 1])[0] for i in range(len(originals))]
    numbers = np.linspace(0, len(originals) - 1, min(shown, len(originals))).astype(int)
    rows = [np.stack([originals.pixels(int(i)) for i in numbers]), copies[numbers]]
    save_grid(out / "reconstructions.png", rows, ["original", "tokens\nback to pixels"])
    return {"psnr": float(np.mean(each)), "images": len(each)}


def reconstruction_scores(
    images: CroppedImages, test: Latents, params: "Params"
) -> tuple[Metrics, dict[str, str], dict[str, Any]]:
    """Scores of the reconstructions against their originals, missing metric -> why, the network of the features."""
    originals = Originals(images, test.rows)
    copies = ArrayImages(test.reconstructions, {"from": "reconstructions"})
    if params.scores.protocol == "teacher":
        result = teacher(copies, originals, params)
        missing = {"rfid_val50k": "scores.protocol is teacher; set it to val50k where Inception's weights are"}
    else:
        result = val50k(copies, originals, params, name="rfid_val50k")
        missing = {}
    named = {name if name.startswith("rfid") else f"reconstruction_{name}": v for name, v in result.scores.items()}
    return named, missing | result.missing, result.extractor


def utilisation(model: Tokenizer1d, train: Latents, out: Path) -> Metrics:
    """How evenly each position uses its codes, exp(H) / K_t, and the share in use; writes the curve as CSV."""
    usage = CodeUsage(model.codebook_sizes.cpu())
    for start in range(0, len(train.ids), 4096):
        usage.add(torch.from_numpy(train.ids[start : start + 4096].astype(np.int64)))
    even_L, used_L = usage.per_position()
    rows = zip(range(len(even_L)), model.quantizer.sizes, even_L.tolist(), used_L.tolist(), strict=True)
    write_table(out / "utilisation.csv", ["position", "k", "utilisation", "used"], rows)
    return {name: value for name, value in usage.summary().items() if name != "images"}


def first_features(latents: Latents, codes_KD: np.ndarray, k: int, feature: str, pool: str) -> np.ndarray:
    """(N, D) for pool mean, (N, k D) for concat: the first k positions of z (feature pre) or of the codes (code)."""
    first_NKD = latents.z[:, :k] if feature == "pre" else codes_KD.astype(np.float16)[latents.ids[:, :k]]
    if pool == "mean":
        return first_NKD.mean(axis=1, dtype=np.float32)
    return np.ascontiguousarray(first_NKD).reshape(len(first_NKD), -1)


def first_k_probe(train: Latents, test: Latents, codes_KD: np.ndarray, cfg: "FirstK", device: str = "cpu") -> Metrics:
    """Linear probe on the first k tokens (VCQ, table 6): top1 and top5 in per cent, as probe_code_concat_10_top1.

    The paper does not name the feature that it probed (choice O16): before quantization (pre) and after (code).
    UsageError for more tokens than there are; ManifestError without labels in both sets; ShardError for a test class
    without training images.
    """
    length = train.ids.shape[1]
    if max(cfg.first) > length:
        raise UsageError(f"vcq_evaluate.probe.first asks for {max(cfg.first)} tokens, the tokenizer has {length}")
    if min(train.labels.min(), test.labels.min()) < 0:
        raise ManifestError("some images have no label; the first-k probe needs one for each")
    classes = same_classes(train, test)
    head = HeadConfig(cfg.epochs, cfg.batch, cfg.base_lr, cfg.warmup_epochs, cfg.weight_decay, seed=cfg.seed)
    metrics = {}
    for feature in cfg.features:
        for pool in cfg.pools:
            for k in cfg.first:
                x_train, x_test = (first_features(part, codes_KD, k, feature, pool) for part in (train, test))
                result = linear_probe(
                    x_train, train.labels, x_test, test.labels, head, classes, device, eval_every=head.epochs
                )
                name = f"probe_{feature}_{pool}_{k}"
                metrics |= {f"{name}_top1": result.top1, f"{name}_top5": result.top5}
    return metrics


def print_metrics(metrics: dict[str, Any], missing: dict[str, str], out: Path) -> None:
    """Print the metrics, one per line, and the missing ones."""
    width = max(map(len, metrics))
    for name, value in metrics.items():
        print(f"{name:<{width}}  {value:,.4g}" if isinstance(value, float) else f"{name:<{width}}  {value:,}")
    for name, why in missing.items():
        print(f"vcq evaluate: missing {name}: {why}", file=sys.stderr)
    print(f"vcq evaluate: {out}/evaluate.json", file=sys.stderr)
