"""The position at which a token set runs out of information: figure 2 and table 1 of arXiv:2605.06207, as numbers.

N sequences, L positions, K_t codes at position t; everything in bits. The paper's figure plots capacity although its
caption says measured: both are computed here, and two null curves, since independent noise has its cliff at the same
position.
"""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from semdict.pipeline.analysis.estimates import (
    cliff_position,
    conditional_entropy,
    remaining_capacity,
    remaining_entropy,
    shuffled_null,
    uniform_null,
)
from semdict.pipeline.common.digests import check_published
from semdict.pipeline.common.errors import ShardError, UsageError

if TYPE_CHECKING:
    from semdict.pipeline.shards import TokenShards

SPENT = 0.99  # share of the joint entropy after which it counts as spent


@dataclass
class EntropyCurves:
    """Curves of one codebook of one token set; arrays are (L,) bits per position.

    entropy: H(x_t | x_<t) of the tokens; uniform, shuffled: the same of noise; nll: negative log-likelihood of a model.
    """

    name: str
    rows: int
    sizes: np.ndarray  # (L,) int64
    entropy: np.ndarray
    uniform: np.ndarray  # independent, uniform over K_t
    shuffled: np.ndarray  # each column shuffled on its own
    nll: dict[str, np.ndarray] = field(default_factory=dict)  # "train", "held_out": (L,) bits per position

    def remaining(self) -> dict[str, np.ndarray]:
        """Curve -> (L,) bits left before each position; capacity counts every code as evenly used (equation 2)."""
        measured = {"remaining": self.entropy, "uniform_null": self.uniform, "shuffled_null": self.shuffled}
        curves = {name: np.maximum(0.0, remaining_entropy(bits, self.rows)) for name, bits in measured.items()}
        return {**curves, "capacity": np.maximum(0.0, remaining_capacity(self.sizes, self.rows))}

    def numbers(self) -> dict[str, Any]:
        """Table 1 for this set; None for a position that is never reached."""
        k_max, log2_n, total = int(self.sizes.max()), math.log2(self.rows), float(self.entropy.sum())
        numbers = {
            "sequences": self.rows,
            "log2_n": log2_n,
            "k_min": int(self.sizes.min()),
            "k_max": k_max,
            "k_mean": float(self.sizes.mean()),
            "capacity_bits": float(np.log2(self.sizes).sum()),
            "t_star_one_size": equation_1(self.rows, k_max),
            "t_star": cliff_position(self.sizes, self.rows),  # equation 2
            "joint_bits": total,  # log2 N, less if sequences repeat
            "spent_at": spent(self.entropy, total),
            "spent_at_uniform_null": spent(self.uniform, float(self.uniform.sum())),
            "spent_at_shuffled_null": spent(self.shuffled, float(self.shuffled.sum())),
        }
        numbers |= {f"n_over_k_to_{power}": self.rows / k_max**power for power in (1, 2, 3)}
        return numbers | {f"nll_bits_{kind}": float(bits.sum()) for kind, bits in self.nll.items()}

    def table(self) -> tuple[list[str], list[list[float]]]:
        """Column names and one row per position, for a CSV file."""
        columns = {"k": self.sizes, "entropy": self.entropy, **self.remaining()}
        columns |= {f"nll_{kind}": bits for kind, bits in self.nll.items()}
        rows = zip(*(column.tolist() for column in columns.values()), strict=True)
        return ["position", *columns], [[t, *row] for t, row in enumerate(rows)]


def equation_1(rows: int, k: int) -> int | None:
    """t* = ceil(log2 N / log2 K) of one codebook size for all positions; None for a single code."""
    return math.ceil(round(math.log2(rows) / math.log2(k), 9)) if k > 1 else None


def spent(bits: np.ndarray, total: float) -> int:
    """The fewest positions that carry 99 % of `total` bits; 0 for a set that carries none."""
    return int(np.searchsorted(np.cumsum(bits), SPENT * total)) + 1 if total > 0 else 0


def curves_of(name: str, tokens: np.ndarray, sizes: np.ndarray, seed: int = 0) -> EntropyCurves:
    """All curves of (N, L) tokens; UsageError for fewer than two sequences."""
    if len(tokens) < 2:
        raise UsageError(f"{name} has {len(tokens)} sequences; the entropy of a set needs two or more")
    return EntropyCurves(
        name, len(tokens), np.asarray(sizes, np.int64), conditional_entropy(tokens),
        uniform_null(len(tokens), [int(k) for k in sizes], seed), shuffled_null(tokens, seed),
    )  # fmt: skip


def sets_of(shards: "TokenShards", split: str | None, view: str | None) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Codebook ("gen", "disc") -> tokens (N, L) and sizes (L,): the good rows of a split, in one view or in all."""
    names = [str(v["name"]) for v in shards.views]
    if view is not None and view not in names:
        raise UsageError(f"{shards.path} has no view {view!r}; it has {', '.join(names)}")
    loaded = shards.load(split)
    sets = {}
    for name, sizes in shards.spec.sizes.items():
        tokens_NVL = getattr(loaded, name)
        tokens = tokens_NVL.reshape(-1, tokens_NVL.shape[-1]) if view is None else tokens_NVL[:, names.index(view)]
        sets[name] = tokens, sizes
    return sets


def read_nll(run: Path) -> tuple[tuple[int, ...], dict[str, np.ndarray]]:
    """(codebook sizes, "train" or "held_out" -> bits per position) of a run of `semdict ar train`."""
    path = run / "nll.json"
    try:
        check_published(path)
        content = json.loads(path.read_text())
        sizes, bits = tuple(content["sizes"]), {kind: np.array(curve) for kind, curve in content["bits"].items()}
    except FileNotFoundError:
        raise UsageError(f"{path} does not exist; name a complete run of `semdict ar train`") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ShardError(f"{path} is damaged: {error}") from None
    if any(curve.shape != (len(sizes),) for curve in bits.values()):
        raise ShardError(f"{path} is damaged: its curves do not have {len(sizes)} positions")
    return sizes, bits
