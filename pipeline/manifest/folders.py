"""Images in folders: `split/class/**/*.jpeg`, or a folder without classes."""
# Paths are plain strings here: millions of them, no object for each.
# ruff: noqa: PTH116, PTH118, PTH122

import errno
import os
from concurrent.futures import ThreadPoolExecutor

from semdict.pipeline.common.errors import ManifestError
from semdict.pipeline.manifest.listing import IMAGE_SUFFIXES, Found, refuse_duplicates

LIST_THREADS = 16  # waiting for a network file system, mostly


def list_folder(root: str, classes: bool) -> Found:
    """All image files under `root`, sorted by key (path without suffix); with `classes` the top folder is the label.

    Links are followed; hidden names (leading dot) are left out. ManifestError names an unreadable folder, a link that
    leads back to a folder above it, an empty class folder, two files of one key, and a name that is not UTF-8.
    """
    found = Found()
    folders, files = _scan(root, "", found)
    if classes:
        if files:
            raise ManifestError(f"{root}: {files[0][0]} lies beside the class folders; move it, or set layout: flat")
    else:
        _add(found, files, None)
    seen = _identity(root)
    with ThreadPoolExecutor(LIST_THREADS) as pool:
        for name, part in zip(folders, pool.map(lambda name: _walk(root, name, (seen,)), folders), strict=True):
            if classes and not part.keys:
                raise ManifestError(f"{os.path.join(root, name)}: class folder without images; fill or remove it")
            part.labels = [name if classes else None] * len(part.keys)
            found.extend(part, root)
    found.sort()
    refuse_duplicates(found.keys, found.sources, "keys are paths without suffix: rename or remove one")
    return found


def _walk(root: str, folder: str, above: tuple[tuple[int, int], ...]) -> Found:
    """Everything under root/folder; `above` are the (device, inode) of the folders that lead here."""
    found = Found()
    pending = [(folder, above)]
    while pending:
        here, above = pending.pop()
        identity = _identity(os.path.join(root, here))
        if identity in above:
            raise ManifestError(f"{os.path.join(root, here)}: link back to a folder above it (a loop); remove the link")
        folders, files = _scan(root, here, found)
        _add(found, files, None)
        pending.extend((os.path.join(here, name), (*above, identity)) for name in folders)
    return found


def _scan(root: str, folder: str, found: Found) -> tuple[list[str], list[tuple[str, int, int]]]:
    """Names of the sub-folders, and (relative path, bytes, mtime ns) of the image files, both sorted."""
    folders, files = [], []
    try:
        with os.scandir(os.path.join(root, folder)) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    found.ignored["hidden"] += 1
                elif entry.is_dir():
                    folders.append(entry.name)
                elif os.path.splitext(entry.name)[1].lower() not in IMAGE_SUFFIXES:
                    found.ignored[os.path.splitext(entry.name)[1].lower() or "no suffix"] += 1
                else:
                    files.append((_utf8(os.path.join(folder, entry.name)), *_stamp(entry)))
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise ManifestError(f"{error.filename}: link that leads to itself (a loop); remove the link") from None
        raise ManifestError(f"{os.path.join(root, folder)}: folder cannot be read: {error.strerror}") from None
    return sorted(folders), sorted(files)


def _add(found: Found, files: list[tuple[str, int, int]], label: str | None) -> None:
    for path, size, mtime in files:
        found.add(os.path.splitext(path)[0], path, 0, size, (size, mtime), label)


def _stamp(entry: os.DirEntry) -> tuple[int, int]:
    """(bytes, mtime ns); (0, 0) for a link to nothing, which reading will report as unreadable."""
    try:
        found = entry.stat()
    except OSError:
        return 0, 0
    return found.st_size, found.st_mtime_ns


def _identity(path: str) -> tuple[int, int]:
    try:
        found = os.stat(path)
    except OSError as error:
        raise ManifestError(f"{path}: folder cannot be read: {error.strerror}") from None
    return found.st_dev, found.st_ino


def _utf8(path: str) -> str:
    try:
        path.encode()
    except UnicodeEncodeError:
        raise ManifestError(f"file name {os.fsencode(path)!r} is not UTF-8; rename it") from None
    return path
