"""Images that stand in more than one split: a score on images that were trained on is no score."""

from itertools import combinations
from typing import NamedTuple

import pyarrow.compute as pc

from semdict.pipeline.manifest.table import Manifest


class Shared(NamedTuple):
    """Two splits and the images of equal bytes in both: how many contents, and the keys of the first."""

    splits: tuple[str, str]
    count: int
    example: tuple[str, str]

    def __str__(self) -> str:
        first, second = self.splits
        return (
            f"{self.count:,} image{'s are' if self.count > 1 else ' is'} in split {first} and in split {second} "
            f"(equal SHA-256), such as {self.example[0]} and {self.example[1]}"
        )


def shared_images(manifest: Manifest) -> list[Shared]:
    """Every pair of splits that share images, in manifest order; bad images are left out."""
    good = manifest.table.filter(pc.equal(manifest.table["status"], 0))
    parts = {split: good.filter(pc.equal(good["split"], split)) for split in pc.unique(good["split"]).to_pylist()}
    pairs = []
    for (first, a), (second, b) in combinations(parts.items(), 2):
        both = a.filter(pc.is_in(a["sha256"], value_set=b["sha256"].combine_chunks()))
        if len(both):
            there = pc.index(b["sha256"], both["sha256"][0]).as_py()
            example = (both["key"][0].as_py(), b["key"][there].as_py())
            pairs.append(Shared((first, second), pc.count_distinct(both["sha256"]).as_py(), example))
    return pairs
