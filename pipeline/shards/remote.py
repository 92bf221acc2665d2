"""Shard directories elsewhere: any address of fsspec, such as hf://datasets/owner/name, s3://, https:// or zip://.

A set is copied once into a cache on this machine, file by file as SHA256SUMS lists them, each compared with its
SHA-256. The cache is named by content: equal sets from two addresses are one copy, a changed set is a new one.
"""

import hashlib
import os
import re
from pathlib import Path, PurePosixPath
from typing import Any

from semdict.pipeline.common.errors import ShardError, UsageError
from semdict.pipeline.common.files import hold_lock, sha256_file
from semdict.pipeline.shards.format import CODEBOOKS, INDEX, SUMS, TOKENS, NotShardsError

CACHE = "SEMDICT_CACHE"  # environment variable: folder of the cache, by default ~/.cache/semdict
PLACES = ("", "shards")  # of a shard directory below an address; `semdict shards push` writes the second
SUMS_BYTES = 64 << 20  # of a plausible SHA256SUMS
# packages that bring fsspec a protocol
PACKAGES = {
    "s3": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "abfs": "adlfs",
    "az": "adlfs",
    "http": "aiohttp",
    "https": "aiohttp",
}


def address_of(path: str | Path) -> str | None:
    """The address that `path` is, None for a path on this machine.

    A Path has lost one of the two slashes of an address; it is put back.
    """
    text = str(path)
    if not re.match(r"[a-z][a-z0-9+.-]+(::|:/)", text) or Path(text).exists():
        return None
    return re.sub(r"(?<![a-z0-9])(?!file:)([a-z][a-z0-9+.-]+):/+", r"\1://", re.sub(r"file:/+", "file:///", text))


def local_shards(path: str | Path) -> Path:
    """`path` itself, or the copy of a shard directory that an address names.

    UsageError for a protocol that is not installed; NotShardsError where there is no shard directory; ShardError for a
    file that is not the one listed.
    """
    address = address_of(path)
    if address is None:
        return Path(path)
    filesystem, root = _open(address)
    place, sums = _read_sums(filesystem, root, address)
    target = _cache() / hashlib.sha256(sums).hexdigest()[:32]
    if target.is_dir():
        return target
    with hold_lock(target.with_name(f"{target.name}.lock"), f"the copy of {address}"):
        if not target.is_dir():
            _copy(filesystem, place, sums, target, address)
    return target


def _cache() -> Path:
    return Path(os.environ.get(CACHE) or Path.home() / ".cache" / "semdict") / "shards"


def _open(address: str) -> tuple[Any, str]:
    """fsspec's file system of an address, and the path in it."""
    from fsspec.core import url_to_fs

    protocol = address.partition(":")[0]
    try:
        return url_to_fs(address)
    except ImportError as error:
        package = PACKAGES.get(protocol, f"fsspec's package for {protocol}")
        raise UsageError(f"{address}: {error}; pip install {package}") from None
    except ValueError as error:
        raise UsageError(f"{address}: {error}") from None
    except Exception as error:  # of the protocol's own library: no network, no permission, a damaged archive
        raise ShardError(f"{address} cannot be opened: {_first_line(error)}") from None


def _read_sums(filesystem: Any, root: str, address: str) -> tuple[str, bytes]:
    """(path of the shard directory, SHA256SUMS) at the first of PLACES that has one."""
    for place in PLACES:
        path = "/".join(filter(None, [root.rstrip("/"), place]))
        try:
            with filesystem.open(f"{path}/{SUMS}" if path else SUMS, "rb") as file:
                return path, file.read(SUMS_BYTES)
        except (FileNotFoundError, KeyError):
            continue
        except Exception as error:
            raise ShardError(f"{address} cannot be read: {_first_line(error)}") from None
    raise NotShardsError(
        f"{address} is not a token shard directory: it has no {SUMS}, nor has shards/ in it. A set in another layout "
        "is fetched and then read by `semdict shards import`"
    )


def _copy(filesystem: Any, place: str, sums: bytes, target: Path, address: str) -> None:
    """Fetch every listed file beside `target`, then rename; a later call goes on where an interrupted one stopped."""
    from semdict.pipeline.common.progress import progress

    part = target.with_name(f"{target.name}.part")
    part.mkdir(parents=True, exist_ok=True)
    digests = _listed(sums, address)
    with progress(len(digests), f"fetch {address}", unit="file") as bar:
        for name, digest in digests.items():
            file = part / name
            if not (file.is_file() and sha256_file(file) == digest):
                file.parent.mkdir(parents=True, exist_ok=True)
                _fetch(filesystem, f"{place}/{name}" if place else name, file, f"{address}: {name}")
                if sha256_file(file) != digest:
                    file.unlink()
                    raise ShardError(
                        f"{address}: {name} is not the file that {SUMS} lists; fetch it again or restore it"
                    )
            bar.update(1)
    (part / SUMS).write_bytes(sums)
    part.rename(target)


def _fetch(filesystem: Any, source: str, file: Path, name: str) -> None:
    try:
        filesystem.get_file(source, str(file))
    except Exception as error:
        raise ShardError(f"{name} cannot be fetched: {_first_line(error)}; the next call goes on here") from None


def _listed(sums: bytes, address: str) -> dict[str, str]:
    """File -> SHA-256 of the files of a shard directory; ShardError for a name that leads elsewhere."""
    digests = {}
    for line in sums.decode(errors="replace").splitlines():
        digest, _, name = line.partition("  ")
        if digest.startswith("#"):
            continue
        parts = PurePosixPath(name).parts
        if not parts or parts[0] not in (TOKENS, INDEX, CODEBOOKS) or ".." in parts or "\\" in name or "\0" in name:
            raise ShardError(f"{address}: {SUMS} lists {name!r}, which is no file of a shard directory")
        digests[name] = digest
    return digests


def _first_line(error: Exception) -> str:
    text = (str(error).splitlines() or [""])[0][:200]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
