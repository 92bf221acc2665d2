"""Images in webdataset tars, found by byte offset: nothing is ever extracted."""
# Paths are plain strings here: millions of them, no object for each.
# ruff: noqa: PTH118

import json
import os
import tarfile

from semdict.pipeline.common.errors import ManifestError
from semdict.pipeline.common.files import is_foreign
from semdict.pipeline.images.decode import SUFFIXES
from semdict.pipeline.manifest.listing import Ignored, ImageList, Stamp, label_name, looks_like_label, stamp_of

LABEL_KEYS = ("label", "cls")  # looked for in a sample's .json, in this order
MAX_SIDECAR = 1 << 20  # bytes of a .cls or .json; more is no label

Members = dict[str, tarfile.TarInfo]  # suffix -> member


def list_tar(root: str, source: str, label_key: str | None = None) -> ImageList:
    """Samples of one uncompressed tar in the order in which they lie; a sample is what shares a name up to a dot.

    The label is that of `label_key` in the sample's .json, else the content of .cls, or a key of LABEL_KEYS.
    ManifestError names a member with an absolute path or `..`, a link or device, a damaged or truncated archive, a
    sample with two images and an unreadable label.
    """
    path = os.path.join(root, source)
    stamp = stamp_of(path)
    try:
        with tarfile.open(path, "r:") as tar:
            return TarLister(tar, path, stamp, label_key).list(source)
    except tarfile.TarError as error:
        hint = "; compressed tars cannot be read by offset: decompress it" if _compressed(path) else ""
        raise ManifestError(f"{path}: not a sound tar ({error}){hint}") from None
    except (ValueError, OverflowError, EOFError) as error:  # tarfile's answers to damaged extended headers
        raise ManifestError(f"{path}: not a sound tar ({error})") from None
    except OSError as error:
        raise ManifestError(f"{path}: cannot be read: {error.strerror or error}") from None


class TarLister:
    """One open tar and how its labels are read."""

    def __init__(self, tar: tarfile.TarFile, path: str, stamp: Stamp, label_key: str | None):
        self.tar, self.path, self.stamp, self.label_key = tar, path, stamp, label_key
        self.images = ImageList()

    def list(self, source: str) -> ImageList:
        """One row per sample with an image; other members are counted as ignored."""
        images = self.images
        for key, members in self._samples(images.ignored).items():
            suffixes = [suffix for suffix in members if f".{suffix}" in SUFFIXES]
            if len(suffixes) > 1:
                raise ManifestError(
                    f"{self.path}: sample {key!r} has {len(suffixes)} images: {', '.join(suffixes)}; keep one"
                )
            used = {"cls", "json", *suffixes} if suffixes else set()
            for suffix, member in members.items():
                if suffix not in used:
                    images.ignored.add(f".{suffix}", f"{self.path}: {member.name}")
            if suffixes:
                image = members[suffixes[0]]
                images.add(key, source, image.offset_data, image.size, self.stamp, self._label(members))
        return images

    def _samples(self, ignored: Ignored) -> dict[str, Members]:
        """Name up to the first dot of the base name -> its members, in the order of first appearance."""
        samples: dict[str, Members] = {}
        while (member := self.tar.next()) is not None:
            _refuse_unsafe(member, self.path)
            folder, base = os.path.split(member.name)
            if member.isdir() or is_foreign(base) or any(map(is_foreign, folder.split("/"))):
                continue
            if member.offset_data + member.size > self.stamp[0]:
                raise ManifestError(f"{self.path}: truncated inside {member.name!r}")
            stem, _, suffix = base.partition(".")
            if not stem or not suffix:
                ignored.add("hidden" if suffix else "no suffix", f"{self.path}: {member.name}")
                continue
            members = samples.setdefault(os.path.join(folder, stem), {})
            if suffix.lower() in members:
                raise ManifestError(f"{self.path}: {member.name!r} occurs twice; keys must be unique")
            members[suffix.lower()] = member
        _refuse_early_end(self.tar, self.path)
        return samples

    def _label(self, members: Members) -> str | None:
        """Class name from .json or .cls (a number or a name); a number n is class "n" with id n."""
        json_only = self.label_key is not None
        member = members.get("json") if json_only else members.get("cls") or members.get("json")
        if member is None:
            return None
        if member.size > MAX_SIDECAR:
            raise ManifestError(f"{self.path}: {member.name!r} has {member.size} bytes, too many for a label")
        self.tar.fileobj.seek(member.offset_data)
        try:
            text = self.tar.fileobj.read(member.size).decode()
            value = self._json_label(text) if member is members.get("json") else _cls_label(text)
        except (ValueError, TypeError, RecursionError) as error:
            raise ManifestError(f"{self.path}: label {member.name!r} cannot be read: {error}") from None
        return label_name(value, f"{self.path}: {member.name!r}", self.images.label_ids)

    def _json_label(self, text: str) -> object:
        record = json.loads(text)
        if not isinstance(record, dict):
            return None
        keys = LABEL_KEYS if self.label_key is None else (self.label_key,)
        label = next((record[key] for key in keys if key in record), None)
        if label is None:
            self.images.label_candidates |= {key for key in record if looks_like_label(key) and key not in keys}
        return label


def _cls_label(text: str) -> object:
    return int(text) if text.strip().lstrip("-").isdecimal() else text.strip()


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


def _compressed(path: str) -> bool:
    with open(path, "rb") as file:
        return file.read(6).startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd"))
