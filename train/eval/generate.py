"""`semdict generate`: images from a masked-token model, from nothing or around known cells; PNG files and a grid."""

import argparse
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pipeline.device import reduced_precision, resolve_device
from pipeline.errors import UsageError
from pipeline.files import publish_dir, sha256_file, sha256_json, write_json
from pipeline.memory import keep_freed_memory
from train.eval.canvases import Known, hidden_cells, known_images
from train.eval.encoder import load_encoder, run_name
from train.eval.sampling import LAST, Decoding, ImageDraws, LogitsAt, decode_iteratively, guided

if TYPE_CHECKING:
    from pipeline.schema import Params
    from pipeline.vqgan import Vqgan

EXAMPLE = """examples:
  semdict generate --model runs/demo/lease --set generate.images=64
  semdict generate --model weights/lease-vit-b.pth --out samples/lease --set generate.temperature=11
  semdict generate --model runs/demo/lease --task inpaint --set generate.box=[4,4,8,8]
  semdict generate --model runs/demo/lease --task outpaint --set generate.images=16
  semdict generate --model runs/demo/lease --task reconstruct --set generate.mask_ratio=0.75
  semdict generate --model runs/demo/lease-conditional --task class --set generate.classes=[0,3]

Writes images/000000.png ..., tokens.npz, grid.png, generate.json. An image's tokens depend on the seed and its number
only; pixels may differ by one grey level where another batch size makes convolutions round otherwise."""

TASKS = ("unconditional", "class", "inpaint", "outpaint", "reconstruct")
STARTED = ("inpaint", "outpaint", "reconstruct")  # tasks that start from real images
FREE = {"device", "batch", "shown"}  # how it is carried out, not what comes out
CARD = "generate.json"
PNG = "{:06d}.png"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which model, which task; how to draw stands in params.yaml, section generate."""
    parser.add_argument("--model", type=Path, required=True, help="a run's folder, its model.pt or a released file")
    parser.add_argument("--num-heads", type=int, help="of a released encoder whose width is none of the published")
    parser.add_argument("--decoder-num-heads", type=int, help="likewise")
    parser.add_argument("--task", choices=TASKS, default="unconditional")
    parser.add_argument("--vqgan", type=Path, help="the tokenizer that decodes (default vqgan.weights)")
    parser.add_argument("--shards", type=Path, help="real images as tokens (default shards/<preset>)")
    parser.add_argument("--params", default="params.yaml", type=Path, help="default: params.yaml")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override a parameter")
    parser.add_argument("--out", type=Path, help="default runs/<preset>/<name of the model>-<task>")
    parser.add_argument("--resume", action="store_true", help="keep a complete folder of these very settings")


def run(args: argparse.Namespace) -> int:
    """Draw the images, or say that they are there."""
    from pipeline.params import load_params

    keep_freed_memory()
    params = load_params(args.params, args.set)
    out = args.out or Path("runs") / params.preset / f"{run_name(args.model)}-{args.task}"
    drawing = Drawing(args, params)
    if out.exists():
        if args.resume and (out / CARD).is_file() and drawing.made(out / CARD):
            print(f"generate: {out} holds these very images; nothing to do", file=sys.stderr)
            return 0
        raise UsageError(f"{out} exists; give another --out, or remove it (--resume keeps one of the same settings)")
    with publish_dir(out) as folder:
        drawing.draw(folder)
    print(f"generate: {drawing.count} images in {out}", file=sys.stderr)
    return 0


class Drawing:
    """One call of the command: a model, a tokenizer, what the images start from."""

    def __init__(self, args: argparse.Namespace, params: "Params") -> None:
        self.args, self.given, self.task = args, params.generate, args.task
        self.count, self.seed = self.given.images, self.given.seed
        self.device = torch.device(resolve_device(self.given.device))
        self.weights = args.vqgan or Path(params.vqgan.weights)
        self.shards = args.shards or Path("shards") / params.preset
        if self.task == "class":
            from train.eval.conditional import load_conditional

            self.model = load_conditional(args.model).to(self.device).eval()
            self.family, self.sha256 = self.model.config.base.family, sha256_file(self.model_file(args.model))
            self.vocab, self.grid = self.model.config.base.vocab, self.model.config.base.grid
        else:
            encoder = load_encoder(args.model, args.num_heads, args.decoder_num_heads, self.device)
            self.encoder, self.model, self.sha256 = encoder, encoder.model, encoder.sha256
            self.family, self.vocab, self.grid = encoder.model.config.family, *self.size(encoder.model)

    @staticmethod
    def size(model: Any) -> tuple[Any, int]:
        """Vocabulary and cells per side."""
        return model.config.vocab, model.config.grid

    @staticmethod
    def model_file(path: Path) -> Path:
        """The file whose SHA-256 names the model."""
        from train.pretrained import MODEL

        return path / MODEL if path.is_dir() else path

    @cached_property
    def how(self) -> Decoding:
        """Steps, temperature, and what becomes of the last cell."""
        last = LAST[self.family] if self.given.last == "family" else self.given.last
        return Decoding(self.given.steps, self.given.temperature, last)

    @cached_property
    def vqgan(self) -> "Vqgan":
        """The tokenizer; UsageError when it has another codebook than the model."""
        from pipeline.vqgan import load_vqgan

        vqgan = load_vqgan(self.weights, device=self.device)
        if vqgan.codebook_size != self.vocab.codes:
            raise UsageError(
                f"{self.weights} has {vqgan.codebook_size} codes, {self.args.model} knows {self.vocab.codes}; "
                "name the tokenizer of its training by --vqgan"
            )
        return vqgan

    @cached_property
    def known(self) -> Known | None:
        """Real images, for the tasks that start from them and for guidance by an image's words."""
        if self.task not in STARTED and not (self.task == "class" and self.model.config.centroids):
            return None
        from pipeline.shards import open_shards

        found = open_shards(self.shards)
        if self.task in STARTED:
            self.encoder.check_tokens(self.shards, int(found.gen_sizes.max()), found.spec.length, found.recipe)
        return known_images(self.shards, self.given.split, self.count)

    @cached_property
    def settings(self) -> dict[str, Any]:
        """All that decides what the images look like."""
        given = {name: value for name, value in self.given.model_dump().items() if name not in FREE}
        tokens = {"shards": str(self.shards), "split": given["split"]} if self.known is not None else {}
        return {
            "task": self.task, **given, "last": self.how.last, "family": self.family, "model": str(self.args.model),
            "model_sha256": self.sha256, "vqgan_sha256": sha256_file(self.weights), "ema": False, **tokens,
        }  # fmt: skip

    def made(self, card: Path) -> bool:
        """Whether a folder's card tells of these settings."""
        import json

        return json.loads(card.read_text()).get("fingerprint") == sha256_json(self.settings)[:16]

    def draw(self, folder: Path) -> None:
        """All images, a batch at a time; files are written while the next batch is drawn."""
        tokens, shown = [], []
        (folder / "images").mkdir()
        with ThreadPoolExecutor(4) as pool:
            written = []
            for start in range(0, self.count, self.given.batch):
                numbers = list(range(start, min(start + self.given.batch, self.count)))
                canvas_BL, drawn_BL, images = self.batch(numbers)
                tokens.append(drawn_BL.cpu().numpy().astype(np.uint16))
                written += [pool.submit(save_png, folder / "images", n, image)
                            for n, image in zip(numbers, images, strict=True)]  # fmt: skip
                if len(shown) < self.given.shown:
                    shown += self.bands(numbers, canvas_BL, images)
                print(f"\rgenerate  {numbers[-1] + 1}/{self.count} images", end="", file=sys.stderr, flush=True)
            for job in written:
                job.result()
        print(file=sys.stderr)
        labels = {"labels": self.labels(list(range(self.count)))} if self.task == "class" else {}
        np.savez(folder / "tokens.npz", gen=np.concatenate(tokens), **labels)
        self.save_grid(folder / "grid.png", shown)
        print_name = sha256_json(self.settings)[:16]
        write_json(folder / CARD, {**self.settings, "fingerprint": print_name, "device": self.device.type})

    def batch(self, numbers: list[int]) -> tuple[Tensor, Tensor, np.ndarray]:
        """Canvas (B, L), drawn codes (B, L) and images (B, H, W, 3) uint8 of the images with these numbers."""
        hidden = hidden_cells(self.task, self.grid, self.given.box, self.given.mask_ratio, self.seed, numbers)
        start = torch.zeros(hidden.shape, dtype=torch.int64)
        if self.known is not None and self.task in STARTED:
            start = torch.from_numpy(self.known.gen[numbers])
        canvas_BL = start.masked_fill(hidden, self.vocab.mask).to(self.device)
        draws = ImageDraws(self.seed, numbers)
        with torch.inference_mode(), reduced_precision(self.device, self.given.precision):
            drawn_BL = decode_iteratively(self.logits_at(numbers), canvas_BL, self.vocab.mask, draws, self.how)
        return canvas_BL, drawn_BL, self.pixels(drawn_BL)

    def logits_at(self, numbers: list[int]) -> LogitsAt:
        """Logits of the unknown cells only: of the plain model, or guided by each image's class."""
        if self.task != "class":
            return lambda tokens, unknown: self.model.logits_at(tokens, unknown)
        labels_B = torch.from_numpy(self.labels(numbers)).to(self.device)
        words = self.known.words if self.known is not None else None
        words_BL = None if words is None else torch.from_numpy(words[numbers]).to(self.device)

        def at(tokens_BL: Tensor, unknown_BL: Tensor) -> Tensor:
            told = self.model.logits(tokens_BL, labels_B, words_BL)[unknown_BL]
            if not self.given.scale:
                return told
            nothing_B = torch.full_like(labels_B, self.model.null_class)
            return guided(told, self.model.logits(tokens_BL, nothing_B, words_BL)[unknown_BL], self.given.scale)

        return at

    def labels(self, numbers: list[int]) -> np.ndarray:
        """(B,) int64 class of each image: those asked for in turn, or those of the images whose words guide."""
        if self.known is not None and self.task == "class":
            return self.known.labels[numbers].astype(np.int64)
        classes = self.given.classes or list(range(self.model.null_class))
        for label in classes:
            if label >= self.model.null_class:
                raise UsageError(f"generate.classes: {label} is not below the model's {self.model.null_class} classes")
        return np.array([classes[number % len(classes)] for number in numbers])

    def pixels(self, tokens_BL: Tensor) -> np.ndarray:
        """(B, H, W, 3) uint8, 255 x cut off as the published scripts do, or rounded half up."""
        with torch.inference_mode():
            scaled = self.vqgan.decode(tokens_BL).float().clamp(0, 1) * 255
        if self.given.uint8 == "round":
            scaled = scaled + 0.5
        return scaled.floor().byte().permute(0, 2, 3, 1).cpu().numpy()

    def bands(self, numbers: list[int], canvas_BL: Tensor, images: np.ndarray) -> list[tuple[np.ndarray, ...]]:
        """What the grid shows of each image of a batch: the result, or original, what was known, result."""
        wanted = self.given.shown
        if self.task not in STARTED:
            return [(image,) for image in images[:wanted]]
        whole = self.pixels(torch.from_numpy(self.known.gen[numbers][:wanted]).to(self.device))
        unknown = (canvas_BL == self.vocab.mask)[:wanted].reshape(-1, self.grid, self.grid).cpu().numpy()
        cell = whole.shape[1] // self.grid
        hidden = unknown.repeat(cell, axis=1).repeat(cell, axis=2)[..., None]
        return list(zip(whole, np.where(hidden, np.uint8(128), whole), images[:wanted], strict=True))

    def save_grid(self, path: Path, shown: list[tuple[np.ndarray, ...]]) -> None:
        """The picture to look at first."""
        from pipeline.preview import save_grid

        rows = [np.stack(band) for band in zip(*shown[: self.given.shown], strict=True)]
        names = ["original", "known", self.task] if self.task in STARTED else [self.task]
        save_grid(path, rows, names)


def save_png(folder: Path, number: int, image_HWC: np.ndarray) -> None:
    """One sample as PNG."""
    from PIL import Image

    Image.fromarray(image_HWC).save(folder / PNG.format(number))
