"""Splits of one folder: each image belongs to one of them, by the hash of its key.

Images that are added or removed later move no other image to another split.
"""

import hashlib
from collections.abc import Mapping, Sequence
from itertools import accumulate


def shared_splits(images: Mapping[str, str], shares: Mapping[str, float]) -> list[dict[str, float]]:
    """{split: share} for each folder that several splits share; the schema makes sure that each sums to 1."""
    groups: dict[str, dict[str, float]] = {}
    for split, path in images.items():
        if split in shares:
            groups.setdefault(path, {})[split] = shares[split]
    return list(groups.values())


def assign(keys: Sequence[str], labels: Sequence[str | None], shares: Mapping[str, float]) -> list[int]:
    """Position among `shares` of the split that each image belongs to.

    A class of which the largest share (the training split) would get no image goes to it as a whole: no class occurs
    in a test split alone.
    """
    borders = list(accumulate(shares.values()))
    largest = max(range(len(borders)), key=lambda number: list(shares.values())[number])
    owners = [next((n for n, border in enumerate(borders) if _unit(key) < border), len(borders) - 1) for key in keys]
    trained = {label for label, owner in zip(labels, owners, strict=True) if owner == largest}
    return [owner if label in trained else largest for label, owner in zip(labels, owners, strict=True)]


def _unit(key: str) -> float:
    """A number in [0, 1) that depends on the key alone: the first 52 bits of its SHA-256."""
    return int(hashlib.sha256(key.encode()).hexdigest()[:13], 16) / 16**13
