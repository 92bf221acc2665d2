"""`semdict vcq`: train the 1-D tokenizer with a growing codebook, encode images with it."""

import argparse
import importlib

EXAMPLE = """examples:
  semdict vcq train --manifest data/demo/manifest.parquet --out runs/demo/vcq
  semdict vcq train --resume                                     continue after a kill; a complete run is left alone
  semdict vcq train --set vcq.schedule=constant --out runs/demo/vcq-constant
  semdict vcq encode --tokenizer runs/demo/vcq --out shards/demo-vcq --set encode.views=[ten-crop]
  torchrun --nproc-per-node 8 -m train.vcq.train"""

ACTIONS = {"train": "train.vcq.train", "encode": "train.vcq.encode"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One sub-parser per action."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    for name, module in ACTIONS.items():
        action = importlib.import_module(module)
        action.add_arguments(actions.add_parser(name, help=action.__doc__.splitlines()[0]))


def run(args: argparse.Namespace) -> int:
    """Hand over to the action."""
    return importlib.import_module(ACTIONS[args.action]).run(args)
