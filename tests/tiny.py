"""A world small enough for tests: images, a VQGAN and a teacher in released layouts, and a params.yaml over them."""

import hashlib
import os
from pathlib import Path

import numpy as np
import timm
import torch
import yaml
from PIL import Image

from semdict.cli import main
from semdict.pipeline.config.presets import resolve
from semdict.pipeline.config.yaml import read_yaml
from semdict.pipeline.tokenizers.base import save_tokenizer
from semdict.pipeline.tokenizers.mage import MageTokenizer
from semdict.pipeline.tokenizers.vqgan import Sizes
from semdict.train.masked.objectives import objective_class

VIT = {"patch_size": 14, "embed_dim": 24, "depth": 2, "num_heads": 2}
TEACHER = {"model": "deit_tiny_patch16_224", "kwargs": VIT}
CODES, WORDS = 64, 16
PRESETS = Path(__file__).resolve().parent.parent / "presets"


def architecture(family: str, width: int = 6) -> dict:
    """Fields of the configuration of one objective's model; `width` is that of lease's centroids."""
    return objective_class(family).architecture(**({"width": width} if family == "lease" else {}))


def draw_image(seed: int, width: int = 96, height: int = 80) -> np.ndarray:
    """(H, W, 3) uint8 of random blocks: every region looks different."""
    blocks = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(blocks).resize((width, height), Image.Resampling.NEAREST))


def make_images(root: Path, classes: int = 3, each: int = 4, start: int = 0) -> None:
    """root/train/c<k>/i<n>.png, `each` per class."""
    for n in range(classes * each):
        path = root / "train" / f"c{n % classes}" / f"i{n:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw_image(start + n)).save(path)


def make_vqgan(path: Path, seed: int = 0, codes: int = CODES, levels: int = 5) -> None:
    """Random weights in the MAGE layout, scaled so that the codes in use vary; the stride is 2 ** (levels - 1)."""
    torch.manual_seed(seed)
    sizes = Sizes(
        stem=32, widths=(32,) * levels, blocks=1, decoder_blocks=1, z_channels=8, codes=codes, dim=8, strided=False
    )
    model = MageTokenizer(sizes).eval()
    with torch.no_grad():
        model.quantize.embedding.weight.normal_()
        model.decoder.conv_out.bias.fill_(0.5)
        model.decoder.conv_out.weight.mul_(0.05)
    save_tokenizer(model, path)


def make_teacher(path: Path, seed: int = 0) -> None:
    """Random weights of the ViT that TEACHER names, as a timm state dict."""
    torch.manual_seed(seed)
    model = timm.models.vision_transformer.VisionTransformer(
        img_size=224, patch_size=14, embed_dim=24, depth=2, num_heads=2, num_classes=0, global_pool=""
    )
    torch.save(model.state_dict(), path)


def other_vqgan(path: str) -> tuple[str, ...]:
    """Options that name another VQGAN, and tell DVC to watch it."""
    return ("--set", f"vqgan.weights={path}", "--set", f"inputs.vqgan={path}")


def base() -> dict:
    """presets/base.yaml: every parameter with its default."""
    return read_yaml(PRESETS / "base.yaml")


def preset(name: str) -> dict:
    """The complete parameters of a preset of the project."""
    return resolve(name, PRESETS)


def merged(tree: dict, changes: dict) -> dict:
    """`tree` with the values of `changes` in it, section by section."""
    result = dict(tree)
    for key, value in changes.items():
        section = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merged(result[key], value) if section else value
    return result


def replaced(tree: dict, **sections: dict) -> dict:
    """`tree` with whole sections in place: the base's defaults and the values given here."""
    return {**tree, **{name: merged(base()[name], values) for name, values in sections.items()}}


def params(root: Path) -> dict:
    """Complete parameters over the files that `make_world` writes."""
    changes = {
        "preset": "tiny",
        "inputs": {"vqgan": str(root / "vqgan.ckpt"), "features": str(root / "teacher.pth")},
        "runtime": {"workers": 2},
        "manifest": {"images": {"train": str(root / "images" / "train")}},
        "pixels": {"crop": "resize"},
        "vqgan": {"weights": str(root / "vqgan.ckpt"), "psnr_floor": 0.0, "psnr_images": 2},
        "features": {**TEACHER, "weights": str(root / "teacher.pth")},
        "sample_features": {"points": 800, "batch": 4, "chunk": 4},
        "kmeans": {"k": WORDS, "iterations": 5},
        "encode": {"batch": 2, "chunk": 2, "precision_images": 2},
        "shards": {"chunk_rows": 4, "shard_rows": 8},
    }
    return merged(base(), changes)


def make_world(root: Path, **sections: dict) -> Path:
    """Images, weights and params.yaml under `root`; `sections` update the parameters."""
    make_images(root / "images")
    make_vqgan(root / "vqgan.ckpt")
    make_teacher(root / "teacher.pth")
    return write_params(root, **sections)


def write_params(root: Path, **sections: dict) -> Path:
    tree = merged(params(root), sections)
    path = root / "params.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def semdict(root: Path, *args: str) -> int:
    """Run a command in `root`, as a user would after `cd`."""
    before = Path.cwd()
    os.chdir(root)
    try:
        return main(list(args))
    finally:
        os.chdir(before)


def run_until_centroids(root: Path) -> None:
    """manifest, sample-features, kmeans: everything that `encode` reads."""
    for command in ("manifest", "sample-features", "kmeans"):
        assert semdict(root, command) == 0


def digest(folder: Path) -> dict[str, str]:
    """Relative path -> SHA-256 of every file: equal dictionaries are equal bytes."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}
