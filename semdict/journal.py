"""Journal of stage commands: when each ran, how long, on what device, from which commit.

One JSON line per run of a command in reports/PRESET/journal.jsonl, kept apart from the stages' outputs, which stay
equal from run to run. `semdict report` reads it.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from semdict import __version__

# commands that make a result; dvc.yaml runs no others (tests/test_journal.py)
STAGES = (
    "semdict manifest",
    "semdict sample-features",
    "semdict kmeans",
    "semdict encode",
    "semdict pretrain",
    "semdict condition",
    "semdict generate",
    "semdict evaluate",
    "semdict vcq",
    "semdict ar",
    "semdict analyse",
    "semdict entropy",
)
FILE = "journal.jsonl"
OMITTED = ("--resume",)  # options that change no result


def run_recorded(name: str, words: Sequence[str], args: argparse.Namespace, run: Callable[..., int | None]) -> int:
    """run(args) as an exit status; a stage command also gets an entry in the journal, whether it ends well or not.

    The folder reports/PRESET must exist when the command ends: a command that reports elsewhere leaves no entry.
    """
    started, clock, exit_status = datetime.now(UTC), time.monotonic(), 1
    try:
        exit_status = run(args) or 0
        return exit_status
    finally:
        folder = _folder(name, args)
        if folder is not None and folder.is_dir():
            entry = {
                "command": " ".join([name, *(word for word in words if word not in OMITTED)]),
                "started": started.isoformat(timespec="seconds"),
                "seconds": round(time.monotonic() - clock, 2),
                "exit": exit_status,
                "device": device_name(),
                "semdict": __version__,
                **commit(),
            }
            with (folder / FILE).open("a") as file:
                file.write(json.dumps(entry) + "\n")  # one write: commands that end together do not mix their lines


def _folder(name: str, args: argparse.Namespace) -> Path | None:
    """reports/PRESET for a stage command, by the params.yaml that it reads; None for any other."""
    from semdict.pipeline.common.errors import SemdictError

    if not any(name == stage or name.startswith(f"{stage} ") for stage in STAGES) or "params" not in args:
        return None
    from semdict.pipeline.config.params import params_of

    try:
        return Path("reports") / params_of(args).preset
    except SemdictError:  # the command has said so itself
        return None


def device_name() -> str:
    """The GPU that torch uses in this process, else the processor and its number of cores."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.get_device_name()
    return f"{_processor()}, {os.cpu_count()} cores"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def commit() -> dict[str, Any]:
    """`commit` of the repository around the current folder and whether tracked files were `changed`; {} outside one."""
    try:
        head = _git("rev-parse", "--short=12", "HEAD")
        return {
            "commit": head,
            "changed": bool(_git("status", "--porcelain", "--untracked-files=no", "--", ":!reports")),
        }
    except (OSError, subprocess.SubprocessError):
        return {}


def _git(*words: str) -> str:
    return subprocess.run(["git", *words], capture_output=True, text=True, check=True, timeout=20).stdout.strip()


def read_journal(path: Path) -> list[dict[str, Any]]:
    """Entries in the order in which the commands ended, [] if there is no file. Other lines are left out."""
    entries = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            entry = json.loads(line)
        except ValueError:  # a machine that stopped in the middle of a line
            continue
        if isinstance(entry, dict) and {"command", "started", "seconds", "exit"} <= entry.keys():
            entries.append(entry)
    return entries


def latest(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One entry per command, its last success, in order; `seconds` includes the failed attempts that it resumed."""
    spent: dict[str, float] = {}
    done: dict[str, dict[str, Any]] = {}
    for entry in entries:
        command = entry["command"]
        spent[command] = spent.get(command, 0.0) + entry["seconds"]
        if entry["exit"] == 0:
            done.pop(command, None)
            done[command] = {**entry, "seconds": spent.pop(command)}
    return list(done.values())
