"""Token ids per model family: which ids are image codes, and which stand for CLS and for a hidden token."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Vocab:
    """Layout of a token embedding table.

    codes: image codes are ids [0, codes); cls: stands before every sequence; mask: stands where a code is hidden;
    rows: rows of the table (ids in between are never used).
    """

    codes: int
    cls: int
    mask: int
    rows: int


MAGE = Vocab(codes=1024, cls=1100, mask=2024, rows=2025)  # as in the published checkpoints
SORCEN = MAGE
LEASE = Vocab(codes=1024, cls=17028, mask=17029, rows=17030)


def lean(codes: int) -> Vocab:
    """The vocabulary for training from scratch: no unused row."""
    return Vocab(codes=codes, cls=codes, mask=codes + 1, rows=codes + 2)
