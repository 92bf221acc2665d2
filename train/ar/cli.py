"""`semdict ar`: train the autoregressive model on token shards, sample from it."""

import argparse
import importlib

EXAMPLE = """examples:
  semdict ar train --shards shards/demo-vcq --out runs/demo/ar
  semdict ar train --resume                                      continue after a kill; a complete run is left alone
  semdict ar sample --model runs/demo/ar --tokenizer runs/demo/vcq --out runs/demo/samples
  semdict ar sample --set ar_sample.scale=0 --set ar_sample.temperature=0.85
  torchrun --nproc-per-node 8 -m train.ar.train --shards shards/in1k-vcq-base"""

ACTIONS = {"train": "train.ar.train", "sample": "train.ar.generate"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One sub-parser per action."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    for name, module in ACTIONS.items():
        action = importlib.import_module(module)
        action.add_arguments(actions.add_parser(name, help=action.__doc__.splitlines()[0]))


def run(args: argparse.Namespace) -> int:
    """Hand over to the action."""
    return importlib.import_module(ACTIONS[args.action]).run(args)
