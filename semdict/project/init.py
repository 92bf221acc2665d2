"""`semdict init NAME --images DIR`: writes presets/NAME.yaml for a folder of images and makes it params.yaml."""

import argparse
import re
import sys
from pathlib import Path

from semdict.pipeline.common.errors import UsageError
from semdict.pipeline.common.files import atomic_write
from semdict.pipeline.config.command import activate, missing_inputs, refuse_outside_project
from semdict.pipeline.config.params import override
from semdict.pipeline.config.presets import BASE, PRESETS, preset_names, render

EXAMPLE = """examples:
  semdict init photos --images ~/photographs              class folders, image files, tars or parquet
  semdict init photos --images train=~/a --images val=~/b
  semdict init photos --images 'tars/{000..127}.tar' --label-key label
  semdict init photos --images ~/photographs --vqgan weights/vqgan/mine.ckpt --teacher vit_base_patch16_dinov3.lvd1689m

Splits are recognised by the names train, val, validation and test of folders, tars or parquet files; of other images
one in ten is held out as val. The preset extends presets/small.yaml."""

HEADER = """Written by `semdict init {name}`: {about}.
What is not here stands in presets/small.yaml, and below it in presets/base.yaml.
After an edit: semdict preset {name}"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The images, and what cannot be seen from them."""
    parser.add_argument("name", help="the preset: presets/NAME.yaml, shards/NAME, runs/NAME, reports/NAME")
    parser.add_argument(
        "--images", action="append", required=True, metavar="[SPLIT=]DIR", help="folder or pattern; repeat per split"
    )
    parser.add_argument("--layout", default="auto", help="auto | classes | flat | webdataset | parquet")
    parser.add_argument("--label-key", help="parquet column or key of a tar's .json that holds the labels")
    parser.add_argument("--size", type=int, help="pixels a side (default: 8 cells of the tokenizer)")
    parser.add_argument("--vqgan", help="tokenizer: a file, a run of vcq train, or hf-hub:owner/name/file")
    parser.add_argument("--teacher", help="timm's name of the teacher")
    parser.add_argument("--teacher-weights", help="its checkpoint (default: the model's own, from the hub)")
    parser.add_argument("--title", help="title of the token set")
    parser.add_argument("--licence", help="licence of the images, which their tokens carry")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="set any parameter too")
    parser.add_argument("--force", action="store_true", help="overwrite presets/NAME.yaml")


def run(args: argparse.Namespace) -> int:
    """Look at the images, choose the models, write the preset and params.yaml, say what follows."""
    from semdict.project.images import look_at
    from semdict.project.models import choose_teacher, choose_tokenizer, missing_weights
    from semdict.project.overlay import overlay, small, text_of

    refuse_outside_project()
    path = preset_path(args.name, args.force)
    default = small()
    print(f"listing the images in {', '.join(args.images)}", file=sys.stderr)
    images = look_at(args.images, args.label_key, args.layout)
    tokenizer = choose_tokenizer(args.vqgan, default.vqgan.weights)
    teacher = choose_teacher(args.teacher, args.teacher_weights, default.features.model)
    card = {
        "title": args.title or f"{args.name} in paired tokens",
        "licence": args.licence or default.shards.licence,
        "source": ", ".join(dict.fromkeys(images.images.values())),
    }
    tree = overlay(args.name, images, tokenizer, teacher, args.size, card)
    if args.layout != "auto":
        tree["manifest"]["layout"] = args.layout
    for text in args.set:
        override(tree, text)
    write_preset(path, text_of(tree, HEADER.format(name=args.name, about=images.describe())))
    params = activate(render(args.name), path)

    print(f"images     {images.describe()}")
    for note in images.listing.notes:
        print(f"           {note}")
    grid = params.pixels.size // tokenizer.stride if tokenizer.stride else None
    cells = f", {grid} x {grid} cells" if grid else ""
    print(f"tokenizer  {tokenizer.weights} at {params.pixels.size} pixels{cells}")
    print(f"teacher    {teacher.model}{f' from {teacher.weights}' if teacher.weights else ''}, {params.kmeans.k} words")
    print(f"written    {path}, and with presets/small.yaml and presets/base.yaml as params.yaml")
    missing = missing_weights(tokenizer, teacher)
    missing += [f"{key}: {file} is not there" for key, file in missing_inputs(params)]
    if missing:
        print("\nmissing")
        print("\n".join(f"  {line}" for line in missing))
    if not args.licence:
        print("\nlicence: tokens decode to recognisable images and carry their licence; name it by --licence, or in")
        print(f"  {path} (shards.licence) before the tokens are shared")
    print("\nnext\n" + "\n".join(f"  {line}" for line in next_commands(args.name, bool(images.classes))))
    return 0


def preset_path(name: str, force: bool) -> Path:
    """presets/NAME.yaml; UsageError for a name that cannot be one, or that exists and is not to be overwritten."""
    if not re.fullmatch(r"[a-z0-9][a-z0-9._-]*", name):
        raise UsageError(f"{name!r} cannot name a preset: lower-case letters, digits, '.', '_' and '-', a letter first")
    path = PRESETS / f"{name}.yaml"
    if name in (BASE, "small") or (path.exists() and not force):
        raise UsageError(f"{path} exists; choose another name than {', '.join([BASE, *preset_names()])}, or --force")
    return path


def write_preset(path: Path, text: str) -> None:
    """Write the overlay; one that does not resolve to valid parameters is removed again."""
    from semdict.pipeline.config.params import validate
    from semdict.pipeline.config.presets import resolve

    before = path.read_bytes() if path.exists() else None
    with atomic_write(path) as staged:
        staged.write_text(text)
    try:
        validate(resolve(path.stem), str(path))
    except UsageError:
        path.write_bytes(before) if before is not None else path.unlink()
        raise


def next_commands(name: str, labelled: bool) -> list[str]:
    """The three commands that follow, each with what it gives."""
    stage, scores = ("evaluate", "linear probe, k-NN, few-shot") if labelled else ("score", "samples and their scores")
    commands = {
        "dvc repro encode": f"images to tokens: shards/{name}, checked by `semdict shards verify shards/{name}`",
        "dvc repro pretrain@lease": f"one model on the tokens: runs/{name}/lease",
        f"dvc repro {stage}@lease": f"its scores: {scores}; then `semdict report`",
    }
    width = max(map(len, commands))
    return [f"{command:<{width}}  {about}" for command, about in commands.items()]
