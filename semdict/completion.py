"""`semdict completion SHELL`: a script with which the shell completes commands, options and files."""

import argparse
from pathlib import Path
from typing import Any

from semdict.cli import COMMANDS, DESCRIPTION, Command, load
from semdict.pipeline.common.errors import UsageError

SHELLS = ("bash", "zsh", "tcsh")
EXAMPLE = """examples:
  semdict completion bash > ~/.local/share/bash-completion/completions/semdict
  semdict completion zsh > ~/.zfunc/_semdict              with fpath+=~/.zfunc before compinit in ~/.zshrc"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which shell."""
    parser.add_argument("shell", choices=SHELLS)


def run(args: argparse.Namespace) -> int:
    """Print the script; UsageError where shtab is not installed."""
    try:
        import shtab
    except ImportError:
        raise UsageError("shell completion needs the package shtab: pip install 'semdict[completion]'") from None
    print(shtab.complete(whole_parser(shtab.FILE), args.shell))
    return 0


def whole_parser(files: Any) -> argparse.ArgumentParser:
    """One parser of all commands, which imports every one of them; `files` completes paths."""
    parser = argparse.ArgumentParser(prog="semdict", description=DESCRIPTION)
    commands = parser.add_subparsers()
    for name, entry in COMMANDS.items():
        sub = commands.add_parser(name, help=entry.text)
        if isinstance(entry, Command):
            _fill(sub, entry, files)
            continue
        actions = sub.add_subparsers()
        for action, command in entry.actions.items():
            _fill(actions.add_parser(action, help=command.text), command, files)
    return parser


def _fill(parser: argparse.ArgumentParser, command: Command, files: Any) -> None:
    """The command's own arguments; those that are paths complete files."""
    load(command).add_arguments(parser)
    for action in parser._actions:
        if action.type is Path:
            action.complete = files
