"""Writes the demo's stand-in models, shipped or newly trained: `python -m demo.stand_ins vqgan --out FILE ...`.

The stand-ins replace the VQGAN and the teacher that a user supplies. They are trained on drawn images and useless for
others. A JSON file beside each states its origin and its scores on the demo's validation images.
"""

import argparse
import shutil
import sys
from pathlib import Path

import torch

from demo import train_teacher, train_vqgan
from demo.data import IMAGES, SHIPPED, load_split, read_sums
from semdict.pipeline.common.errors import SemdictError, WeightsError
from semdict.pipeline.common.files import atomic_write, sha256_file, write_json
from semdict.pipeline.common.safeload import load_tensors

TRAINERS = {"vqgan": train_vqgan, "teacher": train_teacher}
SAMPLE = 200  # number of validation images that a stand-in is scored on


def write_stand_in(kind: str, weights: str, images: Path, out: Path, seed: int) -> dict:
    """Write stand-in `kind` ("vqgan", "teacher") to `out`, its origin and scores to <out>.json."""
    if weights == "train":
        training = ["--images", str(images), "--out", str(out), "--seed", str(seed)]
        TRAINERS[kind].main(training)
        made_by = " ".join(["python -m", TRAINERS[kind].__name__, *training])
    else:
        copy_shipped(SHIPPED / out.name, out)
        made_by = "make demo-weights"
    val, labels = load_split(images, "val")
    step = max(1, len(val) // SAMPLE)
    card = {
        "stand_in": f"demo {kind}, trained on drawn images only; not for other images",
        "weights": weights,
        "made_by": made_by,
        "sha256": sha256_file(out),
        **MEASURES[kind](out, val[::step], labels[::step]),
    }
    write_json(out.with_suffix(".json"), card)
    return card


def copy_shipped(source: Path, out: Path) -> None:
    """Copy a shipped file; raises WeightsError if its SHA-256 is not the one in SHA256SUMS."""
    sums = read_sums(source.parent)
    if source.name not in sums or not source.is_file():
        raise WeightsError(f"{source} is not among the shipped weights: {', '.join(sums)}")
    if (digest := sha256_file(source)) != sums[source.name]:
        raise WeightsError(
            f"{source} has SHA-256 {digest}, SHA256SUMS says {sums[source.name]}: restore it with "
            f"`git checkout -- demo/weights`, or train anew with `make demo-weights`"
        )
    with atomic_write(out) as staged:
        shutil.copyfile(source, staged)


def _measure_vqgan(path: Path, images: torch.Tensor, labels: torch.Tensor) -> dict:
    return train_vqgan.measure(train_vqgan.load_tokenizer(path), images)


def _measure_teacher(path: Path, images: torch.Tensor, labels: torch.Tensor) -> dict:
    model = train_teacher.build().eval()
    model.load_state_dict(load_tensors(path))
    accuracy = train_teacher.accuracy(model, images, labels)
    return {"model": train_teacher.MODEL, "kwargs": train_teacher.KWARGS, "accuracy": accuracy, "images": len(images)}


MEASURES = {"vqgan": _measure_vqgan, "teacher": _measure_teacher}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m demo.stand_ins", description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=TRAINERS)
    parser.add_argument("--weights", choices=["shipped", "train"], default="shipped")
    parser.add_argument("--images", type=Path, default=IMAGES, help="folder that `python -m demo.images` wrote")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0, help="seed of the training")
    args = parser.parse_args(argv)
    try:
        scores = write_stand_in(args.kind, args.weights, args.images, args.out, args.seed)
    except SemdictError as error:
        print(f"demo.stand_ins {args.kind}: {error}", file=sys.stderr)
        return error.exit_code
    print(f"{args.out} ({args.weights}): {scores}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
