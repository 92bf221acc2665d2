"""Images in folders: `split/class/**/*.jpeg`, or a folder without classes."""
# Paths are plain strings here: millions of them, no object for each.
# ruff: noqa: PTH116, PTH118, PTH122

import errno
import os
from concurrent.futures import ThreadPoolExecutor

from semdict.pipeline.common.errors import ManifestError
from semdict.pipeline.common.files import is_foreign
from semdict.pipeline.images.decode import SUFFIXES
from semdict.pipeline.manifest.listing import Ignored, ImageList, Stamp, make_stamp, refuse_duplicates

LIST_THREADS = 16  # waiting for a network file system, mostly

File = tuple[str, Stamp]  # path relative to the split's root, stamp


def list_folder(root: str, classes: bool) -> ImageList:
    """All image files under `root`, sorted by key (path without suffix); with `classes` the top folder is the label.

    Links are followed; hidden names (leading dot) are left out. ManifestError names an unreadable folder, a link that
    leads back to a folder above it, an empty class folder, two files of one key, and a name that is not UTF-8.
    """
    images = ImageList()
    folders, files = _scan(root, "", images.ignored)
    if classes:
        if files:
            raise ManifestError(f"{root}: {files[0][0]} lies beside the class folders; move it, or set layout: flat")
    else:
        _add(images, files)
    top = _identity(root)
    with ThreadPoolExecutor(LIST_THREADS) as pool:
        for name, part in zip(folders, pool.map(lambda name: _walk(root, name, (top,)), folders), strict=True):
            if classes and not part.keys:
                raise ManifestError(f"{os.path.join(root, name)}: class folder without images; fill or remove it")
            part.labels = [name if classes else None] * len(part.keys)
            images.extend(part, root)
    images.sort()
    refuse_duplicates(images.keys, images.sources, "keys are paths without suffix: rename or remove one")
    return images


def _walk(root: str, folder: str, above: tuple[tuple[int, int], ...]) -> ImageList:
    """Everything under root/folder; `above` are the (device, inode) of the folders that lead here."""
    images = ImageList()
    pending = [(folder, above)]
    while pending:
        here, above = pending.pop()
        identity = _identity(os.path.join(root, here))
        if identity in above:
            raise ManifestError(f"{os.path.join(root, here)}: link back to a folder above it (a loop); remove the link")
        folders, files = _scan(root, here, images.ignored)
        _add(images, files)
        pending.extend((os.path.join(here, name), (*above, identity)) for name in folders)
    return images


def _scan(root: str, folder: str, ignored: Ignored) -> tuple[list[str], list[File]]:
    """Names of the sub-folders and the image files, both sorted; files of file managers are passed over."""
    folders, files = [], []
    try:
        with os.scandir(os.path.join(root, folder)) as entries:
            for entry in entries:
                path, suffix = os.path.join(folder, entry.name), os.path.splitext(entry.name)[1].lower()
                if is_foreign(entry.name):
                    continue
                if entry.name.startswith("."):
                    ignored.add("hidden", path)
                elif entry.is_dir():
                    folders.append(entry.name)
                elif suffix not in SUFFIXES:
                    ignored.add(suffix or "no suffix", path)
                else:
                    files.append((_utf8(path), _stamp(entry)))
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise ManifestError(f"{error.filename}: link that leads to itself (a loop); remove the link") from None
        raise ManifestError(f"{os.path.join(root, folder)}: folder cannot be read: {error.strerror}") from None
    return sorted(folders), sorted(files)


def _add(images: ImageList, files: list[File]) -> None:
    for path, stamp in files:
        images.add(os.path.splitext(path)[0], path, 0, stamp[0], stamp, None)


def _stamp(entry: os.DirEntry) -> Stamp:
    """The file's stamp; zeros for a link to nothing, which reading will report as unreadable."""
    try:
        return make_stamp(entry.stat())
    except OSError:
        return 0, 0, 0


def _identity(path: str) -> tuple[int, int]:
    try:
        status = os.stat(path)
    except OSError as error:
        raise ManifestError(f"{path}: folder cannot be read: {error.strerror}") from None
    return status.st_dev, status.st_ino


def _utf8(path: str) -> str:
    try:
        path.encode()
    except UnicodeEncodeError:
        raise ManifestError(f"file name {os.fsencode(path)!r} is not UTF-8; rename it") from None
    return path
