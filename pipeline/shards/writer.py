"""Write a token shard directory: constant memory, equal bytes for equal input, whole or not at all."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from semdict.pipeline.common.errors import ShardError
from semdict.pipeline.common.publish import publish_folder
from semdict.pipeline.kmeans.neighbours import neighbour_table
from semdict.pipeline.shards.checksums import write_sums
from semdict.pipeline.shards.format import (
    CODEBOOKS,
    INDEX,
    INDEX_COLUMNS,
    ROW_CHUNK,
    TOKENS,
    Block,
    Layout,
    ShardSpec,
    import_zarr,
    metadata,
)
from semdict.pipeline.shards.ids import count_ids, filler, ids_by_rank, look_up, ranks_by_id

if TYPE_CHECKING:
    import pyarrow as pa

Blocks = Iterable[Block] | Callable[[], Iterable[Block]]
IN_FLIGHT = 384 << 20  # bytes of tokens waiting to be compressed; more only if a single shard is larger


def write_shards(
    path: str | Path,
    spec: ShardSpec,
    blocks: Blocks,
    index: "pa.Table | pa.RecordBatchReader",
    centroids: np.ndarray | None = None,
    *,
    class_embeddings: np.ndarray | None = None,
    gen_counts: np.ndarray | None = None,
    disc_counts: np.ndarray | None = None,
    codec: str = "pcodec",
    chunk_rows: int = 4096,
    shard_rows: int = 65536,
    workers: int = 2,
) -> None:
    """Write `blocks`, rows 0..N-1 in order and cut anywhere, as a shard directory that takes the place of `path`.

    Ids are stored as ranks by falling frequency, so the frequencies must be known first: `blocks` is walked twice (a
    sequence, or a function that returns a fresh iterator), unless gen_counts (K,) and disc_counts (K,) are passed;
    counts that turn out wrong are refused. index: one row per image, columns key, split, label_name, reason (others are
    kept). centroids (K, D) float32 of the discriminative codebook; class_embeddings (C, E) floats, kept as they are.
    codec: "pcodec" or "blosc". `workers` threads
    compress, each owning whole shards. ShardError names the row and position of an id outside its codebook.
    """
    layout = Layout.fit(spec.rows, chunk_rows, shard_rows)
    _check_books(spec, centroids, class_embeddings)
    counts = _all_counts(spec, blocks, {"gen": gen_counts, "disc": disc_counts})
    with publish_folder(path, "shards") as folder:
        arrays = _create(folder, spec, layout, counts, codec)
        _write_codebooks(folder, arrays, counts, centroids)
        if class_embeddings is not None:
            np.save(folder / CODEBOOKS / "class_embeddings.npy", class_embeddings)
        written = _write_rows(spec, layout, _walk(blocks), arrays, counts, max(1, workers))
        for name, count in counts.items():
            if not np.array_equal(count, written[name]):
                raise ShardError(f"{name}_counts are not the counts of the blocks that came: count the same rows")
        arrays["complete"][:] = np.ones(layout.chunks, np.uint8)
        write_index(folder / INDEX, index, spec.rows)
        write_sums(folder)


def count_tokens(spec: ShardSpec, blocks: Iterable[Block]) -> dict[str, np.ndarray]:
    """Array name -> (K,) int64 occurrences of each id in rows of status 0: the frequencies for `write_shards`."""
    totals = {name: np.zeros(sizes.max(), np.int64) for name, sizes in spec.sizes.items()}
    start = 0
    for block in blocks:
        _check_block(spec, block, start)
        for name in totals:
            totals[name] += count_ids(_good(getattr(block, name), block.status), len(totals[name]))[0]
        start += len(block.label)
    return totals


def write_index(path: Path, index: "pa.Table | pa.RecordBatchReader", rows: int) -> None:
    """index.parquet, streamed; ShardError if a column is missing or the number of rows is not `rows`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    missing = [name for name in INDEX_COLUMNS if name not in index.schema.names]
    if missing:
        raise ShardError(f"the index lacks the columns {missing}; it must hold {list(INDEX_COLUMNS)}")
    batches = index.to_batches(1 << 16) if isinstance(index, pa.Table) else index
    written = 0
    with pq.ParquetWriter(path, index.schema, compression="zstd") as writer:
        for batch in batches:
            writer.write_batch(batch)
            written += batch.num_rows
    if written != rows:
        raise ShardError(f"the index has {written} rows, the token set {rows}: both must follow the same manifest")


def _check_books(spec: ShardSpec, centroids: np.ndarray | None, class_embeddings: np.ndarray | None) -> None:
    if class_embeddings is not None and (class_embeddings.ndim != 2 or class_embeddings.dtype.kind != "f"):
        actual = f"{class_embeddings.dtype} {class_embeddings.shape}"
        raise ShardError(f"class_embeddings are {actual}, expected floats (classes, width)")
    if centroids is not None and (centroids.ndim != 2 or len(centroids) != spec.disc_size):
        raise ShardError(f"centroids are {centroids.shape}, the discriminative codebook has {spec.disc_size} entries")


def _walk(blocks: Blocks) -> Iterable[Block]:
    return blocks() if callable(blocks) else blocks


def _all_counts(spec: ShardSpec, blocks: Blocks, known: dict[str, Any]) -> dict[str, np.ndarray]:
    """Array name -> (K,) int64, as known or by a first walk over the blocks."""
    if any(known[name] is None for name in spec.sizes):
        if isinstance(blocks, Iterator):
            raise ShardError("an iterator can be walked once only: give gen_counts and disc_counts, or a function")
        return count_tokens(spec, _walk(blocks))
    counts = {name: np.asarray(known[name], np.int64) for name in spec.sizes}
    for name, sizes in spec.sizes.items():
        if counts[name].shape != (sizes.max(),):
            raise ShardError(f"{name}_counts are {counts[name].shape}, the codebook has {sizes.max()} entries")
    return counts


def _check_block(spec: ShardSpec, block: Block, start: int) -> None:
    """ShardError for a wrong shape or dtype, and for an id outside its codebook, with row, view and position."""
    n = len(block.label)
    for name, sizes in spec.sizes.items():
        ids = getattr(block, name)
        shape, dtype = (n, len(spec.views), spec.length), spec.dtypes[name]
        if ids is None or ids.shape != shape or ids.dtype != dtype:
            actual = "nothing" if ids is None else f"{ids.dtype} {ids.shape}"
            raise ShardError(f"{name} of the block at row {start} is {actual}, expected {dtype} {shape}")
        if not _within(ids, sizes, block.status):
            _name_bad_id(name, ids, sizes, block.status, start)
    if block.status.shape != (n,) or start + n > spec.rows:
        raise ShardError(
            f"the block at row {start} has {n} labels and {len(block.status)} statuses of {spec.rows} rows"
        )


def _within(ids: np.ndarray, sizes: np.ndarray, status: np.ndarray) -> bool:
    """Whether the ids of good rows are within their codebooks; quick if all ids, those of bad rows too, are small."""
    return not ids.size or ids.max() < sizes.min() or bool((_good(ids, status) < sizes.astype(np.uint32)).all())


def _name_bad_id(name: str, ids: np.ndarray, sizes: np.ndarray, status: np.ndarray, start: int) -> None:
    row, view, position = np.argwhere((ids >= sizes) & (status == 0)[:, None, None])[0]
    raise ShardError(
        f"{name}: row {start + row}, view {view}, position {position} holds id {ids[row, view, position]}, "
        f"the codebook of that position has {sizes[position]} entries"
    )


def _good(ids: np.ndarray, status: np.ndarray) -> np.ndarray:
    """The rows of status 0; the array itself if that is all of them."""
    good = np.asarray(status) == 0
    return ids if good.all() else ids[good]


def _create(folder: Path, spec: ShardSpec, layout: Layout, counts: dict[str, np.ndarray], codec: str) -> dict[str, Any]:
    """Array name -> empty zarr array; unwritten tokens read as the filler, which is never an id."""
    zarr = import_zarr()
    from zarr.codecs import Crc32cCodec, ZstdCodec

    group = zarr.create_group(folder / TOKENS, zarr_format=3, attributes=metadata(spec, layout, codec))
    packed = [ZstdCodec(level=5), Crc32cCodec()]
    whole = {"config": {"write_empty_chunks": True}}
    arrays, cells = {}, (len(spec.views), spec.length)
    for name, dtype in spec.dtypes.items():
        arrays[name] = group.create_array(
            name,
            shape=(layout.rows, *cells),
            dtype=dtype,
            chunks=(layout.chunk_rows, *cells),
            shards=(layout.shard_rows, *cells),
            fill_value=filler(dtype),
            dimension_names=("row", "view", "position"),
            attributes={"ids": f"{name}_ids", "meaning": f"rank by frequency; {name}_ids[rank] is the id"},
            **codecs(codec, dtype),
            **whole,
        )
        shape = ids_by_rank(counts[name]).shape
        arrays[f"{name}_ids"] = group.create_array(
            f"{name}_ids", shape=shape, chunks=shape, dtype=dtype, fill_value=filler(dtype), compressors=packed, **whole
        )
    rows = {"shape": (layout.rows,), "chunks": (min(layout.rows, ROW_CHUNK),), "dimension_names": ("row",)}
    arrays["label"] = group.create_array("label", dtype="int32", fill_value=-1, compressors=packed, **rows, **whole)
    arrays["status"] = group.create_array("status", dtype="uint8", fill_value=255, compressors=packed, **rows, **whole)
    arrays["complete"] = group.create_array(
        "complete", shape=(layout.chunks,), dtype="uint8", fill_value=0, compressors=packed, **whole
    )
    return arrays


def codecs(codec: str, dtype: np.dtype) -> dict[str, Any]:
    """Arguments of zarr's create_array. Sharding protects only its index, so each chunk ends in a crc32c of its own."""
    from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec
    from zarr.codecs.numcodecs import PCodec

    # No transpose codec in front of pcodec: numcodecs 0.16 then stores the order of memory, not of the axes.
    if codec == "pcodec":
        serializer = PCodec(
            level=8,
            mode_spec="classic",
            delta_spec="try_consecutive",
            delta_encoding_order=0,
            equal_pages_up_to=1 << 20,
        )
        return {"serializer": serializer, "compressors": [Crc32cCodec()]}
    if codec == "blosc":
        blosc = BloscCodec(typesize=dtype.itemsize, cname="zstd", clevel=5, shuffle="bitshuffle")
        return {"serializer": BytesCodec(), "compressors": [blosc, Crc32cCodec()]}
    raise ShardError(f"codec {codec!r} is unknown: pcodec (smallest, default) or blosc (widest support)")


def _write_codebooks(folder: Path, arrays: dict, counts: dict[str, np.ndarray], centroids: np.ndarray | None) -> None:
    """Rank tables inside the zarr group; counts, centroids and their neighbours beside it as .npy."""
    books = folder / CODEBOOKS
    books.mkdir()
    for name, count in counts.items():
        arrays[f"{name}_ids"][:] = ids_by_rank(count)
        np.save(books / f"{name}_counts.npy", count)
    if centroids is not None:
        with np.errstate(over="ignore"):  # numbers beyond float32 become infinite, which is refused
            centroids = np.ascontiguousarray(centroids, np.float32)
        ids, weights = neighbour_table(centroids)
        np.save(books / "centroids.npy", centroids)
        np.save(books / "neighbour_ids.npy", ids)
        np.save(books / "neighbour_weights.npy", weights)


def _write_rows(spec, layout, blocks, arrays, counts, workers) -> dict[str, np.ndarray]:
    """Rank and store every row; returns the counts of the ids that were written."""
    tables = {name: ranks_by_id(ids_by_rank(count)) for name, count in counts.items()}
    totals = {name: np.zeros_like(count) for name, count in counts.items()}
    row_bytes = len(spec.views) * spec.length * sum(dtype.itemsize for dtype in spec.dtypes.values())
    waiting: list[Future] = []
    most = max(1, min(workers, IN_FLIGHT // (row_bytes * layout.shard_rows)))
    rows = _RowColumns(spec.rows, arrays)
    with ThreadPoolExecutor(most) as pool:
        for at, shard in enumerate(regroup(spec, blocks, layout)):
            rows.add(shard)
            while len(waiting) >= most:
                _add(totals, waiting.pop(0).result())
            where = layout.shard(at)
            waiting.append(pool.submit(_write_shard, arrays, where, shard, tables, counts))
        for future in waiting:
            _add(totals, future.result())
    rows.flush()
    return totals


def _add(totals: dict[str, np.ndarray], more: dict[str, np.ndarray]) -> None:
    for name in totals:
        totals[name] += more[name]


def _write_shard(
    arrays: dict, where: slice, shard: Block, tables: dict[str, np.ndarray], counts: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Compress one whole shard of each token array; returns its counts by id."""
    written = {}
    for name, table in tables.items():
        ids = getattr(shard, name)
        written[name], _ = count_ids(ids, len(counts[name]))
        arrays[name][where] = look_up(table, ids)
    return written


class _RowColumns:
    """`label` and `status`, kept until a chunk of theirs is full: at most 10 MB."""

    def __init__(self, rows: int, arrays: dict) -> None:
        self.arrays, self.start, self.filled = arrays, 0, 0
        size = min(rows, ROW_CHUNK)
        self.buffers = {"label": np.empty(size, np.int32), "status": np.empty(size, np.uint8)}

    def add(self, block: Block) -> None:
        taken, n = 0, len(block.label)
        while taken < n:
            room = len(self.buffers["label"]) - self.filled
            part = slice(taken, min(n, taken + room))
            for name, buffer in self.buffers.items():
                buffer[self.filled : self.filled + part.stop - part.start] = getattr(block, name)[part]
            self.filled += part.stop - part.start
            taken = part.stop
            if self.filled == len(self.buffers["label"]):
                self.flush()

    def flush(self) -> None:
        if self.filled:
            for name, buffer in self.buffers.items():
                self.arrays[name][self.start : self.start + self.filled] = buffer[: self.filled]
            self.start, self.filled = self.start + self.filled, 0


def regroup(spec: ShardSpec, blocks: Iterable[Block], layout: Layout) -> Iterator[Block]:
    """Checked blocks cut anew so that each is one whole shard, bad rows filled; ShardError unless there are N rows."""
    start, shard = 0, None
    for block in blocks:
        _check_block(spec, block, start)
        taken, n = 0, len(block.label)
        while taken < n:
            if shard is None:
                where = layout.shard(start // layout.shard_rows)
                shard, filled = _empty(spec, where.stop - where.start), 0
            part = slice(taken, min(n, taken + len(shard.label) - filled))
            _copy(block, part, shard, filled)
            filled += part.stop - part.start
            start += part.stop - part.start
            taken = part.stop
            if filled == len(shard.label):
                yield shard
                shard = None
    if start != spec.rows:
        raise ShardError(f"the blocks hold {start} rows, the token set should have {spec.rows}")


def _empty(spec: ShardSpec, rows: int) -> Block:
    shape = (rows, len(spec.views), spec.length)
    tokens = {name: np.empty(shape, dtype) for name, dtype in spec.dtypes.items()}
    return Block(tokens["gen"], tokens.get("disc"), np.empty(rows, np.int32), np.empty(rows, np.uint8))


def _copy(source: Block, part: slice, target: Block, at: int) -> None:
    """Rows `part` of source to target[at:]; tokens of rows with a status become the filler."""
    where = slice(at, at + part.stop - part.start)
    target.label[where], target.status[where] = source.label[part], source.status[part]
    bad = np.flatnonzero(target.status[where])
    for name in ("gen", "disc"):
        ids = getattr(target, name)
        if ids is not None:
            ids[where] = getattr(source, name)[part]
            ids[where][bad] = filler(ids.dtype)
