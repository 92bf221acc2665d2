"""What a world looks like: names of all its files, and the bytes of those that are published."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from tests.campaign.world import JOURNAL, SCRATCH

TIMED = "log.jsonl"  # a trainer's log also has the speed of each step, which no two runs share


class Snapshot:
    """Files below `root`, by relative path. `unlike(world)` hashes only those that are not links to the world's."""

    def __init__(self, root: Path, world: Path) -> None:
        self.names: set[str] = set()
        self.digests: dict[str, str] = {}
        for path in root.rglob("*"):
            if path.is_dir() or path.name == JOURNAL:
                continue
            name = path.relative_to(root).as_posix()
            self.names.add(name)
            if name.split("/")[0] not in SCRATCH:
                self.digests[name] = digest(path, world / name)

    def published(self, outs: Iterable[str]) -> dict[str, str]:
        """Digests of the files that are one of `outs`, or in one of them."""
        prefixes = tuple(outs)
        return {n: d for n, d in self.digests.items() if any(n == p or n.startswith(f"{p}/") for p in prefixes)}

    def differences(self, other: "Snapshot") -> list[str]:
        """Names of published files that one lacks or whose bytes differ."""
        names = self.digests.keys() | other.digests.keys()
        return sorted(name for name in names if self.digests.get(name) != other.digests.get(name))

    def leftovers(self, reference: "Snapshot") -> list[str]:
        """Names, unfinished work included, that the reference does not have."""
        return sorted(self.names - reference.names)


def digest(path: Path, original: Path) -> str:
    """SHA-256 of a file's bytes, "" for a link to the original; of a trainer's log without the speed of its steps."""
    if original.exists() and path.samefile(original):
        return ""
    data = path.read_bytes()
    if path.name == TIMED:
        rows = [json.loads(line) for line in data.splitlines()]
        data = json.dumps([{key: value for key, value in row.items() if key != "speed"} for row in rows]).encode()
    return hashlib.sha256(data).hexdigest()
