"""Open a token shard directory: lazy arrays with original ids, whole-set decoding for trainers."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from semdict.pipeline.common.errors import ShardError
from semdict.pipeline.shards.checksums import check_files, read_sums
from semdict.pipeline.shards.format import (
    CODEBOOKS,
    INDEX,
    TOKENS,
    Block,
    expected_files,
    import_zarr,
    optional_books,
    read_metadata,
    token_file,
    token_files,
)
from semdict.pipeline.shards.ids import filler, look_up, memory_dtype
from semdict.pipeline.shards.remote import local_shards

if TYPE_CHECKING:
    import pyarrow as pa


def open_shards(path: str | Path) -> "TokenShards":
    """Open a shard directory, or one at an address such as hf://datasets/owner/name (any that fsspec opens).

    A set at an address is copied into a cache first, see `pipeline/shards/remote.py`. Files are compared with
    SHA256SUMS: codebooks, index and attributes whole, shard files by size and both ends; no token is read. Raises
    NotShardsError (exit 2) if the path is no shard directory, or one of a newer format, and ShardError naming a file
    that is missing or not the one that was written.
    """
    return TokenShards(local_shards(path))


class LazyArray:
    """A zarr array that slices to numpy: ranks become the original ids, the result is a writable copy.

    Indices are those of zarr, numpy arrays and torch tensors among them; a boolean array selects rows. Damage raises
    ShardError.
    """

    def __init__(self, name: str, stored: Any, table: np.ndarray | None = None) -> None:
        self.name, self.stored, self.table = name, stored, table
        self.shape, self.dtype, self.ndim = stored.shape, np.dtype(stored.dtype), stored.ndim

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: Any) -> np.ndarray:
        key = tuple(map(_plain_index, key)) if isinstance(key, tuple) else _plain_index(key)
        if isinstance(key, np.ndarray) and key.dtype == bool and key.ndim == 1:
            if len(key) != len(self):
                raise IndexError(f"a mask of {len(key)} rows does not fit {self.name} with {len(self)}")
            key = np.flatnonzero(key)
        values = np.asarray(read_stored(self.name, self.stored, key))
        return values if self.table is None else look_up(self.table, values)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self[...], dtype)

    def __repr__(self) -> str:
        return f"<{self.name} {self.dtype} {self.shape}>"


def _plain_index(key: Any) -> Any:
    """Torch tensors, wherever they are, as numpy arrays, those without axes as integers; all else as it is."""
    if hasattr(key, "detach"):
        key = key.detach().cpu().numpy()
    return int(key) if isinstance(key, np.ndarray) and key.ndim == 0 else key


def read_stored(name: str, stored: Any, key: Any) -> np.ndarray:
    """`stored[key]`; errors of a codec or the file system become a ShardError that names the array."""
    try:
        return stored[key]
    except IndexError:
        raise  # the caller's mistake
    except (ValueError, RuntimeError, OSError, KeyError) as error:
        reason = str(error).split("\n")[0]
        raise ShardError(f"{name}[{key}] cannot be read: {reason}; `semdict shards verify` names the chunk") from error


@dataclass
class LoadedTokens:
    """Tokens of the good rows, in memory.

    gen, disc (n, V, L) uint8, int16, uint16 or int32, the smallest that holds the codebook (disc None if there is
    none); label (n,) int32; rows (n,) int64, the manifest row of each; left_out: rows of the split without tokens.
    """

    gen: np.ndarray
    disc: np.ndarray | None
    label: np.ndarray
    rows: np.ndarray
    left_out: int


class TokenShards:
    """N images as tokens: gen, disc (N, V, L) ids (disc may be None), label (N,) int32, status (N,) uint8.

    All four are lazy and slice to numpy. Ids are uint16 or uint32; rows whose status is not 0 hold the largest value of
    the type. meta: the attributes. content_sha256: the SHA-256 of SHA256SUMS, which names the whole content; runs put
    it into their fingerprints. check=False opens a set without comparing its files with SHA256SUMS.
    """

    def __init__(self, path: str | Path, check: bool = True) -> None:
        zarr = import_zarr()
        self.path = Path(path)
        self.meta, self.spec, self.layout = read_metadata(self.path)
        self._sums = read_sums(self.path)
        self._require_files()
        self.content_sha256 = self._sums.sha256
        # Format 1 has no sizes in SHA256SUMS: its shard files are compared whole, when they are loaded.
        self._unchecked = set(token_files(self.spec, self.layout)) - self._sums.edges.keys() if check else set()
        try:
            group = zarr.open_group(self.path / TOKENS, mode="r")
            stored = {name: group[name] for name in (*self.spec.sizes, "label", "status", "complete")}
            tables = {name: group[f"{name}_ids"][:] for name in self.spec.sizes}
            done = stored["complete"][:]
        except (KeyError, ValueError, RuntimeError, OSError, TypeError, AttributeError, IndexError) as error:
            raise ShardError(f"{self.path} is damaged: {error}; `semdict shards verify` says where") from error
        self._check(stored, done)
        if check:
            self._check_files()
        self.gen = LazyArray("gen", stored["gen"], tables["gen"])
        self.disc = LazyArray("disc", stored["disc"], tables["disc"]) if "disc" in stored else None
        self.label, self.status = LazyArray("label", stored["label"]), LazyArray("status", stored["status"])

    def __len__(self) -> int:
        return self.layout.rows

    def __repr__(self) -> str:
        books = " x ".join(str(sizes.max()) for sizes in self.spec.sizes.values())
        return f"<TokenShards {self.path}: {len(self)} rows, {len(self.spec.views)} views, grid {self.grid}, {books}>"

    @property
    def grid(self) -> tuple[int, ...]:
        """Cells per axis; their product is L."""
        return self.spec.grid

    @property
    def views(self) -> tuple[dict, ...]:
        """One dict per view: its name, and the crop as the encoder recorded it."""
        return self.spec.views

    @property
    def gen_sizes(self) -> np.ndarray:
        """(L,) int64: position t of `gen` uses ids below gen_sizes[t]."""
        return self.spec.sizes["gen"]

    @property
    def disc_size(self) -> int | None:
        """Entries of the discriminative codebook."""
        return self.spec.disc_size

    @property
    def recipe(self) -> dict:
        """Crop, transform, decoder and model identities that made these tokens."""
        return self.meta["recipe"]

    @cached_property
    def index(self) -> "pa.Table":
        """index.parquet: key, split, label_name, reason; row n belongs to token row n."""
        import pyarrow.parquet as pq

        return pq.read_table(self.path / INDEX)

    @cached_property
    def centroids(self) -> np.ndarray | None:
        """(K, D) float32 of the discriminative codebook, mapped copy-on-write; None if the set has none."""
        return self._book("centroids")

    @cached_property
    def neighbours(self) -> tuple[np.ndarray, np.ndarray] | None:
        """ids (K, 6) int32 and weights (K, 6) float32 of each entry's nearest, itself first; None without centroids.

        See `pipeline/kmeans/neighbours.py`.
        """
        ids = self._book("neighbour_ids")
        return None if ids is None else (ids, self._book("neighbour_weights"))

    @cached_property
    def class_embeddings(self) -> np.ndarray | None:
        """(C, E) floats, one row per class, of an imported set that had them; else None."""
        return self._book("class_embeddings")

    @cached_property
    def counts(self) -> dict[str, np.ndarray]:
        """Array name -> (K,) int64 occurrences of each id in the good rows."""
        return {name: self._book(f"{name}_counts") for name in self.spec.sizes}

    def split_rows(self, split: str | None) -> np.ndarray:
        """(N,) bool: the rows of a split, all of them for None; ShardError lists the splits there are."""
        if split is None:
            return np.ones(len(self), bool)
        import pyarrow.compute as pc
        import pyarrow.parquet as pq

        column = pq.read_table(self.path / INDEX, columns=["split"])["split"]
        wanted = pc.equal(column, split).to_numpy(zero_copy_only=False).astype(bool)
        if not wanted.any():
            raise ShardError(
                f"{self.path} has no split {split!r}; it has {sorted(map(str, column.unique().to_pylist()))}"
            )
        return wanted

    def read(self, rows: slice) -> Block:
        """Consecutive rows in memory, ids as they were encoded."""
        disc = None if self.disc is None else self.disc[rows]
        return Block(self.gen[rows], disc, self.label[rows], self.status[rows])

    def blocks(self, rows: int | None = None) -> Iterator[Block]:
        """All rows in order, `rows` at a time; by default a whole shard, which is decoded fastest."""
        step = rows or self.layout.shard_rows
        for start in range(0, len(self), step):
            yield self.read(slice(start, min(start + step, len(self))))

    def load(self, split: str | None = None, workers: int = 0) -> LoadedTokens:
        """Decode every good row, of one split or all, into the smallest integer type; workers=0: one per core.

        Memory: the result and two shards per worker.
        """
        status, label = self.status[:], self.label[:]
        wanted = self.split_rows(split)
        good = wanted & (status == 0)
        starts = np.concatenate([[0], np.cumsum(good)])
        tokens = {}
        with ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool:
            jobs = []
            for name, sizes in self.spec.sizes.items():
                dtype = memory_dtype(int(sizes.max()))
                tokens[name] = np.empty((int(starts[-1]), *self.gen.shape[1:]), dtype)
                for shard in range(self.layout.shards):
                    jobs.append(pool.submit(self._load_shard, name, shard, good, starts, tokens[name]))
            for job in jobs:
                job.result()
        left_out = int(wanted.sum() - good.sum())
        return LoadedTokens(tokens["gen"], tokens.get("disc"), label[good], np.flatnonzero(good), left_out)

    def _load_shard(self, name: str, shard: int, good: np.ndarray, starts: np.ndarray, out: np.ndarray) -> None:
        """Fill out[starts[a] : starts[b]] with the good rows a..b of one shard."""
        array: LazyArray = getattr(self, name)
        where = self.layout.shard(shard)
        keep = good[where]
        if not keep.any():
            return
        file = token_file(name, shard)
        if file in self._unchecked:
            check_files(self.path, self._sums, [file])
        ranks = np.asarray(read_stored(name, array.stored, where))
        ranks = ranks if keep.all() else ranks[keep]
        target = out[starts[where.start] : starts[where.stop]]
        step = max(1, (1 << 20) // max(1, ranks[0].size))
        for start in range(0, len(ranks), step):
            ids = look_up(array.table, ranks[start : start + step])
            if ids.max() == filler(ids.dtype):
                raise ShardError(
                    f"{name}: a row of {where} has no tokens though its status is 0; run `semdict shards verify`"
                )
            target[start : start + step] = ids

    def _book(self, name: str) -> np.ndarray | None:
        file = self.path / CODEBOOKS / f"{name}.npy"
        try:
            return np.load(file, mmap_mode="c", allow_pickle=False) if file.exists() else None
        except (ValueError, OSError) as error:
            raise ShardError(f"{file} is damaged: {error}") from None

    def _require_files(self) -> None:
        """ShardError if a file is missing: zarr would read it as fillers, without an error."""
        names = sorted({*expected_files(self.spec, self.layout), *self._sums.digests})
        missing = [name for name in names if not (self.path / name).is_file()]
        if missing:
            raise ShardError(
                f"{self.path} is incomplete: {missing[0]} is missing ({len(missing)} of {len(names)} files)"
            )

    def _check_files(self) -> None:
        """Compare with SHA256SUMS all files but the shard files of format 1."""
        names = set(expected_files(self.spec, self.layout, optional_books(self.path)))
        check_files(self.path, self._sums, sorted(names - self._unchecked))

    def _check(self, stored: dict[str, Any], done: np.ndarray) -> None:
        """Shapes agree with the attributes and every chunk is marked as written."""
        cells = (len(self.spec.views), self.spec.length)
        for name in self.spec.sizes:
            shape, dtype = (len(self), *cells), self.spec.dtypes[name]
            if stored[name].shape != shape or stored[name].dtype != dtype:
                actual = f"{stored[name].dtype} {stored[name].shape}"
                raise ShardError(f"{self.path}: {name} is {actual}, the attributes say {dtype} {shape}")
        for name in ("label", "status"):
            if stored[name].shape != (len(self),):
                raise ShardError(f"{self.path}: {name} is {stored[name].shape}, the attributes say {(len(self),)}")
        if len(done) != self.layout.chunks or not (done == 1).all():
            first = int(np.flatnonzero(done != 1)[0]) if (done != 1).any() else len(done)
            raise ShardError(
                f"{self.path} is incomplete: chunk {first} of {self.layout.chunks} is not marked as written"
            )
