"""`semdict generate`: images from a masked-token model, from nothing or around known cells; PNG files and a grid."""

import argparse
import json
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from semdict.pipeline.common.device import reduced_precision, resolve_device
from semdict.pipeline.common.errors import UsageError
from semdict.pipeline.common.files import sha256_json, write_json
from semdict.pipeline.common.memory import keep_freed_memory
from semdict.pipeline.common.progress import progress
from semdict.pipeline.common.publish import check_output, occupied, publish_folder
from semdict.train.data.tokens import recipe_of
from semdict.train.masked.context import Known, hidden_cells, known_images
from semdict.train.masked.encoder import run_name
from semdict.train.masked.objectives import objective_class
from semdict.train.masked.samplers import open_drawer
from semdict.train.masked.sampling import Decoding, ImageDraws, decode_iteratively

if TYPE_CHECKING:
    from semdict.pipeline.config.schema import Params
    from semdict.pipeline.shards import TokenShards
    from semdict.pipeline.tokenizers.base import Tokenizer

EXAMPLE = """examples:
  semdict generate --model runs/demo/lease --set generate.images=64
  semdict generate --model weights/lease-vit-b.pth --out samples/lease --set generate.temperature=11
  semdict generate --model runs/demo/lease --task inpaint --set generate.box=[4,4,8,8]
  semdict generate --model runs/demo/lease --task outpaint --set generate.images=16
  semdict generate --model runs/demo/lease --task reconstruct --set generate.mask_ratio=0.75
  semdict generate --model runs/demo/lease-conditional --task class --set generate.classes=[0,3]

Writes images/000000.png ..., tokens.npz (gen; labels and rows of the manifest where there are any), grid.png and
generate.json. An image's tokens depend on the seed and its number, not on its batch; pixels may differ by one grey
level where another batch size makes convolutions round otherwise.
A conditional model that knows centroids takes those of real images of the split, unless generate.words is false."""

TASKS = ("unconditional", "class", "inpaint", "outpaint", "reconstruct")
STARTED = ("inpaint", "outpaint", "reconstruct")  # tasks that start from real images
FREE = {"device", "batch", "shown"}  # how it is carried out, not what comes out
OWN = {"box": ("inpaint", "outpaint"), "mask_ratio": ("reconstruct",), "classes": ("class",), "words": ("class",)}
DECODED = 16  # images the VQGAN decodes at once: its widest maps take 32 MiB each
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
    from semdict.pipeline.config.params import load_params

    keep_freed_memory()
    params = load_params(args.params, args.set)
    out = args.out or Path("runs") / params.preset / f"{run_name(args.model)}-{args.task}"
    check_output(out, "generated")
    drawing = Drawing(args, params)
    if occupied(out):
        if args.resume and (out / CARD).is_file() and drawing.made(out / CARD):
            print(f"generate: {out} holds these very images; nothing to do", file=sys.stderr)
            return 0
        raise UsageError(f"{out} exists; give another --out, or remove it (--resume keeps one of the same settings)")
    with publish_folder(out, "generated") as folder:
        drawing.draw(folder)
    print(f"generate: {drawing.count} images in {out}", file=sys.stderr)
    return 0


class Drawing:
    """One call of the command: a model, a tokenizer, what the images start from."""

    def __init__(self, args: argparse.Namespace, params: "Params") -> None:
        self.args, self.given, self.task = args, params.generate, args.task
        self.count, self.seed = self.given.images, self.given.seed
        self.device = torch.device(resolve_device(params.runtime.device))
        self.tokenizer, self.weights = params.vqgan, args.vqgan or Path(params.vqgan.weights)
        self.shards = args.shards or Path("shards") / params.preset
        self.drawer = open_drawer(
            args.model, args.num_heads, args.decoder_num_heads, self.given, self.task, self.device
        )  # fmt: skip
        self.vocab, self.grid = self.drawer.vocab, self.drawer.grid

    @cached_property
    def how(self) -> Decoding:
        """Steps, temperature, and what becomes of the last cell."""
        last = objective_class(self.drawer.family).last_step if self.given.last == "family" else self.given.last
        return Decoding(self.given.steps, self.given.temperature, last)

    @cached_property
    def vqgan(self) -> "Tokenizer":
        """The tokenizer; UsageError when it has another codebook than the model."""
        from semdict.pipeline.tokenizers import load_tokenizer

        vqgan = load_tokenizer(self.weights, self.device, self.tokenizer.layout, self.tokenizer.ema)
        if vqgan.codebook_size != self.vocab.codes:
            raise UsageError(
                f"{self.weights} has {vqgan.codebook_size} codes, {self.args.model} knows {self.vocab.codes}; "
                "name the tokenizer of its training by --vqgan"
            )
        return vqgan

    @cached_property
    def tokens(self) -> "TokenShards | None":
        """The real images, where the task starts from them or the model is told their words; checked to fit it."""
        drawer = self.drawer
        if self.task not in STARTED and not drawer.takes_words:
            return None
        from semdict.pipeline.shards import open_shards

        found = open_shards(self.shards)
        drawer.encoder.check_tokens(self.shards, int(found.gen_sizes.max()), found.spec.length, found.recipe)
        if drawer.takes_words:
            drawer.check_words(self.shards, found.recipe)
        return found

    @cached_property
    def known(self) -> Known | None:
        """Tokens of the first of those images."""
        classes = self.given.classes if self.task == "class" else []
        return None if self.tokens is None else known_images(self.shards, self.given.split, self.count, classes)

    @cached_property
    def settings(self) -> dict[str, Any]:
        """All that decides what the images look like."""
        unused = FREE | {name for name, tasks in OWN.items() if self.task not in tasks}
        if self.tokens is None:
            unused.add("split")
        given = {name: value for name, value in self.given.model_dump().items() if name not in unused}
        return {
            **given, "task": self.task, "family": self.drawer.family, "ema": False,
            "schedule": "cosine", "last": self.how.last,
            "model_sha256": self.drawer.encoder.sha256, "vqgan_sha256": self.vqgan.identity["sha256"],
            "tokens": None if self.tokens is None else recipe_of(self.tokens.meta),
        }  # fmt: skip

    @property
    def card(self) -> dict[str, Any]:
        """What the folder says of itself: the settings, their fingerprint, and where things were."""
        places = {"model": str(self.args.model), "vqgan": str(self.weights), "device": self.device.type}
        if self.tokens is not None:
            places["shards"] = str(self.shards)
        return {**self.settings, **places, "fingerprint": sha256_json(self.settings)[:16]}

    def made(self, card: Path) -> bool:
        """Whether a folder's card tells of these settings."""
        return json.loads(card.read_text()).get("fingerprint") == self.card["fingerprint"]

    def draw(self, folder: Path) -> None:
        """All images, a batch at a time; files are written while the next batch is drawn."""
        _ = self.vqgan, self.known  # what does not fit is told before anything is drawn
        tokens, shown = [], []
        (folder / "images").mkdir()
        with ThreadPoolExecutor(4) as pool, progress(self.count, "generate") as bar:
            written: list[Future] = []
            for start in range(0, self.count, self.given.batch):
                numbers = list(range(start, min(start + self.given.batch, self.count)))
                canvas_BL, drawn_BL, images = self.batch(numbers)
                tokens.append(drawn_BL.cpu().numpy().astype(np.uint16))
                for job in written:  # at most one batch of pictures waits
                    job.result()
                written = [pool.submit(save_png, folder / "images", n, image)
                           for n, image in zip(numbers, images, strict=True)]  # fmt: skip
                if len(shown) < self.given.shown:
                    shown += self.bands(numbers, canvas_BL, images)
                bar.update(len(numbers))
            for job in written:
                job.result()
        about = {"labels": self.drawer.labels(list(range(self.count)), self.known)}
        about["rows"] = None if self.known is None else self.known.rows
        given = {name: values for name, values in about.items() if values is not None}
        np.savez(folder / "tokens.npz", gen=np.concatenate(tokens), **given)
        self.save_grid(folder / "grid.png", shown)
        write_json(folder / CARD, self.card)

    def batch(self, numbers: list[int]) -> tuple[Tensor, Tensor, np.ndarray]:
        """Canvas (B, L), drawn codes (B, L) and images (B, H, W, 3) uint8 of the images with these numbers."""
        hidden = hidden_cells(self.task, self.grid, self.given.box, self.given.mask_ratio, self.seed, numbers)
        start = torch.zeros(hidden.shape, dtype=torch.int64)
        if self.task in STARTED:
            start = torch.from_numpy(self.known.gen[numbers])
        canvas_BL = start.masked_fill(hidden, self.vocab.mask).to(self.device)
        draws = ImageDraws(self.seed, numbers)
        with torch.inference_mode(), reduced_precision(self.device, self.given.precision):
            logits_at = self.drawer.logits_at(numbers, self.known)
            drawn_BL = decode_iteratively(logits_at, canvas_BL, self.vocab.mask, draws, self.how)
        return canvas_BL, drawn_BL, self.pixels(drawn_BL)

    def pixels(self, tokens_BL: Tensor) -> np.ndarray:
        """(B, H, W, 3) uint8, 255 x cut off as the published scripts do, or rounded half up."""
        half = 0.5 if self.given.uint8 == "round" else 0.0
        parts = []
        with torch.inference_mode():
            for part_BL in tokens_BL.split(DECODED):
                scaled = self.vqgan.decode(part_BL).float().clamp(0, 1) * 255 + half
                parts.append(scaled.floor().byte().permute(0, 2, 3, 1).cpu().numpy())
        return np.concatenate(parts)

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
        from semdict.pipeline.images.visualize import save_grid

        rows = [np.stack(band) for band in zip(*shown[: self.given.shown], strict=True)]
        names = ["original", "known", self.task] if self.task in STARTED else [self.task]
        save_grid(path, rows, names)


def save_png(folder: Path, number: int, image_HWC: np.ndarray) -> None:
    """One sample as PNG."""
    from PIL import Image

    Image.fromarray(image_HWC).save(folder / PNG.format(number))
