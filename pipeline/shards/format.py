"""Format 2 of a token shard directory: names of its files, metadata, and the check that a path is one.

N rows (images), V views, L grid cells, K codebook entries. `shards/README.md` describes the format. Version 1, which
has no ids of 32 bits and no sizes in SHA256SUMS, is read as it is.
"""

import json
import math
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from semdict.pipeline.common.errors import ShardError
from semdict.pipeline.common.files import is_foreign
from semdict.pipeline.shards.ids import FILL, MAX_CODES, filler, id_dtype

FORMAT = "semdict-token-shards"
VERSION = 2
READABLE = (1, 2)
MAX_LENGTH = 1 << 20  # grid cells
MAX_SHARDS = 1 << 20  # files of one token array
TOKENS = "tokens.zarr"
INDEX = "index.parquet"
INDEX_COLUMNS = ("key", "split", "label_name", "reason")
CODEBOOKS = "codebooks"
SUMS = "SHA256SUMS"
ROW_CHUNK = 1 << 21  # rows in one chunk of `label` and `status`: one file each for ImageNet-1k


class NotShardsError(ShardError):
    """The path is no token shard directory, or one of a newer format; exit 2."""

    exit_code = 2


@dataclass(frozen=True)
class ShardSpec:
    """A token set before any token is written.

    rows: N. views: V dicts that describe each crop (a name at least). grid: cells per axis, (16, 16) or (256,) for a
    1-D tokenizer; L is their product. gen_sizes: K, or L numbers where position t uses ids < K_t. disc_size: entries
    of the discriminative codebook, None for a set with generative tokens only. recipe: crop, transform, decoder and
    model identities (JSON-able); trainers compare it. fingerprint: of manifest and parameters.
    """

    rows: int
    views: Sequence[dict]
    grid: Sequence[int]
    gen_sizes: int | Sequence[int]
    disc_size: int | None = None
    recipe: dict = field(default_factory=dict)
    fingerprint: str = ""
    title: str = ""
    licence: str = "other"
    source: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "grid", tuple(int(side) for side in self.grid))
        if not 1 <= self.length <= MAX_LENGTH:
            raise ShardError(f"the grid {self.grid} has {self.length} cells, expected 1..{MAX_LENGTH}")
        sizes = [self.gen_sizes] * self.length if isinstance(self.gen_sizes, (int, np.integer)) else self.gen_sizes
        object.__setattr__(self, "views", tuple(dict(view) for view in self.views))
        object.__setattr__(self, "gen_sizes", tuple(int(size) for size in sizes))
        if self.rows < 1 or not self.views:
            raise ShardError(f"a token set needs at least one row and one view, got {self.rows} and {len(self.views)}")
        if len(self.gen_sizes) != self.length:
            raise ShardError(f"gen_sizes names {len(self.gen_sizes)} positions, the grid {self.grid} has {self.length}")
        disc_size = 1 if self.disc_size is None else self.disc_size
        for name, size in (("gen", self.gen_size), ("disc", disc_size), ("gen", min(self.gen_sizes))):
            if not 1 <= size <= MAX_CODES:
                raise ShardError(f"{name}: codebook size {size} is outside 1..{MAX_CODES}")

    @property
    def length(self) -> int:
        """L, the number of grid cells."""
        return math.prod(int(side) for side in self.grid)

    @property
    def gen_size(self) -> int:
        """K of the generative codebook, the largest of `gen_sizes`."""
        return max(self.gen_sizes)

    @property
    def sizes(self) -> dict[str, np.ndarray]:
        """Array name -> (L,) int64 codebook size per position; `disc` only if the set has one."""
        sizes = {"gen": np.array(self.gen_sizes, np.int64)}
        if self.disc_size is not None:
            sizes["disc"] = np.full(self.length, self.disc_size, np.int64)
        return sizes

    @property
    def dtypes(self) -> dict[str, np.dtype]:
        """Array name -> uint16 or uint32, the type of its ids; the largest value of the type means "no token"."""
        return {name: id_dtype(int(sizes.max())) for name, sizes in self.sizes.items()}


@dataclass
class Block:
    """Consecutive rows. gen, disc (n, V, L) ids of `ShardSpec.dtypes`; label (n,) int32, -1 = none; status (n,) uint8.

    Rows of a status other than 0 have no tokens: the writer stores the filler for them.
    """

    gen: np.ndarray
    disc: np.ndarray | None
    label: np.ndarray
    status: np.ndarray


@dataclass(frozen=True)
class Layout:
    """How rows are cut: a chunk is the unit of reading, a shard (one file) that of writing."""

    rows: int
    chunk_rows: int
    shard_rows: int

    @classmethod
    def fit(cls, rows: int, chunk_rows: int, shard_rows: int) -> "Layout":
        """At most these sizes; chunks of equal size, since rows that pad the last one cost bytes too.

        ShardError if a shard is no whole number of chunks.
        """
        if chunk_rows < 1 or shard_rows < 1 or shard_rows % chunk_rows:
            raise ShardError(f"shard_rows {shard_rows} is not a positive multiple of chunk_rows {chunk_rows}")
        chunks = math.ceil(rows / chunk_rows)
        chunk = math.ceil(rows / chunks)
        return cls(rows, chunk, chunk * min(chunks, shard_rows // chunk_rows))

    @property
    def shards(self) -> int:
        return math.ceil(self.rows / self.shard_rows)

    @property
    def chunks(self) -> int:
        return math.ceil(self.rows / self.chunk_rows)

    def shard(self, number: int) -> slice:
        """The rows of shard `number`."""
        return slice(number * self.shard_rows, min(self.rows, (number + 1) * self.shard_rows))

    def chunk(self, number: int) -> slice:
        """The rows of chunk `number`."""
        return slice(number * self.chunk_rows, min(self.rows, (number + 1) * self.chunk_rows))


def metadata(spec: ShardSpec, layout: Layout, codec: str) -> dict[str, Any]:
    """The group attributes; equal input gives equal bytes, so there is no date in them."""
    uniform = len(set(spec.gen_sizes)) == 1
    codebooks = {"gen": {"size": spec.gen_size, "sizes": None if uniform else list(spec.gen_sizes)}}
    if spec.disc_size is not None:
        codebooks["disc"] = {"size": int(spec.disc_size), "sizes": None}
    meta = {
        "format": FORMAT,
        "version": VERSION,
        "rows": int(spec.rows),
        "views": [dict(view) for view in spec.views],
        "grid": list(spec.grid),
        "codebooks": codebooks,
        "fill": _fill(spec),
        "recipe": spec.recipe,
        "fingerprint": spec.fingerprint,
        "title": spec.title,
        "licence": spec.licence,
        "source": spec.source,
        "codec": codec,
        "chunk_rows": layout.chunk_rows,
        "shard_rows": layout.shard_rows,
        "libraries": _libraries(),
    }
    try:
        return json.loads(json.dumps(meta, sort_keys=True, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ShardError(f"views and recipe must be plain JSON values: {error}") from None


def _fill(spec: ShardSpec) -> int | dict[str, int]:
    """The filler: one number if all ids are uint16, as in version 1, else that of each array."""
    fills = {name: filler(dtype) for name, dtype in spec.dtypes.items()}
    return FILL if set(fills.values()) == {FILL} else fills


def _libraries() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("numcodecs", "numpy", "pcodec", "pyarrow", "zarr")}


def read_metadata(path: Path) -> tuple[dict[str, Any], ShardSpec, Layout]:
    """The attributes of a shard directory.

    Raises NotShardsError naming what is missing, or a version that is newer; ShardError if the attributes are damaged.
    """
    group = path / TOKENS / "zarr.json"
    try:
        head = json.loads(group.read_bytes())
        meta, zarr_format = head["attributes"], head["zarr_format"]
    except FileNotFoundError:
        reason = "does not exist" if not path.exists() else f"has no {TOKENS}/zarr.json"
        raise NotShardsError(f"{path} is not a token shard directory: it {reason}") from None
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise NotShardsError(f"{path} is not a token shard directory: {group} cannot be read ({error})") from None
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        raise NotShardsError(f"{path} is not a token shard directory: {group} does not say format {FORMAT!r}")
    if zarr_format != 3:  # arrays of zarr 2 may name codecs that run code, such as pickle
        raise ShardError(
            f"{group} says zarr_format {zarr_format!r}, token shards are zarr 3: the file is damaged or forged"
        )
    if meta.get("version") not in READABLE:
        raise NotShardsError(
            f"{path} is format version {meta.get('version')}, this program reads versions {READABLE[0]} to {VERSION}: "
            "install a newer one"
        )
    try:
        layout = Layout(meta["rows"], meta["chunk_rows"], meta["shard_rows"])
        if min(layout.chunk_rows, layout.shard_rows) < 1 or layout.shards > MAX_SHARDS:
            raise ValueError(f"{layout.rows} rows in chunks of {layout.chunk_rows}, shards of {layout.shard_rows}")
        return meta, spec_of(meta), layout
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ShardError(f"{group}: the attributes are damaged ({type(error).__name__}: {error})") from None


def spec_of(meta: dict[str, Any]) -> ShardSpec:
    """The ShardSpec that a set was written with."""
    gen, disc = meta["codebooks"]["gen"], meta["codebooks"].get("disc")
    kept = {key: meta[key] for key in ("rows", "views", "grid", "recipe", "fingerprint", "title", "licence", "source")}
    return ShardSpec(gen_sizes=gen["sizes"] or gen["size"], disc_size=disc["size"] if disc else None, **kept)


def import_zarr() -> Any:
    """The zarr module, without its warning that pcodec is no core codec of zarr 3 (see `shards/README.md`)."""
    import warnings

    import zarr

    warnings.filterwarnings("ignore", message="Numcodecs codecs are not in the Zarr version 3 specification")
    return zarr


def token_file(name: str, shard: int) -> str:
    """Path of one shard file of `gen` or `disc`, relative to the directory."""
    return f"{TOKENS}/{name}/c/{shard}/0/0"


def is_token_file(name: str) -> bool:
    """Whether a file of a shard directory, relative to it, is a shard file of `gen` or `disc`."""
    return re.fullmatch(rf"{re.escape(TOKENS)}/(gen|disc)/c/\d+/0/0", name) is not None


def token_files(spec: ShardSpec, layout: Layout) -> list[str]:
    """The shard files of all token arrays."""
    return [token_file(name, shard) for name in spec.sizes for shard in range(layout.shards)]


def optional_books(path: Path) -> list[str]:
    """Which of the optional codebook files a directory has: centroids, class_embeddings."""
    return [name for name in ("centroids", "class_embeddings") if (path / CODEBOOKS / f"{name}.npy").is_file()]


def expected_files(spec: ShardSpec, layout: Layout, books: Collection[str] = ()) -> list[str]:
    """Every file of a whole directory but SHA256SUMS, sorted; relative, with forward slashes.

    books: `optional_books` of the set; the neighbour table belongs to the centroids.
    """
    files = [f"{TOKENS}/zarr.json", INDEX, *token_files(spec, layout)]
    for name in spec.sizes:
        files += [f"{TOKENS}/{name}_ids/c/0", f"{CODEBOOKS}/{name}_counts.npy"]
        files += [f"{TOKENS}/{array}/zarr.json" for array in (name, f"{name}_ids")]
    for name in ("label", "status"):
        files += [f"{TOKENS}/{name}/c/{chunk}" for chunk in range(math.ceil(spec.rows / ROW_CHUNK))]
    files += [f"{TOKENS}/complete/c/0", *(f"{TOKENS}/{name}/zarr.json" for name in ("label", "status", "complete"))]
    books = [*books, *(("neighbour_ids", "neighbour_weights") if "centroids" in books else ())]
    files += [f"{CODEBOOKS}/{name}.npy" for name in books]
    return sorted(files)


def files_under(path: Path) -> list[str]:
    """Every file below `path` but those of other programs, sorted; relative, with forward slashes."""
    names = (file.relative_to(path) for file in path.rglob("*") if not file.is_dir())
    return sorted(name.as_posix() for name in names if not any(map(is_foreign, name.parts)))
