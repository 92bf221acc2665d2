"""Put the demo's stand-in models in place, shipped or freshly trained; `python -m demo.stand_ins vqgan --out FILE ...`.

A stand-in is what a user would bring: here a VQGAN and a teacher trained on drawn images, of no worth for others. Each
comes with a JSON beside it that says how it was made and what it reaches on the images at hand.
"""

import argparse
import shutil
import sys
from pathlib import Path

import torch

from demo import train_teacher, train_vqgan
from demo.data import IMAGES, SHIPPED, load_split, read_sums
from demo.images import CLASSES
from semdict.pipeline.common.errors import SemdictError, WeightsError
from semdict.pipeline.common.files import sha256_file, write_aside, write_json
from semdict.pipeline.common.safeload import load_tensors

TRAINERS = {"vqgan": train_vqgan, "teacher": train_teacher}
SAMPLE = 32  # images of the val split that a stand-in is measured on


def place(kind: str, weights: str, images: Path, out: Path, seed: int) -> dict:
    """Write stand-in `kind` ("vqgan", "teacher") to `out`, what it is to <out>.json; weights "shipped" or "train"."""
    if weights == "train":
        training = ["--images", str(images), "--out", str(out), "--seed", str(seed)]
        TRAINERS[kind].main(training)
        made_by = " ".join(["python -m", TRAINERS[kind].__name__, *training])
    else:
        copy_shipped(SHIPPED / out.name, out)
        made_by = "make demo-weights"
    held_out, labels, names = load_split(images / "val")
    labels = torch.tensor([CLASSES.index(name) for name in names])[labels]
    step = max(1, len(held_out) // SAMPLE)
    found = {
        "stand_in": f"demo {kind}, trained on drawn images only; not for other images",
        "weights": weights,
        "made_by": made_by,
        "sha256": sha256_file(out),
        **MEASURES[kind](out, held_out[::step], labels[::step]),
    }
    write_json(out.with_suffix(".json"), found)
    return found


def copy_shipped(source: Path, out: Path) -> None:
    """Copy a shipped file whose SHA-256 is the one in SHA256SUMS; WeightsError when it is not."""
    wanted = read_sums(source.parent)
    if source.name not in wanted or not source.is_file():
        raise WeightsError(f"{source} is not among the shipped weights: {', '.join(wanted)}")
    if (found := sha256_file(source)) != wanted[source.name]:
        raise WeightsError(
            f"{source} has SHA-256 {found}, SHA256SUMS says {wanted[source.name]}: restore it with "
            f"`git checkout -- demo/weights`, or train anew with `make demo-weights`"
        )
    with write_aside(out) as aside:
        shutil.copyfile(source, aside)


def _measure_vqgan(path: Path, images: torch.Tensor, labels: torch.Tensor) -> dict:
    return train_vqgan.measure(train_vqgan.load_tokenizer(path), images)


def _measure_teacher(path: Path, images: torch.Tensor, labels: torch.Tensor) -> dict:
    model = train_teacher.build().eval()
    model.load_state_dict(load_tensors(path))
    found = train_teacher.accuracy(model, images, labels)
    return {"model": train_teacher.MODEL, **found, "images": len(images)}


MEASURES = {"vqgan": _measure_vqgan, "teacher": _measure_teacher}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m demo.stand_ins", description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=TRAINERS)
    parser.add_argument("--weights", choices=["shipped", "train"], default="shipped")
    parser.add_argument("--images", type=Path, default=IMAGES, help="folder that `python -m demo.images` wrote")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0, help="of the training")
    args = parser.parse_args(argv)
    try:
        found = place(args.kind, args.weights, args.images, args.out, args.seed)
    except SemdictError as error:
        print(f"demo.stand_ins {args.kind}: {error}", file=sys.stderr)
        return error.exit_code
    print(f"{args.out} ({args.weights}): {found}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
