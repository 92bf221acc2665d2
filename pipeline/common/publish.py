"""Publishing: the one way in which a command puts a finished output in its place.

An output is complete before it gets its name: a folder is made beside its place as `NAME.PID.part` (or in a work
folder), then renamed. What stands at the place already is replaced only if it is empty or an earlier output of the same
kind, recognised by its card file; anything else is refused before work starts. Links are followed: a linked output
folder stays a link, the folder that it leads to is replaced.
"""

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from semdict.pipeline.common.errors import UsageError
from semdict.pipeline.common.files import PART, explained_full_disk, hold_lock, is_foreign, remove

CARD_BYTES = 1 << 16  # read of a card file when looking for its mark


@dataclass(frozen=True)
class Kind:
    """How an earlier output of one kind is recognised: `card` exists and contains `mark`."""

    label: str
    card: str = ""  # path inside the folder; "" = the output is a single file
    mark: bytes = b""  # a file must begin with it, a card must contain it

    def matches(self, path: Path) -> bool:
        """Whether `path` is an output of this kind."""
        card = path / self.card if self.card else path
        try:
            with card.open("rb") as file:
                head = file.read(CARD_BYTES)
        except OSError:
            return False
        return self.mark in head if self.card else head.lstrip().startswith(self.mark)


FOLDERS: dict[str, list[Kind]] = {
    "shards": [Kind("token shards", "tokens.zarr/zarr.json", b"semdict-token-shards")],
    "features": [
        Kind("sampled features", "features/zarr.json", b'"float16"'),
        Kind("sampled features", "not-needed.json", b"kmeans.centroids"),
    ],
    "run": [Kind("a trainer's run", "run.json", b'"fingerprint"')],
    "generated": [Kind("generated images", "generate.json", b'"fingerprint"')],
    "ar-samples": [Kind("samples of an autoregressive model", "sampling.json", b'"per_class"')],
    "reference": [Kind("reference images", "reference.json", b'"manifest_sha256"')],
    "webdataset": [Kind("a webdataset of tokens", "dataset.json", b'"rows_per_sample"')],
    "hub": [Kind("a Hugging Face folder of tokens", "semdict.json", b"semdict-token-shards")],
    "demo-images": [Kind("demo images", "demo-images.json", b'"seed"')],
}
FILES: dict[str, Kind] = {
    "manifest": Kind("a manifest", mark=b"PAR1"),
    "array": Kind("a .npy array", mark=b"\x93NUMPY"),
    "tensors": Kind("a file of tensors", mark=b"PK\x03\x04"),
    "json": Kind("a JSON file", mark=b"{"),
    "html": Kind("an HTML page", mark=b"<!doctype html"),
}


def check_output(out: str | os.PathLike, kind: str | Kind) -> Path:
    """The path that will be replaced, links followed; called before work starts and again before publishing.

    UsageError where `out` holds anything but nothing or an earlier output of `kind` (a key of FOLDERS or FILES, or
    a Kind of one's own), where it is a mount point, the current folder or one around it, and where its parent cannot be
    written.
    """
    target = Path(os.path.realpath(out))
    _refuse_unreplaceable(out, target)
    kinds = [kind] if isinstance(kind, Kind) else FOLDERS.get(kind) or [FILES[kind]]
    if kinds[0].card:
        _check_folder(out, target, kinds)
    else:
        _check_file(out, target, kinds[0])
    return target


@contextmanager
def publish_folder(out: str | os.PathLike, kind: str | Kind) -> Iterator[Path]:
    """Yield an empty folder beside `out`; on success it takes the place of `out`, on error it is removed.

    Leftovers of killed runs for the same output are removed first. BusyError while another process publishes there.
    """
    target = check_output(out, kind)
    with _publishing(target):
        staged = target.with_name(f"{target.name}.{os.getpid()}{PART}")
        staged.mkdir()
        try:
            with explained_full_disk(target):
                yield staged
            _replace(staged, check_output(target, kind))
        finally:
            remove(staged)


def publish_staged(staged: Path, out: str | os.PathLike, kind: str | Kind) -> None:
    """Put the finished folder `staged` in the place of `out`; it is copied first where `out` is on another disk.

    Temporary files that killed runs left inside `staged` are not published.
    """
    target = check_output(out, kind)
    with _publishing(target):
        remove_leftovers(staged)
        try:
            _replace(staged, target)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            beside = target.with_name(f"{target.name}.{os.getpid()}{PART}")
            with explained_full_disk(target):
                shutil.copytree(staged, beside, symlinks=True)
            _replace(beside, target)
            remove(staged)


def occupied(path: str | os.PathLike) -> bool:
    """Whether anything stands at `path`; an empty folder counts as nothing, and so do files of file managers."""
    path = Path(path)
    return path.exists() and not (path.is_dir() and not _contents(path))


def remove_leftovers(folder: Path) -> None:
    """Remove every temporary file and folder below `folder`; only for a folder that no other process writes to."""
    for path in sorted(folder.rglob(f"*{PART}")):
        if re.search(rf"\.\d+(\.old)?{re.escape(PART)}$", path.name):
            remove(path)


@contextmanager
def _publishing(target: Path) -> Iterator[None]:
    """Hold the output's lock, with its parent made and the leftovers of killed runs removed."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with hold_lock(target.with_name(f".{target.name}.lock"), f"publishing {target}"):
        leftover = re.compile(rf"{re.escape(target.name)}\.\d+(\.old)?{re.escape(PART)}")
        for path in target.parent.iterdir():
            if leftover.fullmatch(path.name):
                remove(path)
        yield


def _replace(staged: Path, target: Path) -> None:
    """Rename `staged` to `target`; what stood there is moved out of the way, and removed at the end."""
    old = target.with_name(f"{target.name}.{os.getpid()}.old{PART}")
    if target.exists():
        target.replace(old)
    try:
        staged.replace(target)
    except OSError:
        if old.exists():
            old.replace(target)
        raise
    remove(old)


def _contents(folder: Path) -> list[str]:
    """Names in a folder, sorted, without those that file managers leave."""
    return sorted(name for name in os.listdir(folder) if not is_foreign(name))  # noqa: PTH208 (names, no paths)


def _refuse_unreplaceable(out: str | os.PathLike, target: Path) -> None:
    if target.is_symlink():  # realpath gives up on loops only
        raise UsageError(f"{out} is a link that leads back to itself; name another output, or remove it")
    here = Path.cwd()
    if target == here or target in here.parents:
        raise UsageError(
            f"{out} is the current folder or one around it: it cannot be replaced; name a folder inside it"
        )
    if target.is_mount():
        raise UsageError(f"{out} is a mount point: it cannot be replaced; name a folder inside it")
    parent = next(path for path in target.parents if path.exists())
    if not parent.is_dir():
        raise UsageError(f"{out}: {parent} is a file, not a folder; name another output")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise UsageError(f"{out}: {parent} cannot be written by this user; name another output")


def _check_file(out: str | os.PathLike, target: Path, kind: Kind) -> None:
    if target.is_dir():
        raise UsageError(f"{out} is a folder, the output is one file ({kind.label}); name a file")
    if target.exists() and target.stat().st_size and not kind.matches(target):
        raise UsageError(f"{out} exists and is not {kind.label}: it is left alone; name another output, or remove it")


def _check_folder(out: str | os.PathLike, target: Path, kinds: list[Kind]) -> None:
    label = kinds[0].label
    if target.is_file():
        raise UsageError(f"{out} is a file, the output is a folder ({label}); name another output, or remove it")
    if not occupied(target) or any(kind.matches(target) for kind in kinds):
        return
    names = _contents(target)
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    raise UsageError(f"{out} holds {shown}, which is not {label}: it is left alone; name another output, or remove it")
