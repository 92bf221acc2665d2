"""The `semdict` command: looks up one entry of the command table, imports it, parses its arguments and runs it."""

import argparse
import importlib
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from semdict import __version__
from semdict.commands import COMMANDS, Command, Group
from semdict.pipeline.common.errors import SemdictError, UsageError, suggestion

DESCRIPTION = "Turns image datasets into paired token shards, and trains on them."
# The key of params.yaml that lowers a command's use of GPU memory.
MEMORY_KEYS = {
    "semdict sample-features": "lower sample_features.batch",
    "semdict encode": "lower encode.batch",
    "semdict pretrain": "raise pretrain.accumulate",
    "semdict condition": "raise condition.accumulate",
    "semdict generate": "lower generate.batch",
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
        if type(error).__name__ != "OutOfMemoryError":  # torch's; by name, `semdict --help` imports no torch
            raise
        message = ". ".join(str(error).split(". ")[:2])
        print(f"{name}: {message}; {MEMORY_KEYS.get(name, 'lower the batch')} and run it again", file=sys.stderr)
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
    parser = argparse.ArgumentParser(
        prog=name,
        description=command.text,
        epilog=command_module.EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command_module.add_arguments(parser)
    return command_module.run(parser.parse_args(words)) or 0


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
