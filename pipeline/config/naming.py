"""`--name`: one word that decides every folder of a run.

A run NAME of a preset is runs/PRESET/NAME; what is measured of it goes to reports/PRESET/NAME, what is made from it to
runs/PRESET/NAME-samples, NAME-conditional and so on. Commands state their paths by option; a path that is given itself
wins.
"""

import argparse
import re
from pathlib import Path

from semdict.pipeline.common.errors import UsageError

RUN = "runs/{preset}/{name}"
REPORT = "reports/{preset}/{name}"


def add_name_argument(parser: argparse.ArgumentParser, **paths: str) -> None:
    """--name, and what it decides: option -> path with {preset}, {name} and other options in braces."""
    decided = ", ".join(f"--{option} {path}" for option, path in paths.items())
    parser.add_argument("--name", help=f"name of the run; decides {decided}".replace("{", "<").replace("}", ">"))
    parser.set_defaults(named_paths=paths)


def fill_named_paths(args: argparse.Namespace, preset: str) -> None:
    """Give the options that --name decides their paths, where the command line has none.

    UsageError for a name that is no single folder.
    """
    name = getattr(args, "name", None)
    if name is None or "named_paths" not in args:
        return
    if not re.fullmatch(r"[\w][\w.=,+-]*", name):
        raise UsageError(f"--name {name}: one folder's name, such as lambda-0.3")
    for option, path in args.named_paths.items():
        if getattr(args, option) is None:
            setattr(args, option, Path(path.format(**{**vars(args), "preset": preset, "name": name})))


def required(args: argparse.Namespace, option: str) -> Path:
    """The path of an option that --name may stand for; UsageError where neither is there."""
    value = getattr(args, option)
    if value is None:
        raise UsageError(f"--{option} is missing: name a path, or the run by --name")
    return value
