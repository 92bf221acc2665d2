"""`semdict evaluate`: what a trained encoder or its samples are worth, one action per measure."""

import argparse
import importlib

# action -> (module, what it does); a module offers EXAMPLE, add_arguments(parser) and run(args) -> exit status or None
ACTIONS: dict[str, tuple[str, str]] = {
    "probe": ("train.eval.probe", "linear probe on frozen features (LARS, batch norm without affine)"),
    "knn": ("train.eval.knn", "nearest-neighbour vote on frozen features, also on shifted datasets"),
    "few-shot": ("train.eval.few_shot", "linear probe on a few images per class, mean and spread over seeds"),
    "fine-tune": ("train.eval.finetune", "train the whole encoder as a classifier, from images"),
    "fid": ("train.eval.fid", "image scores of a folder of samples: FID, IS, KID, precision, recall, or the teacher's"),
    "reference": ("train.eval.reference", "the 256-pixel PNGs of a split that fid_val50k compares with"),
    "nearest": ("train.eval.nearest", "samples beside their nearest training images"),
}
WIDTH = max(map(len, ACTIONS))
EXAMPLE = "actions:\n" + "\n".join(f"  {name:<{WIDTH}}  {text}" for name, (_, text) in ACTIONS.items())
EXAMPLE += """

examples:
  semdict evaluate probe --model runs/demo/lease --shards shards/demo
  semdict evaluate knn --model runs/demo/lease

`semdict evaluate ACTION --help` shows more."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The action; its own arguments are read when its module is imported, which is slow for some."""
    parser.usage = "semdict evaluate ACTION ..."
    parser.add_argument("action", choices=ACTIONS, metavar="ACTION", help="one of the actions below")
    parser.add_argument("rest", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> int:
    """Import the action, read its arguments and hand over."""
    name, text = ACTIONS[args.action]
    module = importlib.import_module(name)
    parser = argparse.ArgumentParser(
        prog=f"semdict evaluate {args.action}",
        description=text,
        epilog=module.EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.add_arguments(parser)
    return module.run(parser.parse_args(args.rest)) or 0
