"""`semdict ar sample`: samples images by class; tokens from the autoregressive model, pixels from the tokenizer.

N images, B of a batch, L positions, H, W pixels.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from semdict.pipeline.common.errors import UsageError
from semdict.pipeline.common.files import atomic_write, write_json
from semdict.pipeline.common.publish import check_output
from semdict.pipeline.config.naming import RUN, add_name_argument
from semdict.train.ar.model import ArModel
from semdict.train.ar.sampler import sample
from semdict.train.ar.train import check_tokenizer
from semdict.train.engine import dist
from semdict.train.engine.guidance import Guidance
from semdict.train.engine.model_file import load_model
from semdict.train.engine.sampling_run import SamplingRun
from semdict.train.vcq.tokenizer import load_vcq_tokenizer

if TYPE_CHECKING:
    from semdict.pipeline.config.schema import ArSample, Params

EXAMPLE = """examples:
  semdict ar sample --model runs/demo/ar --tokenizer runs/demo/vcq --out samples
  semdict ar sample --draw unguided --set ar_sample.unguided_temperature=0.85      the paper's "w/o CFG"
  semdict ar sample --set ar_sample.mode=ramp                                     plain cosine guidance (table 8)
  semdict ar sample --resume                                                      continue after a kill
  torchrun --nproc-per-node 8 -m semdict.train.ar.sample

Writes samples.npz (arr_0 uint8 (N, H, W, 3), arr_1 labels, tokens), grid.png and sampling.json."""

KIND, CARD = "ar-samples", "sampling.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Model and tokenizer; the sampling parameters are in params.yaml, section ar_sample."""
    from semdict.pipeline.config.params import add_params_arguments

    add_params_arguments(parser)
    add_name_argument(parser, model=RUN, out=f"{RUN}-samples-{{draw}}")
    parser.add_argument("--model", type=Path, help="run of `semdict ar train` (default runs/<preset>/ar)")
    parser.add_argument("--tokenizer", type=Path, help="run of `semdict vcq train` (default runs/<preset>/vcq)")
    parser.add_argument("--draw", choices=("guided", "unguided"), default="guided", help="default: guided")
    parser.add_argument("--out", type=Path, help="default: runs/<preset>/ar-samples-<draw>")
    parser.add_argument("--work", default="work", type=Path, help="for images of an unfinished run (default: work)")
    parser.add_argument("--resume", action="store_true", help="continue a killed run; keep a complete one as it is")


def run(args: argparse.Namespace) -> int:
    """Sample all images and publish them, unless the output is complete already."""
    from semdict.pipeline.config.params import params_of

    params = params_of(args)
    out = args.out or Path("runs") / params.preset / f"ar-samples-{args.draw}"
    check_output(out, KIND)
    with dist.process_group(params.runtime.device) as world:
        sampler = ArSampler(args, params, world.device)
        settings, count = sampler.settings, len(sampler.labels)
        batch = sampler.cfg.batch
        sampling = SamplingRun("ar sample", KIND, CARD, __name__, settings, count, batch, out, args.work, world)
        if sampling.is_published(args.resume):
            return 0
        with sampling.opened(args.resume):
            sampling.sample(sampler.batch)
            if world.first:
                sampler.finish(sampling)
                sampling.publish()
    return 0


class ArSampler:
    """One call of the command: model, tokenizer, labels and guidance; checked to fit when it is made."""

    def __init__(self, args: argparse.Namespace, params: "Params", device: torch.device) -> None:
        self.cfg, self.draw, self.device = section(params.ar_sample, args.draw), args.draw, device
        runs = Path("runs") / params.preset
        self.model, self.file = load_model(args.model or runs / "ar", ArModel, device)
        path = args.tokenizer or runs / "vcq"
        self.tokenizer = load_vcq_tokenizer(path, device)
        check_tokenizer(self.file.about["token_set"], self.tokenizer.identity, path)
        if self.tokenizer.quantizer.sizes != self.model.config.sizes:
            raise UsageError(f"{path} has other codebook sizes than the model was trained with")
        self.labels = sampled_labels(self.cfg.classes, self.cfg.per_class, self.model.null_class)
        self.guidance = Guidance(self.cfg.scale, self.cfg.power, self.cfg.start, self.cfg.mode)

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that shapes the images."""
        cfg = {name: value for name, value in self.cfg.model_dump().items() if name != "batch"}
        models = {"model_sha256": self.file.sha256, "tokenizer_sha256": self.tokenizer.identity["sha256"]}
        return {**cfg, **models, "draw": self.draw, "images": len(self.labels)}

    def batch(self, numbers: list[int]) -> tuple[dict[str, np.ndarray], Sequence[Callable[[], Any]]]:
        """Images (B, H, W, 3) uint8 and tokens (B, L) uint16 or uint32 of the images with these numbers."""
        from semdict.pipeline.images.visualize import to_uint8
        from semdict.pipeline.shards.ids import id_dtype

        cfg, dtype = self.cfg, id_dtype(max(self.model.config.sizes))
        labels_B = torch.tensor([self.labels[number] for number in numbers], device=self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=cfg.precision == "bfloat16"):
            ids_BL = sample(self.model, labels_B, numbers, cfg.seed, cfg.temperature, self.guidance)
            pixels = self.tokenizer.decode(ids_BL)
        return {"images": to_uint8(pixels), "tokens": ids_BL.cpu().numpy().astype(dtype)}, []

    def finish(self, sampling: SamplingRun) -> None:
        """Write samples.npz, the grid and the card."""
        from semdict.pipeline.images.visualize import save_grid

        images, tokens, folder = None, [], sampling.result
        for number, batch in enumerate(sampling.batches()):
            if images is None:  # on disk: ImageNet-1k's 50,000 samples take 10 GB
                shape = (len(self.labels), *batch["images"].shape[1:])
                images = np.lib.format.open_memmap(sampling.store.folder / "images.npy", "w+", np.uint8, shape)
            start = number * sampling.batch
            images[start : start + len(batch["images"])] = batch["images"]
            tokens.append(batch["tokens"])
        with atomic_write(folder / "samples.npz") as staged, staged.open("wb") as file:
            np.savez(file, arr_0=images, arr_1=np.array(self.labels), tokens=np.concatenate(tokens))
        names = self.file.about.get("classes") or []
        save_grid(folder / "grid.png", *rows_by_class(images, self.labels, names))
        card = {**self.cfg.model_dump(), **self.settings, "class_names": names, "fingerprint": sampling.fingerprint}
        write_json(folder / CARD, card)


def section(cfg: "ArSample", draw: str) -> "ArSample":
    """The section for `draw` guided, or without guidance and at unguided_temperature for unguided."""
    if draw == "guided":
        return cfg
    return cfg.model_copy(update={"scale": 0.0, "start": 0.0, "temperature": cfg.unguided_temperature})


def sampled_labels(classes: list[int], per_class: int, null_class: int) -> list[int]:
    """`per_class` times each of `classes` ([] = all), class by class; UsageError for a wrong one."""
    for label in classes:
        if not 0 <= label <= null_class:
            raise UsageError(f"ar_sample.classes: {label} is not in [0, {null_class}] ({null_class} = no class)")
    return [label for label in classes or range(null_class) for _ in range(per_class)]


def rows_by_class(images_NHW3: np.ndarray, labels: list[int], names: list[str]) -> tuple[list[np.ndarray], list[str]]:
    """At most eight rows of at most eight images, for classes spread evenly over those sampled, and their names."""
    classes = sorted(set(labels))
    shown = [classes[i] for i in np.linspace(0, len(classes) - 1, min(8, len(classes))).astype(int)]
    rows = [images_NHW3[np.flatnonzero(np.array(labels) == label)[:8]] for label in shown]
    return rows, [names[label] if label < len(names) else str(label) for label in shown]


if __name__ == "__main__":
    from semdict.cli import main

    sys.exit(main(["ar", "sample", *sys.argv[1:]]))
