"""Frozen features of a source, computed once per view and kept on disk in a folder named by model, data and code.

N images, B of a batch, L cells, E feature width. Files: work/features-<fingerprint>/<view>.npy (N, E) and, last,
<view>.json with its SHA-256.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from semdict.pipeline.common.device import reduced_precision
from semdict.pipeline.common.errors import SemdictError
from semdict.pipeline.common.files import PART, atomic_write, remove, sha256_file, sha256_json, write_json
from semdict.pipeline.common.progress import progress
from semdict.pipeline.execute.code_identity import code_identity
from semdict.train.eval.sources import Source
from semdict.train.masked.encoder import Encoder
from semdict.train.masked.model import MaskedTokenTransformer

CODE = "semdict.train.eval.setup"  # imports this file and every source of tokens


@dataclass(frozen=True)
class FeatureSet:
    """Features of a source. views: (N, E) arrays by name, memory-mapped; labels (N,) int64; names: of the classes, by
    label; about: for score files.
    """

    views: dict[str, np.ndarray]
    labels: np.ndarray
    names: list[str]
    about: dict[str, Any] = field(default_factory=dict)

    @property
    def first(self) -> np.ndarray:
        """(N, E) of the first view."""
        return next(iter(self.views.values()))


def encoder_features(
    model: MaskedTokenTransformer, precision: str = "float32", dropout: float = 0.0
) -> Callable[[Tensor], Tensor]:
    """tokens (B, L) -> (B, E) float32: last block without the final norm, mean over cells, norm without affine.

    dropout: of the token embedding alone, as in the published probe while its head trains; it uses torch's global
    generator.
    """

    @torch.no_grad()
    def features(tokens_BL: Tensor) -> Tensor:
        model.eval()
        model.token_emb.drop.p = dropout
        model.token_emb.drop.train(dropout > 0)
        with reduced_precision(tokens_BL.device, precision):
            return model.features(tokens_BL).float()

    return features


@dataclass(frozen=True)
class FeatureStore:
    """Computes features and keeps them below `root`; device is the encoder's."""

    encoder: Encoder
    root: Path
    device: torch.device
    precision: str = "float32"
    dtype: str = "float32"
    batch: int = 256

    def fingerprint(self, source: Source) -> str:
        """16 hex digits over weights, shape (head counts!), tokens, precision, device and code."""
        return sha256_json({
            "code": code_identity(CODE), "model": self.encoder.sha256, "config": self.encoder.model.config.to_dict(),
            "source": source.identity, "precision": self.precision, "dtype": self.dtype, "device": self.device.type,
        })[:16]  # fmt: skip

    def get(self, source: Source, views: list[str]) -> FeatureSet:
        """Features of some views, [] = all, computed unless they are stored; without images that cannot be decoded."""
        from semdict.pipeline.execute.locks import interrupt_on_signals, lock

        name = f"features-{self.fingerprint(source)}"
        names, arrays, bad = views or source.views, {}, set()
        with lock(name, self.root), interrupt_on_signals():
            for leftover in (self.root / name).glob(f"*{PART}"):  # of a run that was killed
                remove(leftover)
            for view in names:
                arrays[view], bad_rows = self._view(source, view, self.root / name)
                bad |= set(bad_rows)
        about = {**source.about, "views": names, "precision": self.precision, "dtype": self.dtype}
        if not bad:
            return FeatureSet(arrays, source.labels, source.names, about)
        kept = np.setdiff1d(np.arange(len(source.labels)), sorted(bad))
        about |= {"images": len(kept), "left_out": source.left_out + len(bad)}
        return FeatureSet({v: rows[kept] for v, rows in arrays.items()}, source.labels[kept], source.names, about)

    def _view(self, source: Source, view: str, folder: Path) -> tuple[np.ndarray, list[int]]:
        if Path(view).name != view:
            raise SemdictError(f"{view!r} is no name for a view: it would be written outside {folder}")
        path, done = folder / f"{view}.npy", folder / f"{view}.json"
        if not done.exists():
            bad = self._make(source, view, path)
            write_json(done, {"bad": bad, "sha256": sha256_file(path)})
        try:
            card = json.loads(done.read_text())
            if card["sha256"] != sha256_file(path):
                raise ValueError(f"its SHA-256 is not the one in {done.name}")
            return np.load(path, mmap_mode="c", allow_pickle=False), card["bad"]  # copy on write: torch may share it
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise SemdictError(f"{path} is damaged ({error}); remove {folder} and run again") from None

    def _make(self, source: Source, view: str, path: Path) -> list[int]:
        """Compute (N, E) and write it whole; returns the images that have no tokens (their rows are zero)."""
        features = encoder_features(self.encoder.model, self.precision)
        count, bad = len(source.labels), []
        shape = (count, self.encoder.model.config.width)
        with atomic_write(path) as staged, progress(count, f"features {view}") as bar:
            rows = np.lib.format.open_memmap(staged, mode="w+", dtype=self.dtype, shape=shape)
            for batch in source.stream(view, self.batch):
                features_BE = features(batch.tokens).cpu().numpy()
                features_BE[list(batch.bad)] = 0
                if not np.isfinite(features_BE).all():
                    raise SemdictError(
                        f"the model {self.encoder.name} gives features that are not finite; it is damaged"
                    )
                rows[batch.start : batch.start + len(features_BE)] = features_BE
                bad += [batch.start + i for i in batch.bad]
                bar.update(len(features_BE))
            rows.flush()
            del rows
        return bad
