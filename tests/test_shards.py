"""The shard format: the rows that are written are read back, checked against plain zarr and numpy."""

import os
import signal
import subprocess
import sys
import textwrap
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from semdict.pipeline.common.errors import ShardError
from semdict.pipeline.shards import FILL, Block, ShardSpec, open_shards, verify_shards, write_shards
from semdict.pipeline.shards.command import summary
from semdict.pipeline.shards.ids import count_ids, ids_by_rank, look_up, ranks_by_id
from tests.token_sets import cut, make_index, make_set, tree, write

ROOT = Path(__file__).resolve().parent.parent
FORMAT_1 = ROOT / "tests/data/shards-v1"  # written by version 1 from the rows in shards-v1-ids.npz


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.integers(1, 70),
    views=st.integers(1, 3),
    grid=st.sampled_from([(1,), (9,), (4, 4)]),
    gen_size=st.sampled_from([40, FILL, FILL + 1, 1 << 18]),
    disc_size=st.sampled_from([None, 1, 300, FILL, FILL + 1]),
    bad=st.sampled_from([0.0, 0.3, 1.0]),
    chunk=st.integers(1, 20),
    per_shard=st.integers(1, 4),
    codec=st.sampled_from(["pcodec", "blosc"]),
    varying=st.booleans(),
    seed=st.integers(0, 99),
)
def test_round_trip(tmp_path, rows, views, grid, gen_size, disc_size, bad, chunk, per_shard, codec, varying, seed):
    """Ids written are ids read, lazily and loaded, for all shapes, statuses, codebook sizes and cuts into blocks."""
    length = int(np.prod(grid))
    sizes = [gen_size - t for t in range(length)] if varying else gen_size
    spec, block = make_set(rows, views, grid, sizes, disc_size, bad, seed)
    path = write(tmp_path / "s", spec, block, chunk_rows=chunk, shard_rows=chunk * per_shard, codec=codec)
    assert verify_shards(path).problems == []
    shards = open_shards(path)
    assert len(shards) == rows and shards.spec == spec and shards.meta["version"] == 2
    assert shards.gen.dtype == (np.uint16 if gen_size <= FILL else np.uint32)
    for name in ("gen", "disc", "label", "status"):
        want = getattr(block, name)
        if want is None:
            assert getattr(shards, name) is None
            continue
        assert np.array_equal(getattr(shards, name)[:], want)
        assert np.array_equal(getattr(shards, name)[rows // 2 : rows - 1], want[rows // 2 : rows - 1])
        assert np.array_equal(getattr(shards, name)[rows - 1], want[rows - 1])
    good = block.status == 0
    loaded = shards.load()
    assert np.array_equal(loaded.gen, block.gen[good]) and np.array_equal(loaded.rows, np.flatnonzero(good))
    assert np.array_equal(loaded.label, block.label[good]) and loaded.left_out == (~good).sum()
    assert (loaded.disc is None) == (disc_size is None)
    if disc_size:
        assert np.array_equal(loaded.disc, block.disc[good])


@pytest.mark.parametrize(
    "key",
    [
        3,
        -1,
        (4, 0),
        ...,
        slice(None, None, 7),
        (slice(0, 9), 0, 5),
        [9, 2],
        torch.tensor([7, 1, 1]),
        torch.tensor(6),
        torch.arange(50) % 4 == 1,
        (torch.tensor(2), 0),
        np.array([30, 2, 2]),
        np.arange(50) % 3 == 0,
    ],
    ids=str,
)
def test_lazy_arrays_slice_as_numpy_does(tmp_path, key):
    spec, block = make_set()
    shards = open_shards(write(tmp_path / "s", spec, block))
    for name in ("gen", "disc"):
        values, want = getattr(shards, name)[key], getattr(block, name)[key]
        assert values.dtype == np.uint16 and np.array_equal(values, want)
    assert np.array_equal(np.asarray(shards.label), block.label)
    with pytest.raises(IndexError):
        shards.gen[np.ones(49, bool)]


def test_arrays_are_writable_copies(tmp_path):
    """torch takes them without a warning, writing to them works, and does not change the set."""
    centroids = np.random.default_rng(0).standard_normal((300, 4)).astype(np.float32)
    shards = open_shards(write(tmp_path / "s", *make_set(bad=0), centroids=centroids))
    before = tree(tmp_path / "s")
    loaded = shards.load()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for array in (
            *(shards.gen[:4], shards.disc[3], shards.label[:], shards.status[2:9], shards.centroids),
            *(*shards.neighbours, shards.counts["gen"], loaded.gen, loaded.disc, loaded.label, loaded.rows),
        ):
            torch.from_numpy(array).view(-1)[0] = 1
    assert tree(tmp_path / "s") == before
    assert np.array_equal(open_shards(tmp_path / "s").centroids, centroids)


@pytest.mark.parametrize("gen_size", [40, 1 << 18])
def test_plain_zarr_needs_one_look_up(tmp_path, gen_size):
    """The lines of shards/README.md, with zarr and numpy alone."""
    import zarr

    spec, block = make_set(gen_sizes=gen_size)
    group = zarr.open_group(write(tmp_path / "s", spec, block) / "tokens.zarr", mode="r")
    for name in ("gen", "disc"):
        table = group[f"{name}_ids"][:]
        assert np.array_equal(table[np.minimum(group[name][:], len(table) - 1)], getattr(block, name))
        assert group[name].fill_value == np.iinfo(spec.dtypes[name]).max
    assert np.array_equal(group["label"][:], block.label)
    counts = np.bincount(group["gen"][:][block.status == 0].ravel())
    assert (np.diff(counts) <= 0).all(), "ranks must fall in frequency"
    assert group.attrs["rows"] == spec.rows and group.attrs["format"] == "semdict-token-shards"
    assert group.attrs["fill"] == (FILL if gen_size == 40 else {"gen": 4294967295, "disc": FILL})


@settings(max_examples=60, deadline=None)
@given(size=st.sampled_from([1, 7, 300, FILL, FILL + 1, 1 << 18]), rows=st.integers(0, 60), seed=st.integers(0, 99))
def test_rank_tables(size, rows, seed):
    """Against numpy's indexing and counting: ranks are a permutation by frequency, and the filler stays the filler."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, 5, size)
    table = ids_by_rank(counts)
    fill = np.iinfo(table.dtype).max
    assert table.dtype == (np.uint16 if size <= FILL else np.uint32)
    assert np.array_equal(np.sort(table[:size]), np.arange(size)) and (np.diff(counts[table[:size]]) <= 0).all()
    ids = rng.integers(0, size, (rows, 3)).astype(table.dtype)
    ids[rng.random((rows, 3)) < 0.2] = fill
    ranks = look_up(ranks_by_id(table), ids)
    inverse = np.argsort(table[:size])
    assert np.array_equal(ranks, np.where(ids == fill, fill, inverse[np.minimum(ids, size - 1)]))
    assert np.array_equal(look_up(table, ranks), ids)
    numbers, fillers = count_ids(ids, size)
    assert np.array_equal(numbers, np.bincount(ids[ids != fill].astype(np.int64), minlength=size))
    assert fillers == (ids == fill).sum()


def test_format_1_is_read_as_it_is(tmp_path):
    """A set written by version 1 opens, verifies and loads, and holds the rows that it was written from."""
    ids = np.load(FORMAT_1.with_name("shards-v1-ids.npz"))
    assert verify_shards(FORMAT_1).problems == []
    shards = open_shards(FORMAT_1)
    assert shards.meta["version"] == 1 and shards.grid == (4, 4) and len(shards) == 60
    for name in ("gen", "disc", "label", "status"):
        assert np.array_equal(getattr(shards, name)[:], ids[name])
    assert np.array_equal(shards.centroids, ids["centroids"]) and shards.neighbours[0].shape == (64, 6)
    loaded = shards.load("val")
    rows = np.flatnonzero((np.arange(60) % 3 == 0) & (ids["status"] == 0))
    assert np.array_equal(loaded.rows, rows) and np.array_equal(loaded.disc, ids["disc"][rows])


def test_sets_of_uint16_keep_the_bytes_of_format_1(tmp_path):
    """The same rows written today: only the version in the attributes, and with it SHA256SUMS, is another."""
    old, ids = open_shards(FORMAT_1), np.load(FORMAT_1.with_name("shards-v1-ids.npz"))
    block = Block(ids["gen"], ids["disc"], ids["label"], ids["status"])
    write_shards(tmp_path / "s", old.spec, [block], old.index, ids["centroids"], chunk_rows=8, shard_rows=16)
    if open_shards(tmp_path / "s").meta["libraries"] != old.meta["libraries"]:
        pytest.skip("zarr, numcodecs or pcodec are of other versions than those of the stored set")
    before, after = tree(FORMAT_1), tree(tmp_path / "s")
    attributes = before["tokens.zarr/zarr.json"].replace(b'"version": 1', b'"version": 2')
    assert after == before | {"tokens.zarr/zarr.json": attributes, "SHA256SUMS": after["SHA256SUMS"]}


def test_bytes_depend_on_rows_only(tmp_path):
    """The cut into blocks, the number of threads, counts passed in and the order of keys do not change a byte."""
    spec, block = make_set(rows=90)
    first = tree(write(tmp_path / "a", spec, block))
    write_shards(
        tmp_path / "b",
        ShardSpec(**{**spec.__dict__, "recipe": {"a": 2, "z": 1}}),
        iter(cut(block, 90)),
        make_index(90).to_reader(max_chunksize=1000),
        gen_counts=np.bincount(block.gen[block.status == 0].ravel(), minlength=40),
        disc_counts=np.bincount(block.disc[block.status == 0].ravel(), minlength=300),
        chunk_rows=8,
        shard_rows=16,
        workers=1,
    )
    assert first == tree(tmp_path / "b")


def test_splits(tmp_path):
    spec, block = make_set(rows=60)
    index = make_index(60, lambda row: "val" if row % 3 == 0 else "train")
    write_shards(tmp_path / "s", spec, [block], index, chunk_rows=8, shard_rows=16)
    shards = open_shards(tmp_path / "s")
    want = (np.arange(60) % 3 == 0) & (block.status == 0)
    loaded = shards.load("val")
    assert np.array_equal(loaded.rows, np.flatnonzero(want)) and np.array_equal(loaded.disc, block.disc[want])
    assert loaded.left_out == ((np.arange(60) % 3 == 0) & (block.status != 0)).sum()
    with pytest.raises(ShardError, match=r"no split 'test'; it has \['train', 'val'\]"):
        shards.load("test")


def test_loaded_type_is_the_smallest(tmp_path):
    for size, dtype in (
        *((256, "uint8"), (257, "int16"), (32768, "int16"), (32769, "uint16")),
        *((65536, "uint16"), (65537, "int32"), (1 << 18, "int32")),
    ):
        spec, block = make_set(rows=4, gen_sizes=size, bad=0)
        block.gen[0, 0, 0] = size - 1
        loaded = open_shards(write(tmp_path / str(size), spec, block)).load()
        assert loaded.gen.dtype == dtype and np.array_equal(loaded.gen, block.gen)


@pytest.mark.parametrize("size", [1024, 1 << 18])
def test_size_is_near_the_entropy(tmp_path, size):
    """At most 1.01 x order-0 entropy on Zipf-like ids, at real widths; random ids cannot come out smaller."""
    rng, rows = np.random.default_rng(0), 4096
    weight = 1 / (np.arange(size) + size / 16)
    table = rng.permutation(size)
    spec = ShardSpec(rows, [{"name": "centre"}], (16, 16), size)
    gen = table[rng.choice(size, (rows, 1, 256), p=weight / weight.sum())].astype(spec.dtypes["gen"])
    block = Block(gen, None, np.zeros(rows, np.int32), np.zeros(rows, np.uint8))
    path = tmp_path / "s"
    write_shards(path, spec, [block], make_index(rows))
    share = np.bincount(gen.ravel(), minlength=size) / gen.size
    share = share[share > 0]
    entropy = -(share * np.log2(share)).sum() * gen.size / 8
    stored = (path / "tokens.zarr/gen/c/0/0/0").stat().st_size
    assert 0.99 < stored / entropy < 1.01
    book = summary(path)["codebooks"]["gen"]
    assert book["order0_entropy_bits"] == pytest.approx(8 * entropy / gen.size, abs=1e-4)
    assert book["bytes"] == stored
    assert np.array_equal(open_shards(path).counts["gen"], np.bincount(gen.ravel(), minlength=size))


def test_kill_leaves_no_directory(tmp_path):
    """SIGKILL in the middle of the rows leaves no directory at the target, and the next write succeeds."""
    script = tmp_path / "slow.py"
    script.write_text(
        textwrap.dedent(f"""
        import sys, time
        sys.path.insert(0, {str(ROOT)!r})
        from pathlib import Path
        from tests.token_sets import *
        spec, block = make_set(rows=64)
        def blocks():
            yield from cut(block, 16)[:2]
            if walks.append(0) or len(walks) == 2:
                (Path({str(tmp_path)!r}) / "half").touch()
                time.sleep(60)
            yield from cut(block, 16)[2:]
        walks = []
        write_shards({str(tmp_path / "s")!r}, spec, blocks, make_index(64), chunk_rows=8, shard_rows=16)
        """)
    )
    child = subprocess.Popen([sys.executable, str(script)])
    for _ in range(600):
        if (tmp_path / "half").exists() or child.poll() is not None:
            break
        time.sleep(0.05)
    assert child.poll() is None
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    assert not (tmp_path / "s").exists()
    assert verify_shards(write(tmp_path / "s", *make_set())).ok
