"""The shard format: what is written comes back, checked against plain zarr and numpy."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from semdict.pipeline.common.errors import ShardError
from semdict.pipeline.shards import FILL, Block, ShardSpec, open_shards, verify_shards, write_shards
from tests.token_sets import cut, make_index, make_set, tree, write

ROOT = Path(__file__).resolve().parent.parent


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.integers(1, 70),
    views=st.integers(1, 3),
    grid=st.sampled_from([(1,), (9,), (4, 4)]),
    disc_size=st.sampled_from([None, 1, 300, FILL]),
    bad=st.sampled_from([0.0, 0.3, 1.0]),
    chunk=st.integers(1, 20),
    per_shard=st.integers(1, 4),
    codec=st.sampled_from(["pcodec", "blosc"]),
    varying=st.booleans(),
    seed=st.integers(0, 99),
)
def test_round_trip(tmp_path, rows, views, grid, disc_size, bad, chunk, per_shard, codec, varying, seed):
    """Whatever the shapes, statuses and cuts: the ids that went in come out, lazily and loaded."""
    length = int(np.prod(grid))
    sizes = list(range(2, 2 + length)) if varying else 40
    spec, block = make_set(rows, views, grid, sizes, disc_size, bad, seed)
    path = write(tmp_path / "s", spec, block, chunk_rows=chunk, shard_rows=chunk * per_shard, codec=codec)
    assert verify_shards(path).problems == []
    shards = open_shards(path)
    assert len(shards) == rows and shards.spec == spec
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
        np.array([30, 2, 2]),
        np.arange(50) % 3 == 0,
    ],
    ids=str,
)
def test_lazy_arrays_slice_as_numpy_does(tmp_path, key):
    spec, block = make_set()
    shards = open_shards(write(tmp_path / "s", spec, block))
    for name in ("gen", "disc"):
        found, want = getattr(shards, name)[key], getattr(block, name)[key]
        assert found.dtype == np.uint16 and np.array_equal(found, want)
    assert np.array_equal(np.asarray(shards.label), block.label)


def test_plain_zarr_needs_one_look_up(tmp_path):
    """The five lines of shards/README.md, with zarr alone."""
    import zarr

    spec, block = make_set()
    group = zarr.open_group(write(tmp_path / "s", spec, block) / "tokens.zarr", mode="r")
    for name in ("gen", "disc"):
        assert np.array_equal(group[f"{name}_ids"][:][group[name][:]], getattr(block, name))
        assert group[name].fill_value == FILL
    assert np.array_equal(group["label"][:], block.label)
    stored = group["gen"][:][block.status == 0]
    counts = np.bincount(stored.ravel())
    assert (np.diff(counts) <= 0).all(), "ranks must fall in frequency"
    assert group.attrs["rows"] == spec.rows and group.attrs["format"] == "semdict-token-shards"


def test_bytes_depend_on_rows_only(tmp_path):
    """Another cut into blocks, another number of threads, given counts, another order of keys: the same bytes."""
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
    for size, dtype in ((256, "uint8"), (257, "int16"), (32768, "int16"), (32769, "uint16")):
        spec, block = make_set(rows=4, gen_sizes=size, bad=0)
        block.gen[0, 0, 0] = size - 1
        loaded = open_shards(write(tmp_path / str(size), spec, block)).load()
        assert loaded.gen.dtype == dtype and np.array_equal(loaded.gen, block.gen)


def test_size_is_near_the_entropy(tmp_path):
    """At most 1.01 x order-0 entropy on Zipf-like ids, at real widths; random ids may not come out smaller."""
    rng, rows = np.random.default_rng(0), 4096
    weight = 1 / (np.arange(1024) + 64.0)
    table = rng.permutation(1024).astype(np.uint16)
    gen = table[rng.choice(1024, (rows, 1, 256), p=weight / weight.sum())]
    spec = ShardSpec(rows, [{"name": "centre"}], (16, 16), 1024)
    block = Block(gen, None, np.zeros(rows, np.int32), np.zeros(rows, np.uint8))
    path = tmp_path / "s"
    write_shards(path, spec, [block], make_index(rows))
    share = np.bincount(gen.ravel(), minlength=1024) / gen.size
    entropy = -(share * np.log2(share)).sum() * gen.size / 8
    size = (path / "tokens.zarr/gen/c/0/0/0").stat().st_size
    assert 0.99 < size / entropy < 1.01
    book = open_shards(path)
    from semdict.pipeline.shards.command import summary

    found = summary(path)["codebooks"]["gen"]
    assert found["order0_entropy_bits"] == pytest.approx(8 * entropy / gen.size, abs=1e-4)
    assert found["bytes"] == size and np.array_equal(book.counts["gen"], np.bincount(gen.ravel(), minlength=1024))


def test_kill_leaves_no_directory(tmp_path):
    """SIGKILL in the middle of the rows: nothing at the target; the next write succeeds."""
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
