"""Images in webdataset tars, found by byte offset: nothing is ever extracted."""
# Paths are plain strings here: millions of them, no object for each.
# ruff: noqa: PTH118

import json
import os
import tarfile

from semdict.pipeline.common.errors import ManifestError
from semdict.pipeline.manifest.listing import IMAGE_SUFFIXES, Found, label_name, stamp_of

LABEL_KEYS = ("label", "cls")  # looked for in a sample's .json, in this order
MAX_SIDECAR = 1 << 20  # bytes of a .cls or .json; more is no label


def list_tar(root: str, source: str) -> Found:
    """Samples of one uncompressed tar in the order in which they lie; a sample is what shares a name up to a dot.

    ManifestError names a member with an absolute path or `..`, a link or device, a damaged or truncated archive, a
    sample with two images and an unreadable label.
    """
    path = os.path.join(root, source)
    stamp = stamp_of(path)
    try:
        with tarfile.open(path, "r:") as tar:
            samples, ignored = _samples(tar, path, stamp[0])
            return _listed(tar, path, source, stamp, samples, ignored)
    except tarfile.TarError as error:
        hint = "; compressed tars cannot be read by offset: decompress it" if _compressed(path) else ""
        raise ManifestError(f"{path}: not a sound tar ({error}){hint}") from None
    except OSError as error:
        raise ManifestError(f"{path}: cannot be read: {error.strerror or error}") from None


def _samples(tar: tarfile.TarFile, path: str, size: int) -> tuple[dict[str, dict[str, tarfile.TarInfo]], list[str]]:
    """name up to the first dot of the base name -> {suffix: member}, in the order of first appearance."""
    samples: dict[str, dict[str, tarfile.TarInfo]] = {}
    ignored: list[str] = []
    while (member := tar.next()) is not None:
        _refuse_unsafe(member, path)
        if member.isdir():
            continue
        if member.offset_data + member.size > size:
            raise ManifestError(f"{path}: truncated inside {member.name!r}")
        folder, base = os.path.split(member.name)
        stem, _, suffix = base.partition(".")
        if not stem or not suffix:
            ignored.append("hidden" if suffix else "no suffix")
            continue
        members = samples.setdefault(os.path.join(folder, stem), {})
        if suffix.lower() in members:
            raise ManifestError(f"{path}: {member.name!r} occurs twice; keys must be unique")
        members[suffix.lower()] = member
    _refuse_early_end(tar, path)
    return samples, ignored


def _refuse_unsafe(member: tarfile.TarInfo, path: str) -> None:
    parts = member.name.replace("\\", "/").split("/")
    if parts[0] == "" or ".." in parts or parts[0].endswith(":"):
        raise ManifestError(f"{path}: member {member.name!r} points outside the archive; refused")
    if not (member.isreg() or member.isdir()) or member.issparse():
        raise ManifestError(f"{path}: member {member.name!r} is a link, device or sparse file; refused")
    try:
        member.name.encode()
    except UnicodeEncodeError:
        raise ManifestError(f"{path}: member name {member.name!r} is not UTF-8; refused") from None


def _refuse_early_end(tar: tarfile.TarFile, path: str) -> None:
    """tarfile takes a damaged header in the middle for the end; only a block of zeros is the end."""
    tar.fileobj.seek(tar.offset)
    block = tar.fileobj.read(tarfile.BLOCKSIZE)
    if block != bytes(tarfile.BLOCKSIZE):
        raise ManifestError(f"{path}: damaged or truncated at byte {tar.offset}: no end-of-archive mark there")


def _listed(
    tar: tarfile.TarFile,
    path: str,
    source: str,
    stamp: tuple[int, int],
    samples: dict[str, dict[str, tarfile.TarInfo]],
    ignored: list[str],
) -> Found:
    """One row per sample with an image; other members are counted as ignored."""
    found = Found()
    found.ignored.update(ignored)
    for key, members in samples.items():
        images = [suffix for suffix in members if f".{suffix}" in IMAGE_SUFFIXES]
        if len(images) > 1:
            raise ManifestError(f"{path}: sample {key!r} has {len(images)} images: {', '.join(images)}; keep one")
        used = {"cls", "json", *images} if images else set()
        found.ignored.update(f".{suffix}" for suffix in members if suffix not in used)
        if images:
            image = members[images[0]]
            found.add(key, source, image.offset_data, image.size, stamp, _label(tar, path, members, found.label_ids))
    return found


def _label(
    tar: tarfile.TarFile, path: str, members: dict[str, tarfile.TarInfo], label_ids: dict[str, int]
) -> str | None:
    """Class name from .cls (a number or a name) or .json; a number n is class "n" with id n."""
    value: object = None
    member = members.get("cls") or members.get("json")
    if member is None:
        return None
    if member.size > MAX_SIDECAR:
        raise ManifestError(f"{path}: {member.name!r} has {member.size} bytes, too many for a label")
    tar.fileobj.seek(member.offset_data)
    try:
        text = tar.fileobj.read(member.size).decode()
        if member is members.get("cls"):
            value = int(text) if text.strip().lstrip("-").isdecimal() else text.strip()
        else:
            record = json.loads(text)
            value = next((record[name] for name in LABEL_KEYS if name in record), None)
    except (ValueError, TypeError) as error:
        raise ManifestError(f"{path}: label {member.name!r} cannot be read: {error}") from None
    return label_name(value, f"{path}: {member.name!r}", label_ids)


def _compressed(path: str) -> bool:
    with open(path, "rb") as file:
        return file.read(6).startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd"))
