"""Complete files or none: write under a temporary name, flush, rename; locks; and the hashes of what a file holds."""

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from semdict.pipeline.common.errors import BusyError, SemdictError

PART = ".part"  # a name that ends so is never complete
# Left in any folder by file managers, network drives and notebooks: neither data nor a reason to call a folder damaged.
FOREIGN = frozenset({
    ".DS_Store", ".localized", ".directory", ".ipynb_checkpoints", "Thumbs.db", "ehthumbs.db", "desktop.ini",
    "__MACOSX", "@eaDir", ".AppleDouble", ".Spotlight-V100", ".Trashes", ".fseventsd", "Icon\r", "lost+found",
})  # fmt: skip
TEMPORARY = re.compile(rf"(?P<name>.+)\.(?P<pid>\d+){re.escape(PART)}")  # as atomic_write names a file
FULL_BYTES = 16 << 20  # less free space than this is a full disk
FOREIGN_PREFIXES = ("._", ".nfs", ".fuse_hidden", ".~lock.")


def is_foreign(name: str) -> bool:
    """Whether a file or folder of this name belongs to another program (Finder, Explorer, NFS) and is ignored."""
    return name in FOREIGN or name.startswith(FOREIGN_PREFIXES)


@contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is flushed to disk and renamed to `path`, on error removed.

    A link at `path` is followed and stays. The temporary name carries the process id: two writers never share one, and
    the file of a killed writer is removed by the next one. SemdictError names the file when the disk is full.
    """
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers_of(path)
    tmp_path = path.with_name(f"{path.name}.{os.getpid()}{PART}")
    try:
        with explained_full_disk(path):
            yield tmp_path
        if tmp_path.is_file():
            with tmp_path.open("rb") as file:
                os.fsync(file.fileno())
        tmp_path.replace(path)
    except BaseException:
        remove(tmp_path)
        raise


_leftovers: dict[Path, dict[str, list[Path]]] = {}  # folder -> file name -> its temporary files, when first asked


def _remove_leftovers_of(path: Path) -> None:
    """Remove temporary files of `path` whose processes are gone; a folder is listed once per process."""
    if path.parent not in _leftovers:
        temporary: dict[str, list[Path]] = {}
        for other in path.parent.iterdir():
            if match := TEMPORARY.fullmatch(other.name):
                temporary.setdefault(match["name"], []).append(other)
        _leftovers[path.parent] = temporary
    for other in _leftovers[path.parent].pop(path.name, []):
        match = TEMPORARY.fullmatch(other.name)
        if match and other.is_file() and not _is_running(int(match["pid"])):
            remove(other)


def _is_running(pid: int) -> bool:
    """Whether a process of this number exists on this machine."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


@contextmanager
def explained_full_disk(path: Path) -> Iterator[None]:
    """SemdictError that names `path` and the free space where the block fails because its disk is full."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        free = shutil.disk_usage(path.parent).free
        if not _means_full_disk(error, free):
            raise
        raise SemdictError(
            f"{path} cannot be written: no space left on its disk ({free / 1e6:,.0f} MB free); make room and run the "
            "same command again"
        ) from None


def _means_full_disk(error: BaseException, free: int) -> bool:
    """Whether the error or one that led to it is a full disk; torch reports one as an error of its zip writer."""
    chain: BaseException | None = error
    while chain is not None:
        if isinstance(chain, OSError) and chain.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if isinstance(chain, RuntimeError) and "iostream" in str(chain) and free < FULL_BYTES:
            return True
        chain = chain.__cause__ or chain.__context__
    return False


@contextmanager
def hold_lock(path: Path, subject: str) -> Iterator[None]:
    """Hold an advisory lock on file `path`, which is made for it and removed afterwards.

    BusyError names the process that holds it. A killed process holds nothing. Where the file system has no locks, a
    line on stderr says so and the block runs without one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        file = path.open("a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read().strip() or "unknown"
            file.close()
            raise BusyError(f"{subject} is already running: {owner}; wait for it") from None
        except OSError as error:
            print(f"{path}: no locks here ({error.strerror}); do not start {subject} twice", file=sys.stderr)
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            break
        file.close()  # the holder before removed it between our open and our lock
    with file:
        file.truncate(0)
        owner = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%F %T")}
        file.write(json.dumps({**owner, "command": " ".join(sys.argv)}))
        file.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def remove(path: str | os.PathLike) -> None:
    """Delete a file, a link or a folder; nothing happens where there is none."""
    path = Path(path)
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Write `value` as indented JSON with sorted keys, complete or not at all."""
    with atomic_write(path) as tmp_path:
        tmp_path.write_text(json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n")


def sha256_file(path: str | os.PathLike) -> str:
    """Hex SHA-256 of a file's bytes, read in blocks."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_json(value: Any) -> str:
    """Hex SHA-256 of a JSON-able value in canonical form (sorted keys, no spaces)."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
