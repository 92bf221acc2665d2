"""`semdict generate`: samples images from a masked model, unconditionally, by class, or around known cells.

B images of a batch, L cells, H, W pixels.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from semdict.pipeline.common.device import keep_freed_memory, reduced_precision
from semdict.pipeline.common.errors import UsageError
from semdict.pipeline.common.files import atomic_write, write_json
from semdict.pipeline.common.publish import check_output
from semdict.pipeline.config.naming import RUN, add_name_argument, required
from semdict.train.data.token_set import recipe_of
from semdict.train.engine import dist
from semdict.train.engine.sampling_run import SamplingRun
from semdict.train.masked.context import Context, hidden_cells, load_context
from semdict.train.masked.encoder import run_name
from semdict.train.masked.iterative_decoding import Decoding, ImageRng, decode_iteratively
from semdict.train.masked.samplers import open_sampler

if TYPE_CHECKING:
    from semdict.pipeline.config.schema import Params, Vqgan
    from semdict.pipeline.shards import TokenShards
    from semdict.pipeline.tokenizers.base import Tokenizer

EXAMPLE = """examples:
  semdict generate --model runs/demo/lease --set generate.images=64
  semdict generate --model weights/lease-vit-b.pth --out samples/lease --set generate.temperature=11
  semdict generate --model runs/demo/lease --task inpaint --set generate.box=[4,4,8,8]
  semdict generate --model runs/demo/lease --task outpaint --set generate.images=16
  semdict generate --model runs/demo/lease --task reconstruct --set generate.mask_ratio=0.75
  semdict generate --model runs/demo/lease-conditional --task class --set generate.classes=[0,3]
  semdict generate --model runs/in1k/lease --resume                        continue after a kill
  torchrun --nproc-per-node 8 -m semdict.train.masked.generate --model runs/in1k/lease

Writes images/000000.png ..., tokens.npz (gen; labels and rows of the manifest where there are any), grid.png and
generate.json. An image's tokens depend on the seed and its number, not on its batch; pixels may differ by one grey
level where another batch size makes convolutions round otherwise.
A class-conditional model with centroids takes those of real images of the split, unless generate.words is false."""

KIND, CARD = "generated", "generate.json"
TASKS = ("unconditional", "class", "inpaint", "outpaint", "reconstruct")
FROM_IMAGES = ("inpaint", "outpaint", "reconstruct")  # tasks that start from real images
NOT_SHAPING = {"batch", "shown"}  # keys of the section that do not change an image
TASK_KEYS = {"box": ("inpaint", "outpaint"), "mask_ratio": ("reconstruct",), "classes": ("class",), "words": ("class",)}
DECODED = 16  # images the tokenizer decodes at once: its widest feature maps take 32 MiB each


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Model and task; the sampling parameters are in params.yaml, section generate."""
    from semdict.pipeline.config.params import add_params_arguments

    add_name_argument(parser, model=RUN)
    parser.add_argument("--model", type=Path, help="a run's folder, its model.pt or a released file")
    parser.add_argument("--num-heads", type=int, help="of a released encoder whose width is none of the published")
    parser.add_argument("--decoder-num-heads", type=int, help="likewise")
    parser.add_argument("--task", choices=TASKS, default="unconditional")
    parser.add_argument("--vqgan", type=Path, help="the tokenizer that decodes (default vqgan.weights)")
    parser.add_argument("--shards", type=Path, help="real images as tokens (default shards/<preset>)")
    add_params_arguments(parser)
    parser.add_argument("--out", type=Path, help="default runs/<preset>/<name of the model>-samples, or -<task>")
    parser.add_argument("--work", default="work", type=Path, help="for images of an unfinished run (default: work)")
    parser.add_argument("--resume", action="store_true", help="continue a killed run; keep a complete one as it is")


def run(args: argparse.Namespace) -> int:
    """Sample all images and publish them, unless the output is complete already."""
    from semdict.pipeline.config.params import params_of

    keep_freed_memory()
    params = params_of(args)
    suffix = "samples" if args.task == "unconditional" else args.task
    out = args.out or Path("runs") / params.preset / f"{run_name(required(args, 'model'))}-{suffix}"
    check_output(out, KIND)
    with dist.process_group(params.runtime.device) as world:
        generation = Generation(args, params, world.device)
        cfg, settings = params.generate, generation.settings
        sampling = SamplingRun(
            "generate", KIND, CARD, __name__, settings, cfg.images, cfg.batch, out, args.work, world, files=image_file
        )
        if sampling.is_published(args.resume):
            return 0
        with sampling.opened(args.resume):
            sampling.sample(partial(generation.batch, sampling.result))
            if world.first:
                generation.finish(sampling)
                sampling.publish()
    return 0


def image_file(number: int) -> str:
    """An image's file inside the output."""
    return f"images/{number:06d}.png"


class Generation:
    """One call of the command: sampler, tokenizer and context; everything is checked when it is made."""

    def __init__(self, args: argparse.Namespace, params: "Params", device: torch.device) -> None:
        self.args, self.cfg, self.task, self.device = args, params.generate, args.task, device
        self.weights = args.vqgan or Path(params.vqgan.weights)
        self.shards = args.shards or Path("shards") / params.preset
        self.sampler = open_sampler(args.model, args.num_heads, args.decoder_num_heads, self.cfg, self.task, device)
        self.vocab, self.grid = self.sampler.vocab, self.sampler.grid
        self.decoding = Decoding(self.cfg.steps, self.cfg.temperature, self.sampler.last_step)
        self.tokenizer = self._open_tokenizer(params.vqgan)
        self.tokens = self._open_tokens()
        self.context = self._load_context()
        self.hidden([0])  # refuses a box that leaves the grid

    def _open_tokenizer(self, cfg: "Vqgan") -> "Tokenizer":
        """The tokenizer; UsageError when it has another codebook than the model."""
        from semdict.pipeline.tokenizers import load_tokenizer

        tokenizer = load_tokenizer(self.weights, self.device, cfg.layout, cfg.ema)
        if tokenizer.codebook_size != self.vocab.codes:
            raise UsageError(
                f"{self.weights} has {tokenizer.codebook_size} codes, {self.args.model} has {self.vocab.codes}; "
                "name the tokenizer of its training by --vqgan"
            )
        return tokenizer

    def _open_tokens(self) -> "TokenShards | None":
        """Tokens of real images, where the task or the sampler needs them; ShardError if they do not fit the model."""
        sampler = self.sampler
        if self.task not in FROM_IMAGES and not sampler.needs_words:
            return None
        from semdict.pipeline.shards import open_shards

        shards = open_shards(self.shards)
        sampler.encoder.check_tokens(self.shards, int(shards.gen_sizes.max()), shards.spec.length, shards.recipe)
        if sampler.needs_words:
            sampler.check_words(self.shards, shards.recipe)
        return shards

    def _load_context(self) -> Context | None:
        """The first images of the split, of the classes of task class."""
        classes = self.cfg.classes if self.task == "class" else []
        return None if self.tokens is None else load_context(self.shards, self.cfg.split, self.cfg.images, classes)

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Everything that shapes the images."""
        unused = NOT_SHAPING | {name for name, tasks in TASK_KEYS.items() if self.task not in tasks}
        if self.tokens is None:
            unused.add("split")
        section = {name: value for name, value in self.cfg.model_dump().items() if name not in unused}
        return {
            **section, "task": self.task, "family": self.sampler.family, "ema": False,
            "schedule": "cosine", "last": self.decoding.last,
            "model_sha256": self.sampler.encoder.sha256, "vqgan_sha256": self.tokenizer.identity["sha256"],
            "tokens": None if self.tokens is None else recipe_of(self.tokens.meta),
        }  # fmt: skip

    def batch(self, folder: Path, numbers: list[int]) -> tuple[dict[str, np.ndarray], Sequence[Callable[[], Any]]]:
        """Tokens of the images with these numbers, and jobs that write the images to `folder`."""
        from semdict.pipeline.shards.ids import id_dtype

        context_BL = self.context_tokens(numbers)
        rng = ImageRng(self.cfg.seed, numbers)
        with torch.inference_mode(), reduced_precision(self.device, self.cfg.precision):
            logits_at = self.sampler.logits_at(numbers, self.context)
            tokens_BL = decode_iteratively(logits_at, context_BL, self.vocab.mask, rng, self.decoding)
        images = self.pixels(tokens_BL)
        jobs = [partial(save_png, folder / image_file(n), image) for n, image in zip(numbers, images, strict=True)]
        return {"gen": tokens_BL.cpu().numpy().astype(id_dtype(self.vocab.codes))}, jobs

    def context_tokens(self, numbers: list[int]) -> Tensor:
        """(B, L) int64 tokens that the images start from, the mask id at cells to fill."""
        hidden_BL = self.hidden(numbers)
        tokens_BL = torch.zeros(hidden_BL.shape, dtype=torch.int64)
        if self.task in FROM_IMAGES:
            tokens_BL = torch.from_numpy(self.context.gen[numbers])
        return tokens_BL.masked_fill(hidden_BL, self.vocab.mask).to(self.device)

    def hidden(self, numbers: list[int]) -> Tensor:
        """(B, L) bool: cells to fill."""
        return hidden_cells(self.task, self.grid, self.cfg.box, self.cfg.mask_ratio, self.cfg.seed, numbers)

    def pixels(self, tokens_BL: Tensor) -> np.ndarray:
        """(B, H, W, 3) uint8: 255 x truncated as in the published scripts, or rounded half up."""
        half = 0.5 if self.cfg.uint8 == "round" else 0.0
        parts = []
        with torch.inference_mode():
            for part_BL in tokens_BL.split(DECODED):
                scaled = self.tokenizer.decode(part_BL).float().clamp(0, 1) * 255 + half
                parts.append(scaled.floor().byte().permute(0, 2, 3, 1).cpu().numpy())
        return np.concatenate(parts)

    def finish(self, sampling: SamplingRun) -> None:
        """Write tokens.npz, the grid and the card beside the images."""
        numbers, folder = list(range(self.cfg.images)), sampling.result
        arrays = {"gen": np.concatenate([batch["gen"] for batch in sampling.batches()])}
        labels = self.sampler.labels(numbers, self.context)
        if labels is not None:
            arrays["labels"] = labels
        if self.context is not None:
            arrays["rows"] = self.context.rows
        with atomic_write(folder / "tokens.npz") as staged, staged.open("wb") as file:
            np.savez(file, **arrays)
        self.save_grid(folder, numbers[: self.cfg.shown])
        sources = {"model": str(self.args.model), "vqgan": str(self.weights), "device": self.device.type}
        if self.tokens is not None:
            sources["shards"] = str(self.shards)
        write_json(folder / CARD, {**self.settings, **sources, "fingerprint": sampling.fingerprint})

    def save_grid(self, folder: Path, numbers: list[int]) -> None:
        """Write grid.png: the first images, below their originals and what was known of them where there are any."""
        from PIL import Image

        from semdict.pipeline.images.visualize import save_grid

        rows, names = [np.stack([np.asarray(Image.open(folder / image_file(n))) for n in numbers])], [self.task]
        if self.task in FROM_IMAGES:
            originals = self.pixels(torch.from_numpy(self.context.gen[numbers]).to(self.device))
            cell = originals.shape[1] // self.grid
            hidden = self.hidden(numbers).reshape(-1, self.grid, self.grid).numpy()
            hidden = hidden.repeat(cell, axis=1).repeat(cell, axis=2)[..., None]
            rows, names = [originals, np.where(hidden, np.uint8(128), originals), *rows], ["original", "known", *names]
        save_grid(folder / "grid.png", rows, names)


def save_png(path: Path, image_HW3: np.ndarray) -> None:
    """Write one image, whole or not at all."""
    from PIL import Image

    with atomic_write(path) as staged:
        Image.fromarray(image_HW3).save(staged, format="PNG")


if __name__ == "__main__":
    from semdict.cli import main

    sys.exit(main(["generate", *sys.argv[1:]]))
