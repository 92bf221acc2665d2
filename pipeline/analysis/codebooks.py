"""`semdict analyse`: how the codebooks of a token set relate (LEASE, appendix D), and what the set takes on disk."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from semdict.pipeline.analysis import disk
from semdict.pipeline.analysis.cooccurrence import conditional_entropies, independent_entropies, strongest_pairs
from semdict.pipeline.analysis.token_counts import class_average_top, count_tokens
from semdict.pipeline.common.files import write_json
from semdict.pipeline.config import paths
from semdict.pipeline.config.params import add_params_arguments, params_of

if TYPE_CHECKING:
    from semdict.pipeline.config.schema import Analyse

EXAMPLE = """examples:
  semdict analyse shards/demo
  semdict analyse shards/in1k --manifest data/in1k/manifest/manifest.parquet --out reports/in1k/codebooks
  semdict analyse shards/lease --set analyse.bound=5 --original-bytes 140000000000

Takes a shard directory with both codebooks. Writes analyse.json and three figures: conditional_entropy.png (H(GEN|DISC)
and H(DISC|GEN) of every token, in nats; figure D.1), class_tokens.png (class-average probability of the most frequent
tokens; figure D.2) and pmi.png (D.3). Prints what the set takes on disk beside Sorcen's table E.8."""

DIRECTIONS = {"gen_given_disc": "H(GEN | DISC)", "disc_given_gen": "H(DISC | GEN)"}
BINS = 60


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The token set, its images and the output folder; the rest is section analyse."""
    parser.add_argument("dir", nargs="?", type=Path, help="token shards with both codebooks (default shards/<preset>)")
    parser.add_argument("--manifest", type=Path, help="of its images (default data/<preset>/manifest, if it is there)")
    parser.add_argument("--original-bytes", type=int, metavar="N", help="bytes of its images, instead of a manifest")
    add_params_arguments(parser)
    parser.add_argument("--out", type=Path, help="default: reports/<preset>/analyse")


def run(args: argparse.Namespace) -> int:
    """Count, measure, write JSON and figures, print both tables."""
    from semdict.pipeline.analysis.codebook_figures import plot_class_tokens, plot_entropies, plot_pmi
    from semdict.pipeline.shards import open_shards

    params = params_of(args)
    cfg, out = params.analyse, args.out or Path("reports") / params.preset / "analyse"
    shards = open_shards(args.dir or Path("shards") / params.preset)
    original = original_bytes(args, params.preset, shards)
    counts = count_tokens(shards, cfg.split, cfg.view)
    measured = dict(zip(DIRECTIONS, conditional_entropies(counts.joint), strict=True))
    null = dict(zip(DIRECTIONS, independent_entropies(counts.joint, cfg.seed), strict=True))
    tops = {name: class_average_top(table, cfg.top) for name, table in counts.by_class.items()}
    gen_ids, disc_ids, pmi = strongest_pairs(counts.joint, cfg.pmi_tokens, cfg.min_count)
    sizes = dict(zip(("gen", "disc"), counts.joint.shape, strict=True))
    rows = disk.disk_rows(shards, original)
    result: dict[str, Any] = {name: entropy_numbers(measured[name], null[name], cfg.bound) for name in DIRECTIONS}
    result |= {f"class_top_{name}": float(top[0]) for name, top in tops.items() if np.isfinite(top[0])}
    result["about"] = [{
        "tokens": str(shards.path), "content_sha256": shards.content_sha256,
        "images": counts.rows, "pairs": counts.cells,
        "codebooks": sizes, "classes": len(counts.by_class["gen"]), **cfg.model_dump(),
        "class_average_top": {name: finite(top) for name, top in tops.items()},
        "pmi": {"gen": gen_ids.tolist(), "disc": disc_ids.tolist(), "nats": [finite(row) for row in pmi]},
        "disk": disk.as_dicts([*disk.PUBLISHED, *rows]),
    }]  # fmt: skip
    write_json(out / "analyse.json", result)
    plot_entropies(out / "conditional_entropy.png", measured, null, cfg.bound, sizes)
    plot_class_tokens(out / "class_tokens.png", tops)
    plot_pmi(out / "pmi.png", gen_ids, disc_ids, pmi, cfg.min_count)
    print(entropy_table(result, cfg))
    print()
    print(disk.disk_table(rows))
    print(f"analyse: {out}/conditional_entropy.png, class_tokens.png, pmi.png", file=sys.stderr)
    return 0


def original_bytes(args: argparse.Namespace, preset: str, shards: Any) -> int | None:
    """Bytes of the images as named, or by the manifest that is named or the preset's own; None if there is neither."""
    if args.original_bytes:
        return args.original_bytes
    if args.manifest:
        return disk.bytes_of_images(shards, args.manifest)
    own = args.dir is None and paths.manifest(preset).exists()
    return disk.bytes_of_images(shards, paths.manifest(preset)) if own else None


def entropy_numbers(nats: np.ndarray, null: np.ndarray, bound: float) -> dict[str, Any]:
    """Number of ids that occur, mean and median in nats, how many lie under the bound; the same of the null.

    The histogram is in a list, which DVC does not take for metrics.
    """
    used, unrelated = nats[np.isfinite(nats)], null[np.isfinite(null)]
    edges = np.linspace(0, max(1e-9, float(max(used.max(), unrelated.max()))), BINS + 1)
    low, middle, high = (float(q) for q in np.quantile(used, [0.25, 0.5, 0.75]))
    return {
        "tokens": len(used), "mean_nats": float(used.mean()), "median_nats": middle,
        "under_bound": int((used < bound).sum()),
        "unrelated_mean_nats": float(unrelated.mean()), "unrelated_under_bound": int((unrelated < bound).sum()),
        "histogram": [{"quartiles": [low, middle, high], "edges": edges.tolist(),
                       "tokens": np.histogram(used, edges)[0].tolist(),
                       "unrelated": np.histogram(unrelated, edges)[0].tolist()}],
    }  # fmt: skip


def finite(values: np.ndarray) -> list[float | None]:
    """JSON has no infinity: None for a pair that never occurs."""
    return [float(value) if np.isfinite(value) else None for value in values]


def entropy_table(result: dict[str, Any], cfg: "Analyse") -> str:
    """Plain text, one line per direction."""
    lines = [f"{'':<14}  tokens  mean nats  median  under {cfg.bound:g}  (without relation: mean, under {cfg.bound:g})"]
    for key, title in DIRECTIONS.items():
        of = result[key]
        lines.append(
            f"{title:<14}  {of['tokens']:>6,}  {of['mean_nats']:>9.3f}  {of['median_nats']:>6.3f}  "
            f"{of['under_bound']:>7,}  ({of['unrelated_mean_nats']:.3f}, {of['unrelated_under_bound']:,})"
        )
    return "\n".join(lines)
