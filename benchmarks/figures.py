"""Rewrites the table of README.md from results/*.json: `python -m benchmarks.figures`.

Every row is a template over one result file, so the table shows only figures that a benchmark wrote.
"""

import json
from pathlib import Path
from typing import Any

from tools.doc_tables import rewrite

HERE = Path(__file__).resolve().parent

# result file, what was measured, template of the figure
ROWS = (
    (
        "shards",
        "{rows:,} x 256 x 2 ids, Zipf-like: bytes over the order-0 entropy",
        "{ratios[gen_bytes_over_entropy]:.4f} generative, {ratios[disc_bytes_over_entropy]:.4f} discriminative",
    ),
    (
        "shards",
        "{rows:,} x 256 ids of 2^18 codes: bytes over the order-0 entropy",
        "{large[bytes_over_entropy]:.4f}",
    ),
    ("shards", "the first: int64 `.pt` over ours", "{ratios[pt_int64_bytes_over_ours]:.2f} x the bytes"),
    ("shards", "write and verify", "{write[seconds]:.1f} s and {verify[seconds]:.1f} s"),
    ("shards", "read, one core", "{read_one_core[mb_per_s]:.0f} MB/s of uint16 ids"),
    (
        "loader",
        "resident loader against `DataLoader(TensorDataset)`",
        "{resident[images_per_s]:,} images/s, {ratio_images_per_s:.1f} x",
    ),
    (
        "decode",
        "simplejpeg against Pillow, decode with crop",
        "{decode[decode_and_crop][ratio]:.2f} x as many images/s",
    ),
    (
        "decode",
        "manifest of {manifest[files]:,} unchanged files, against opening every file",
        "{manifest[ratio_to_plain][again]:.1f} x as many files/s",
    ),
    ("encode", "encode stage against one image at a time, demo models", "{ratio:.2f} x as many images/s"),
    (
        "kmeans_memory",
        "peak memory as the images grow tenfold",
        "{ours[growth]:.2f} x; all patches {plain[growth]:.1f} x",
    ),
    (
        "contrastive",
        "fused codebook contrast, {size[N]:,} x {size[K]:,} x {size[D]:,}, against neighbours and weights per step",
        "{times_faster_than[per_step]:.2f} x faster, {memory_of[per_step]:.3f} x the memory",
    ),
    (
        "step",
        "LEASE step, ViT-B, against full-vocabulary full-logits",
        "{lease_against_straight[times_faster]:.2f} x faster, "
        "{lease_against_straight[step_memory]:.2f} x the step's memory",
    ),
    (
        "step",
        "step time over LEASE's: Sorcen, MAGE, MAGE with the VQGAN in the loop",
        "{step_time_over_lease[sorcen]:.2f}, {step_time_over_lease[mage]:.2f}, "
        "{step_time_over_lease[mage_online_vqgan]:.2f}",
    ),
    (
        "generate",
        "iterative decoding, {setting[steps]} passes, batch {setting[batch]}, "
        "against a loop over {setting[vocabulary]:,} rows",
        "{times_faster[whole_vocabulary]:.2f} x; one image at a time {times_faster[one_at_a_time]:.2f} x",
    ),
    (
        "probe",
        "90 probe epochs from cached features, against features computed in every epoch",
        "{epochs[ratio_90_epochs][tokens_anew]:.0f} x from tokens, "
        "{epochs[ratio_90_epochs][pixels_anew]:.0f} x from pixels",
    ),
    (
        "probe",
        "the same at ImageNet-1k's size, features cached; k-NN of 50,000 images",
        "{imagenet_size[probe_90_epochs_min]:.0f} min; {imagenet_size[knn_50000_queries_min]:.0f} min",
    ),
    (
        "vcq",
        "nearest-code search over uniform VQ's time: cosine, power",
        "{search[ratio_to_uniform][grouped_cosine]:.2f}, {search[ratio_to_uniform][grouped_power]:.2f}",
    ),
    ("vcq", "autoregressive decoding with a cache against without", "{decode[cached_over_uncached]:.1f} x"),
    ("entropy", "conditional entropy of {rows:,} x 256 codes, slowest of six sets", "{slowest:.1f} s"),
    (
        "analyse",
        "`semdict analyse` on {rows:,} x 256 pairs of 1,024 x 16,384 ids: the whole command, peak memory",
        "{command[seconds]:.0f} s, {command[peak_bytes]:,} bytes",
    ),
    ("entropy", "against a Python dictionary of prefixes, {rows_compared:,} rows", "{least:.0f} to {most:.0f} x"),
)


def flat(name: str, result: dict[str, Any]) -> dict[str, Any]:
    """A file's figures, with the extremes that a template cannot compute."""
    if name == "entropy":
        ratios, seconds = result["ratio_to_prefixes"].values(), result["seconds"].values()
        return {**result, "slowest": max(seconds), "least": min(ratios), "most": max(ratios)}
    return result


def table(results: Path) -> str:
    """The table in Markdown and the machines it was measured on; KeyError if a file lacks a figure."""
    files = {name: json.loads((results / f"{name}.json").read_text()) for name, _, _ in ROWS}
    lines = ["| benchmark | measured | figure |", "|---|---|---|"]
    for name, measured, figure in ROWS:
        result = flat(name, files[name])
        lines.append(f"| `{name}` | {measured.format(**result)} | {figure.format(**result)} |")
    machines = [result.get("machine", result) for result in files.values()]
    descriptions = sorted({f"{of['device']}, {of['cores']} cores, torch {of['torch']}" for of in machines})
    return "\n".join([*lines, "", f"Measured on {'; '.join(descriptions)}; no GPU.", ""])


def main() -> None:
    """Rewrite the table of README.md."""
    rewrite(HERE / "README.md", {"figures": table(HERE / "results")})


if __name__ == "__main__":
    main()
