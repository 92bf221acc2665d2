"""Digests of what commands publish, as `sha256sum` writes them: beside a file, or inside a folder.

A file `x.npy` has its SHA-256 in `x.npy.sha256`, a folder has one line per file in SHA256SUMS, a trainer's run lists
its models in run.json. What others made has none of them and is read as it is.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from semdict.pipeline.common.errors import SemdictError, WeightsError
from semdict.pipeline.common.files import atomic_write, is_foreign, remove, sha256_file, sha256_json

SIDECAR, SUMS = ".sha256", "SHA256SUMS"
CARD = "run.json"  # last file of a trainer's complete run: settings, metrics, and the SHA-256 of files read later


def sidecar(path: Path) -> Path:
    """The file beside `path` that holds its digest."""
    return path.with_name(path.name + SIDECAR)


def forget_digest(path: str | os.PathLike) -> None:
    """Remove the digest of a file that is about to be replaced: a kill in between leaves a new file without one."""
    remove(sidecar(Path(os.path.realpath(path))))


def record_digest(path: str | os.PathLike) -> None:
    """Write the digest of a published file beside it."""
    path = Path(os.path.realpath(path))
    with atomic_write(sidecar(path)) as tmp_path:
        tmp_path.write_text(f"{sha256_file(path)}  {path.name}\n")


def check_digest(path: str | os.PathLike, error: type[SemdictError] = SemdictError) -> None:
    """`error` if a digest lies beside the file and is not its own."""
    path = Path(os.path.realpath(path))
    beside = sidecar(path)
    if beside.is_file() and beside.read_bytes() != f"{sha256_file(path)}  {path.name}\n".encode():
        raise error(
            f"{path} is damaged or was replaced: its SHA-256 is not the one in {beside.name}; make it again, or remove "
            f"{beside.name} if the file is meant"
        )


def check_published(path: Path) -> str:
    """SHA-256 of a file of a run; WeightsError if the run.json beside it lists another one."""
    sha256 = sha256_file(path)
    card = path.parent / CARD
    try:
        published = json.loads(card.read_text()).get("files", {}).get(path.name, sha256)
    except FileNotFoundError:
        return sha256  # not in a run's folder
    except (ValueError, AttributeError):
        raise WeightsError(f"{card} is damaged; move {path.name} out of this folder, or run the stage again") from None
    if published != sha256:
        raise WeightsError(
            f"{path} has SHA-256 {sha256}, the {CARD} beside it lists {published}: it is damaged or was replaced; "
            "restore it, or remove the folder and run the stage again"
        )
    return sha256


def sealed(content: dict[str, Any]) -> dict[str, Any]:
    """`content` with its own SHA-256 as entry `sha256`, for a JSON file."""
    return {**content, "sha256": sha256_json(content)}


def seal_holds(content: dict[str, Any]) -> bool:
    """Whether the entry `sha256` is that of all other entries; True where there is none."""
    rest = {name: value for name, value in content.items() if name != "sha256"}
    return content.get("sha256", sha256_json(rest)) == sha256_json(rest)


def write_sums(folder: Path) -> None:
    """Write SHA256SUMS over all files below `folder`."""
    lines = (f"{sha256_file(folder / name)}  {name}\n" for name in _files(folder))
    (folder / SUMS).write_text("".join(lines))


def check_sums(folder: Path, remedy: str, error: type[SemdictError] = SemdictError) -> None:
    """`error`, ending in `remedy`, if the folder's SHA256SUMS does not list exactly its files and their digests."""
    try:
        listed = (folder / SUMS).read_bytes().decode(errors="replace")
    except FileNotFoundError:
        raise error(f"{folder} has no {SUMS}; {remedy}") from None
    digests = {name: digest for digest, _, name in (line.partition("  ") for line in listed.splitlines())}
    names = list(_files(folder))
    wrong = [name for name in names if digests.get(name) != sha256_file(folder / name)]
    if wrong or digests.keys() - names:
        name = (wrong or sorted(digests.keys() - names))[0]
        raise error(f"{folder}/{name} is not the file that {SUMS} lists; {remedy}")


def _files(folder: Path) -> Iterator[str]:
    """Relative names of all files but SHA256SUMS and those of other programs, sorted."""
    files = (path for path in folder.rglob("*") if path.is_file())
    names = (path.relative_to(folder).as_posix() for path in files)
    return iter(sorted(n for n in names if n != SUMS and not any(map(is_foreign, n.split("/")))))
