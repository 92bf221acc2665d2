"""Whole files or none: write aside, flush, rename; and the hashes that name what a file holds."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PART = ".part"  # a name that ends so is never complete


@contextmanager
def write_aside(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is flushed to disk and renamed to `path`, on error removed.

    The temporary name carries the process id, so that two writers never share one.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.{os.getpid()}{PART}")
    try:
        yield aside
        if aside.is_file():
            with aside.open("rb") as file:
                os.fsync(file.fileno())
        aside.replace(path)
    except BaseException:
        remove(aside)
        raise


@contextmanager
def publish_dir(path: str | os.PathLike) -> Iterator[Path]:
    """Yield an empty folder beside `path`; on success it takes the place of `path`, on error it is removed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.{os.getpid()}{PART}")
    remove(aside)
    aside.mkdir()
    try:
        yield aside
        replace_dir(aside, path)
    except BaseException:
        remove(aside)
        raise


def replace_dir(source: Path, target: Path) -> None:
    """Rename folder `source` to `target`, whatever stood there before (removed after it was moved out of the way)."""
    old = target.with_name(f"{target.name}.{os.getpid()}.old{PART}")
    remove(old)
    if target.exists():
        target.replace(old)
    source.replace(target)
    remove(old)


def occupied(path: str | os.PathLike) -> bool:
    """Whether anything stands at `path`; an empty folder, as `make preset` makes them, is nothing."""
    path = Path(path)
    return path.exists() and not (path.is_dir() and not any(path.iterdir()))


def remove(path: str | os.PathLike) -> None:
    """Delete a file or a folder; nothing happens where there is none."""
    path = Path(path)
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Write `value` as indented JSON with sorted keys, whole or not at all."""
    with write_aside(path) as aside:
        aside.write_text(json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n")


def sha256_file(path: str | os.PathLike) -> str:
    """Hex SHA-256 of a file's bytes, read in blocks."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_json(value: Any) -> str:
    """Hex SHA-256 of a JSON-able value in canonical form (sorted keys, no spaces)."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
