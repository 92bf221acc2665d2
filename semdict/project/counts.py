"""How many images each split and class has, and which batches are larger than that."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from semdict.pipeline.config.schema import Manifest as ManifestCfg
from semdict.pipeline.config.schema import Params
from semdict.pipeline.manifest.duplicates import Shared, shared_images
from semdict.pipeline.manifest.sources import list_images
from semdict.pipeline.manifest.table import load_manifest


@dataclass(frozen=True)
class Counts:
    """Images by (split, label), label -1 = none; `bad`: images that the manifest could not decode."""

    images: Counter
    bad: int = 0

    def of(self, splits: list[str]) -> int:
        """Images of some splits, [] = all."""
        return sum(n for (split, _), n in self.images.items() if not splits or split in splits)

    def by_class(self, splits: list[str]) -> dict[int, int]:
        """Label -> images of some splits."""
        counts: Counter = Counter()
        for (split, label), n in self.images.items():
            if label >= 0 and (not splits or split in splits):
                counts[label] += n
        return dict(counts)

    def __str__(self) -> str:
        splits = list(dict.fromkeys(split for split, _ in self.images))
        classes = len(self.by_class([]))
        parts = " + ".join(f"{self.of([split]):,} {split}" for split in splits)
        bad = f", {self.bad:,} that cannot be decoded" if self.bad else ""
        return f"{parts}, {f'{classes} classes' if classes else 'no labels'}{bad}"


def counts_of_listing(cfg: ManifestCfg) -> Counts:
    """Counts by name, nothing is read; ManifestError where the images cannot be listed."""
    table = list_images(cfg.images, cfg.layout, cfg.label_key, cfg.shares).table
    return Counts(Counter(zip(table["split"].to_pylist(), table["label"].to_pylist(), strict=True)))


def counts_of_manifest(path: Path) -> tuple[Counts, list[Shared]]:
    """Counts of the images that can be decoded, and the images that splits share."""
    manifest = load_manifest(path)
    rows = zip(manifest.table["split"].to_pylist(), manifest.label.tolist(), manifest.status.tolist(), strict=True)
    counts = Counter((split, label) for split, label, status in rows if status == 0)
    return Counts(counts, bad=len(manifest) - sum(counts.values())), shared_images(manifest)


def too_few(params: Params, counts: Counts) -> list[str]:
    """Batches, shots and neighbours above the number of images that there are, each with the key to change."""
    lines = []
    for name in ("pretrain", "condition", "vcq", "ar"):
        section = getattr(params, name)
        there = counts.of(section.splits)
        if section.batch > there:
            lines.append(f"{name}.batch is {section.batch:,}, its splits {section.splits} have {there:,} images")
    cfg = params.evaluate
    trained, classes = counts.of(cfg.train_splits), counts.by_class(cfg.train_splits)
    if not classes:
        return lines
    if cfg.probe.batch > trained:
        lines.append(f"evaluate.probe.batch is {cfg.probe.batch:,}, evaluate.train_splits have {trained:,} images")
    if cfg.knn.k > trained:
        lines.append(f"evaluate.knn.k is {cfg.knn.k}, evaluate.train_splits have {trained:,} images")
    fewest, shots = min(classes.values()), max(cfg.few_shot.shots)
    if shots > fewest:
        lines.append(f"evaluate.few_shot.shots asks for {shots} images of every class, one has {fewest}")
    if cfg.few_shot.batch > min(cfg.few_shot.shots) * len(classes):
        lines.append(
            f"evaluate.few_shot.batch is {cfg.few_shot.batch}, {min(cfg.few_shot.shots)} shots of {len(classes)} "
            f"classes are {min(cfg.few_shot.shots) * len(classes)} images"
        )
    untrained = counts.by_class(cfg.test_splits).keys() - classes.keys()
    if untrained:
        lines.append(f"{len(untrained)} classes of evaluate.test_splits have no image in evaluate.train_splits")
    return lines
