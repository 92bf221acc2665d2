"""The `semdict` command: a table of commands, each imported only when it is the one called."""

import argparse
import importlib
import os
import sys

from semdict import __version__
from semdict.pipeline.common.errors import SemdictError

# command -> (module, what it does). A module offers add_arguments(parser) and run(args) -> exit status or None.
COMMANDS: dict[str, tuple[str, str]] = {
    "manifest": ("semdict.pipeline.manifest.stage", "list the images: key, label, split, size, SHA-256, status"),
    "sample-features": ("semdict.pipeline.kmeans.sample_features", "draw teacher patch features for k-means"),
    "kmeans": ("semdict.pipeline.kmeans.stage", "cluster the sampled features into the discriminative dictionary"),
    "encode": ("semdict.pipeline.encode.stage", "turn every image into generative and discriminative tokens"),
    "shards": ("semdict.pipeline.shards.command", "info, verify, import, export of token shards"),
    "pretrain": ("semdict.train.masked.pretrain", "train lease, sorcen or mage on token shards"),
    "evaluate": ("semdict.train.eval.cli", "scores of an encoder or of samples: probe, knn, few-shot, fine-tune, fid"),
    "condition": ("semdict.train.masked.condition", "teach a pretrained model classes: its decoder only"),
    "generate": (
        "semdict.train.masked.generate",
        "draw images: unconditional, by class, inpaint, outpaint, reconstruct",
    ),
    "vcq": ("semdict.train.vcq.cli", "1-D tokenizer with a growing codebook: train, encode, evaluate"),
    "ar": ("semdict.train.ar.cli", "autoregressive model on its tokens: train, sample"),
    "entropy": (
        "semdict.pipeline.analysis.stage",
        "where token sets run out of information: table 1 and figure 2 of VCQ",
    ),
    "report": ("semdict.report.command", "one HTML page of whatever results there are"),
    "preset": ("semdict.pipeline.config.presets", "put a preset in force"),
    "check": ("semdict.pipeline.config.checks", "validate params.yaml and say what it would do"),
}


def build_parser() -> argparse.ArgumentParser:
    """The top-level parser; sub-commands are only named here, so that --help stays fast."""
    width = max(map(len, COMMANDS))
    table = "\n".join(f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="semdict",
        description="Image datasets as pairs of aligned token dictionaries, and trainers for them.",
        epilog=f"commands:\n{table}\n\n`semdict COMMAND --help` shows an example.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="semdict COMMAND ...",
    )
    parser.add_argument("--version", action="version", version=f"semdict {__version__}")
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="one of the commands below")
    parser.add_argument("rest", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run one command; 0 done, 1 failed or unsound, 2 wrong usage, 130 interrupted."""
    args = build_parser().parse_args(argv)
    module = importlib.import_module(COMMANDS[args.command][0])
    parser = argparse.ArgumentParser(
        prog=f"semdict {args.command}",
        description=COMMANDS[args.command][1],
        epilog=module.EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.add_arguments(parser)
    given = parser.parse_args(args.rest)
    try:
        return module.run(given) or 0
    except SemdictError as error:
        print(f"semdict {args.command}: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:  # `semdict ... | head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:  # a full disk, a missing right: what is finished is kept
        print(f"semdict {args.command}: {error}; mend it and run the same command again", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"semdict {args.command}: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
