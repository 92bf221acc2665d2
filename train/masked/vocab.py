"""Token ids per model family: image codes, CLS and the mask id."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Vocab:
    """Layout of a token embedding table.

    codes: image codes are ids [0, codes); cls: id before every sequence; mask: id of a hidden code; rows: rows of the
    table (ids in between are never used).
    """

    codes: int
    cls: int
    mask: int
    rows: int


MAGE = Vocab(codes=1024, cls=1100, mask=2024, rows=2025)  # as in the published checkpoints
SORCEN = MAGE
LEASE = Vocab(codes=1024, cls=17028, mask=17029, rows=17030)


def compact_vocab(codes: int) -> Vocab:
    """The vocabulary for training from scratch, without unused rows."""
    return Vocab(codes=codes, cls=codes, mask=codes + 1, rows=codes + 2)
