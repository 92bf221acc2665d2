"""SHA256SUMS of a shard directory: written with it, checked whole by `verify`, and cheaply whenever a set is opened.

It has one line per file, as `sha256sum -c` reads them, then comments: of every shard file (since format 2) its size and
the SHA-256 of its first and last 256 bytes, `# 123456 <digest>  tokens.zarr/gen/c/0/0/0`, and last the SHA-256 of all
lines above.
"""

import hashlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from semdict.pipeline.common.errors import ShardError
from semdict.pipeline.common.files import sha256_file
from semdict.pipeline.shards.format import SUMS, files_under, is_token_file

EDGE = 256  # bytes at either end of a shard file: the start of its first chunk, and its index of chunks


@dataclass
class Sums:
    """SHA256SUMS as read. digests: file -> SHA-256; edges: shard file -> its size and the digest of its ends.

    sha256: of SHA256SUMS itself, hence of the whole content. problem: the reason why the file is not sound, or None.
    """

    digests: dict[str, str] = field(default_factory=dict)
    edges: dict[str, str] = field(default_factory=dict)
    sha256: str = ""
    problem: str | None = None


def write_sums(folder: Path) -> None:
    """Write SHA256SUMS over all files below `folder`."""
    with ThreadPoolExecutor(2) as pool:
        names = [name for name in files_under(folder) if name != SUMS]
        sums = list(pool.map(lambda name: sha256_file(folder / name), names))
    lines = "".join(f"{digest}  {name}\n" for digest, name in zip(sums, names, strict=True))
    lines += "".join(f"# {edges_of(folder / name)}  {name}\n" for name in names if is_token_file(name))
    (folder / SUMS).write_text(lines + f"# {hashlib.sha256(lines.encode()).hexdigest()}\n")


def read_sums(folder: Path) -> Sums:
    """Read SHA256SUMS; a damaged or missing file has a `problem`."""
    try:
        text = (folder / SUMS).read_bytes()
    except FileNotFoundError:
        return Sums(problem="it is missing")
    body, _, _ = text.rstrip(b"\n").rpartition(b"\n")
    body += b"\n"
    own = f"# {hashlib.sha256(body).hexdigest()}\n".encode()
    sums = Sums(sha256=hashlib.sha256(text).hexdigest())
    for line in body.decode(errors="replace").splitlines():
        value, _, name = line.partition("  ")
        if value.startswith("# "):
            sums.edges[name] = value.removeprefix("# ")
        else:
            sums.digests[name] = value
    if text != body + own:
        sums.problem = "its last line does not match the lines above"
    return sums


def edges_of(path: Path) -> str:
    """Size and SHA-256 of both ends: they differ between any two shard files, though not for damage in the middle."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(EDGE)
        file.seek(max(0, size - EDGE))
        return f"{size} {hashlib.sha256(head + file.read(EDGE)).hexdigest()}"


def check_files(folder: Path, sums: Sums, names: Iterable[str]) -> None:
    """Compare files with SHA256SUMS, shard files by size and ends if they are listed, all others whole.

    Raises ShardError naming the first that differs.
    """
    if sums.problem:
        raise ShardError(f"{folder}/{SUMS}: {sums.problem}; restore the set from its source")
    for name in names:
        if name in sums.edges:
            sound, text = edges_of(folder / name) == sums.edges[name], "its size or its ends differ"
        else:
            sound, text = sha256_file(folder / name) == sums.digests.get(name), "its SHA-256 differs"
        if not sound:
            raise ShardError(
                f"{folder}/{name} is not the file that was written: {text} from {SUMS}; restore it from the set's "
                f"source (`semdict shards verify {folder}` names every damaged file)"
            )
