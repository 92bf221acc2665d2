"""The `semdict` command: the table of all commands, and the call of one.

The table is plain data: `semdict --help` imports no command. A command is a module that offers `EXAMPLE` (text under
--help), `add_arguments(parser)` and `run(args)` -> exit status or None; "module:Name" is a class in it that does. A
group is a command with actions, such as `semdict vcq train`.
"""

import argparse
import importlib
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from semdict import __version__
from semdict.journal import run_recorded
from semdict.options import OptionParser
from semdict.pipeline.common.errors import SemdictError, UsageError, suggestion
from semdict.train.eval.measures import MEASURES


class Command(NamedTuple):
    """A module, imported only when its command is called, and one line of help."""

    module: str
    text: str


class Group(NamedTuple):
    """Commands under one name, one line of help, and examples of their use."""

    actions: dict[str, Command]
    text: str
    example: str


SHARDS = {
    "info": Command("semdict.pipeline.shards.command:Info", "counts, grid, codebooks, bits per token, provenance"),
    "verify": Command("semdict.pipeline.shards.command:Verify", "read every byte and name damaged arrays and chunks"),
    "import": Command("semdict.pipeline.shards.command:Import", "write the tokens of another layout as shards"),
    "export": Command("semdict.pipeline.shards.command:Export", "write a shard directory in another layout"),
    "push": Command("semdict.pipeline.shards.push", "publish a shard directory as a dataset of the Hugging Face Hub"),
}
VCQ = {
    "train": Command("semdict.train.vcq.train", "train the tokenizer and its discriminator on a manifest's images"),
    "encode": Command("semdict.train.vcq.encode", "turn every image into its tokens, as a shard directory"),
    "evaluate": Command("semdict.train.eval.vcq_scores", "reconstruction, codebook use, first-k-token probe, samples"),
}
VQGAN = {
    "train": Command("semdict.train.vqgan.train", "train a VQGAN and its discriminator on a manifest's images"),
}
AR = {
    "train": Command("semdict.train.ar.train", "train on the generative tokens of a shard directory"),
    "sample": Command("semdict.train.ar.sample", "sample images: tokens from the model, pixels from the tokenizer"),
}

COMMANDS: dict[str, Command | Group] = {
    "init": Command("semdict.project.init", "start: write a preset for a folder of images, and make it params.yaml"),
    "manifest": Command("semdict.pipeline.manifest.stage", "list the images: key, label, split, size, SHA-256, status"),
    "sample-features": Command("semdict.pipeline.kmeans.sample_features", "sample teacher patch features for k-means"),
    "kmeans": Command("semdict.pipeline.kmeans.stage", "cluster the sampled features into the discriminative codebook"),
    "encode": Command("semdict.pipeline.encode.stage", "turn every image into generative and discriminative tokens"),
    "shards": Group(
        SHARDS,
        "token shards",
        "examples:\n"
        "  semdict shards info shards/demo\n"
        "  semdict shards import tokens.pt shards/lease --centroids km_16k.npy\n"
        "  semdict shards export shards/demo tokens.pt --to pt",
    ),
    "pretrain": Command(
        "semdict.train.masked.pretrain", "train a masked-token model on token shards, by any objective"
    ),
    "evaluate": Group(
        {name: Command(*entry) for name, entry in MEASURES.items()},
        "scores of an encoder or of samples",
        "examples:\n"
        "  semdict evaluate probe --model runs/demo/lease --shards shards/demo\n"
        "  semdict evaluate knn --model runs/demo/lease",
    ),
    "condition": Command("semdict.train.masked.condition", "fine-tune a pretrained model's decoder on class labels"),
    "generate": Command(
        "semdict.train.masked.generate",
        "sample images: unconditional, by class, inpaint, outpaint, reconstruct",
    ),
    "vqgan": Group(
        VQGAN,
        "generative tokenizer of one's own",
        "examples:\n  semdict vqgan train --out weights/photos-vqgan\n  semdict vqgan train --resume",
    ),
    "vcq": Group(
        VCQ,
        "1-D tokenizer with a growing codebook",
        "examples:\n"
        "  semdict vcq train --set vcq.schedule=constant --out runs/demo/vcq-constant\n"
        "  semdict vcq encode --tokenizer runs/demo/vcq --out shards/demo-vcq --set vcq_encode.views=[ten-crop]\n"
        "  semdict vcq evaluate --tokenizer runs/demo/vcq --samples guided=runs/demo/ar-samples-guided",
    ),
    "ar": Group(
        AR,
        "autoregressive model on the 1-D tokenizer's tokens",
        "examples:\n"
        "  semdict ar train --shards shards/demo-vcq --out runs/demo/ar\n"
        "  semdict ar sample --model runs/demo/ar --tokenizer runs/demo/vcq --out samples",
    ),
    "entropy": Command(
        "semdict.pipeline.analysis.entropy", "information along token sequences (VCQ, table 1, figure 2)"
    ),
    "analyse": Command(
        "semdict.pipeline.analysis.codebooks", "how the two codebooks of a token set relate, and its size on disk"
    ),
    "model": Group(
        {"push": Command("semdict.train.engine.push", "publish a trained model on the Hugging Face Hub")},
        "trained models",
        "example:\n  semdict model push runs/demo/lease my-name/demo-lease --licence mit",
    ),
    "report": Command("semdict.report.command", "one HTML page of all results there are"),
    "preset": Command("semdict.pipeline.config.command:Preset", "write a preset to params.yaml"),
    "check": Command("semdict.project.check", "validate params.yaml, images, models and batches; name what is missing"),
    "completion": Command("semdict.completion", "print a script that completes commands and options in your shell"),
}

DESCRIPTION = "Turns image datasets into paired token shards, and trains on them."
# The key of params.yaml that lowers a command's use of GPU memory.
MEMORY_KEYS = {
    "semdict sample-features": "lower sample_features.batch",
    "semdict encode": "lower encode.batch",
    "semdict pretrain": "raise pretrain.accumulate",
    "semdict condition": "raise condition.accumulate",
    "semdict generate": "lower generate.batch",
    "semdict vqgan train": "raise vqgan_train.accumulate",
    "semdict vcq train": "raise vcq.accumulate",
    "semdict vcq encode": "lower vcq_encode.batch",
    "semdict ar train": "raise ar.accumulate",
    "semdict ar sample": "lower ar_sample.batch",
    "semdict evaluate fine-tune": "raise evaluate.finetune.accumulate",
}
EXAMPLE = "example:\n  semdict shards info shards/demo"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; 0 done, 1 failed or unsound, 2 wrong usage, 130 interrupted."""
    words = list(sys.argv[1:] if argv is None else argv)
    name = "semdict"
    try:
        name, command, rest = resolve(words)
        return call(name, command, rest) if command else 0
    except SemdictError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return error.exit_code
    except RuntimeError as error:
        message = explained(name, error)
        if message is None:
            raise
        print(f"{name}: {message}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # `semdict ... | head` closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:  # full disk, missing permission: finished files are kept
        print(f"{name}: {error}; mend it and run the same command again", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return 130


def explained(name: str, error: RuntimeError) -> str | None:
    """The message for a full GPU and for a link that leads back to itself; None for any other error."""
    if type(error).__name__ == "OutOfMemoryError":  # torch's; by name, `semdict --help` imports no torch
        message = ". ".join(str(error).split(". ")[:2])
        return f"{message}; {MEMORY_KEYS.get(name, 'lower the batch')} and run it again"
    return f"{error}: the link leads back to itself; name another path" if "Symlink loop" in str(error) else None


def resolve(words: list[str]) -> tuple[str, Command | None, list[str]]:
    """Full name of the command that `words` call, its entry, and the words left for it.

    Where no command is named, prints the help or the version and returns None for the entry. Raises UsageError for an
    unknown name.
    """
    name, table = "semdict", COMMANDS
    text, example, kind = DESCRIPTION, EXAMPLE, "command"
    if words[:1] == ["--version"]:
        print(f"semdict {__version__}")
        return name, None, []
    while True:
        if not words or words[0] in ("-h", "--help"):
            print(overview(name, kind, text, table, example))
            return name, None, []
        if words[0] not in table:
            raise UsageError(f"unknown {kind} {words[0]!r}; {suggestion(words[0], table)}; see `{name} --help`")
        name, entry, words = f"{name} {words[0]}", table[words[0]], words[1:]
        if isinstance(entry, Command):
            return name, entry, words
        table, text, example, kind = entry.actions, entry.text, entry.example, "action"


def call(name: str, command: Command, words: list[str]) -> int:
    """Import a command's module, parse its arguments and run it; returns the exit status."""
    command_module = load(command)
    parser = OptionParser(
        prog=name,
        description=command.text,
        epilog=command_module.EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command_module.add_arguments(parser)
    return run_recorded(name, words, parser.parse_args(words), command_module.run)


def load(command: Command) -> Any:
    """The module or class of a command."""
    module, _, name = command.module.partition(":")
    imported = importlib.import_module(module)
    return getattr(imported, name) if name else imported


def overview(name: str, kind: str, text: str, table: Mapping[str, Command | Group], example: str) -> str:
    """The help of `semdict` or of a group: one line per entry, then examples."""
    width = max(map(len, table))
    lines = [f"  {entry:<{width}}  {summary(table[entry])}" for entry in table]
    usage = f"usage: {name} {kind.upper()} ..."
    rest = f"`{name} {kind.upper()} --help` shows its options and an example."
    return "\n".join([usage, "", text, "", f"{kind}s:", *lines, "", example, "", rest])


def summary(entry: Command | Group) -> str:
    """An entry's line of help; a group's names its actions."""
    return f"{entry.text}: {', '.join(entry.actions)}" if isinstance(entry, Group) else entry.text


if __name__ == "__main__":
    sys.exit(main())
