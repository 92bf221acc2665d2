"""The shard format, checked against plain zarr, coreutils' sha256sum and damage at any byte."""

import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.errors import ShardError
from pipeline.shards import FILL, Block, NotShardsError, ShardSpec, open_shards, verify_shards, write_shards
from semdict.cli import main

ROOT = Path(__file__).resolve().parent.parent


def make_index(rows: int, split=lambda row: "train") -> pa.Table:
    return pa.table(
        {
            "key": [f"image-{row}" for row in range(rows)],
            "split": [split(row) for row in range(rows)],
            "label_name": [""] * rows,
            "reason": [""] * rows,
        }
    )


def make_set(rows=50, views=1, grid=(4, 4), gen_sizes=40, disc_size=300, bad=0.1, seed=0):
    """A spec, its whole block with bad rows filled, and nothing written yet."""
    rng = np.random.default_rng(seed)
    spec = ShardSpec(
        rows, [{"name": f"v{v}"} for v in range(views)], grid, gen_sizes, disc_size, recipe={"z": 1, "a": 2}
    )
    shape = (rows, views, spec.length)
    status = (rng.random(rows) < bad).astype(np.uint8) * 3
    gen = (rng.random(shape) ** 2 * spec.sizes["gen"]).astype(np.uint16)
    disc = None if disc_size is None else rng.integers(0, disc_size, shape).astype(np.uint16)
    for ids in (gen, disc):
        if ids is not None:
            ids[status != 0] = FILL
    return spec, Block(gen, disc, rng.integers(-1, 5, rows).astype(np.int32), status)


def cut(block: Block, *sizes: int) -> list[Block]:
    """The block in pieces of the given sizes, in a cycle."""
    pieces, start, at = [], 0, 0
    while start < len(block.label):
        part = slice(start, start + sizes[at % len(sizes)])
        disc = None if block.disc is None else block.disc[part]
        pieces.append(Block(block.gen[part], disc, block.label[part], block.status[part]))
        start, at = part.stop, at + 1
    return pieces


def write(path: Path, spec: ShardSpec, block: Block, **options) -> Path:
    options = {"chunk_rows": 8, "shard_rows": 16} | options
    write_shards(path, spec, cut(block, 7, 13), make_index(spec.rows), **options)
    return path


def tree(path: Path) -> dict[str, bytes]:
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in path.rglob("*") if file.is_file()}


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


def test_every_byte_is_guarded(tmp_path_factory):
    """Flip one bit anywhere: verify fails and names the file. 120 flips."""
    folder = tmp_path_factory.mktemp("guard")
    spec, block = make_set(rows=40)
    centroids = np.random.default_rng(0).standard_normal((300, 4)).astype(np.float32)
    path = write(folder / "s", spec, block, centroids=centroids)
    files = sorted(tree(path))
    assert verify_shards(path).ok

    @settings(max_examples=120, deadline=None)
    @given(st.sampled_from(files), st.floats(0, 1, exclude_max=True), st.integers(0, 7))
    def flip(name, where, bit):
        file = path / name
        sound = file.read_bytes()
        offset = int(where * len(sound))
        damaged = bytearray(sound)
        damaged[offset] ^= 1 << bit
        file.write_bytes(damaged)
        try:
            report = verify_shards(path)
            assert any(problem.startswith(f"{name}:") for problem in report.problems), (name, offset, report.problems)
        finally:
            file.write_bytes(sound)

    flip()
    assert verify_shards(path).ok


def test_damage_names_array_and_chunk(tmp_path):
    """A flip in the third chunk of the second shard of `disc` is reported as that chunk, by its own checksum."""
    spec, block = make_set(rows=64)
    path = write(tmp_path / "s", spec, block, chunk_rows=8, shard_rows=32)
    file = path / "tokens.zarr/disc/c/1/0/0"
    data = bytearray(file.read_bytes())
    index = np.frombuffer(bytes(data[-(16 * 4 + 4) : -4]), "<u8").reshape(4, 2)
    data[int(index[2].sum() - index[2, 1] // 2)] ^= 1
    file.write_bytes(data)
    problems = verify_shards(path).problems
    assert any("disc: chunk 6 (rows 48-55)" in problem for problem in problems), problems
    assert not any(f"chunk {n} " in problem for problem in problems for n in (4, 5, 7))
    with pytest.raises(ShardError, match="disc"):
        open_shards(path).disc[50]
    with pytest.raises(ShardError, match="disc"):
        open_shards(path).load()
    assert np.array_equal(open_shards(path).disc[32:40], block.disc[32:40])


@pytest.mark.parametrize("size", [0, 10, -1])
def test_truncated_and_grown_files(tmp_path, size):
    spec, block = make_set()
    path = write(tmp_path / "s", spec, block)
    file = path / "tokens.zarr/gen/c/0/0/0"
    data = file.read_bytes()
    file.write_bytes(data + b"x" if size < 0 else data[:size])
    assert any(problem.startswith("tokens.zarr/gen/c/0/0/0:") for problem in verify_shards(path).problems)


def test_missing_extra_and_swapped_files(tmp_path):
    """Swapped shards have sound checksums of their own; only the directory's sums can tell."""
    spec, block = make_set(rows=64)
    path = write(tmp_path / "s", spec, block)
    first, second = path / "tokens.zarr/gen/c/0/0/0", path / "tokens.zarr/gen/c/1/0/0"
    sound = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(sound)
    assert sum("SHA-256 differs" in problem for problem in verify_shards(path).problems) == 2
    second.unlink()
    assert "tokens.zarr/gen/c/1/0/0: the file is missing" in verify_shards(path).problems
    with pytest.raises(ShardError, match="incomplete"):
        open_shards(path)
    shutil.rmtree(path)
    write(path, spec, block)
    (path / "notes.txt").write_text("hello")
    assert any(problem.startswith("notes.txt: an extra file") for problem in verify_shards(path).problems)


def test_sums_are_those_of_coreutils(tmp_path):
    if shutil.which("sha256sum") is None:
        pytest.skip("no sha256sum on this machine")
    path = write(tmp_path / "s", *make_set())
    done = subprocess.run(
        ["sha256sum", "-c", "--strict", "SHA256SUMS"], cwd=path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == len(tree(path)) - 1


def test_whole_but_wrong_content_is_found(tmp_path):
    """Files whose checksums were renewed after tampering still contradict each other."""
    import zarr

    from pipeline.shards_write import write_sums

    spec, block = make_set(rows=32, gen_sizes=[4] * 8 + [40] * 8)
    path = write(tmp_path / "s", spec, block)
    stored = zarr.open_group(path / "tokens.zarr", mode="r+")["gen"]
    sound, table = stored[0:8], zarr.open_group(path / "tokens.zarr", mode="r")["gen_ids"][:]
    good = int(np.flatnonzero(block.status[:8] == 0)[0])
    for value, text in (
        (FILL, "has no token"),
        (41, "has no token"),
        (int(np.flatnonzero(table == 39)[0]), "outside its codebook"),
    ):
        changed = sound.copy()
        changed[good, 0, 3] = value
        stored[0:8] = changed
        write_sums(path)
        problems = verify_shards(path).problems
        assert any("gen: chunk 0" in p and f"row {good}, view 0, position 3" in p and text in p for p in problems), (
            problems
        )
    changed = sound.copy()
    changed[good, 0, 3] = (changed[good, 0, 3] == 0) * 1
    stored[0:8] = changed
    write_sums(path)
    assert verify_shards(path).problems in ([], ["gen: the tokens are not those counted in codebooks/gen_counts.npy"])


def test_wrong_ids_are_refused_by_row_and_position(tmp_path):
    spec, block = make_set(rows=30, gen_sizes=[2] * 15 + [40])
    block.status[:] = 0
    block.gen[:] = 0
    block.disc[:] = 0
    block.gen[21, 0, 15] = 39
    write(tmp_path / "fine", spec, block)
    block.gen[21, 0, 7] = 2
    with pytest.raises(ShardError, match=r"gen: row 21, view 0, position 7 holds id 2.* has 2 entries"):
        write(tmp_path / "s", spec, block)
    block.gen[21, 0, 7], block.disc[3, 0, 1] = 0, 300
    with pytest.raises(ShardError, match=r"disc: row 3, view 0, position 1 holds id 300"):
        write(tmp_path / "s", spec, block)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["fine"]


def test_wrong_input_is_refused(tmp_path):
    spec, block = make_set(rows=30)
    with pytest.raises(ShardError, match="hold 23 rows"):
        write_shards(tmp_path / "s", spec, cut(block, 7)[:-1][:4][:3] + cut(block, 2)[:1], make_index(30))
    with pytest.raises(ShardError, match="walked once"):
        write_shards(tmp_path / "s", spec, iter(cut(block, 7)), make_index(30))
    with pytest.raises(ShardError, match="index has 29 rows"):
        write_shards(tmp_path / "s", spec, [block], make_index(29))
    with pytest.raises(ShardError, match="lacks the columns"):
        write_shards(tmp_path / "s", spec, [block], make_index(30).drop(["split"]))
    with pytest.raises(ShardError, match="expected uint16"):
        bad = Block(block.gen.astype(np.int32), block.disc, block.label, block.status)
        write_shards(tmp_path / "s", spec, [bad], make_index(30))
    counts = np.bincount(block.gen[block.status == 0].ravel(), minlength=40)
    with pytest.raises(ShardError, match="not the counts"):
        write_shards(
            tmp_path / "s", spec, [block], make_index(30), gen_counts=counts[::-1], disc_counts=np.ones(300, np.int64)
        )
    with pytest.raises(ShardError, match="centroids"):
        write_shards(tmp_path / "s", spec, [block], make_index(30), np.ones((299, 4), np.float32))
    with pytest.raises(ShardError, match="multiple"):
        write_shards(tmp_path / "s", spec, [block], make_index(30), chunk_rows=8, shard_rows=20)
    with pytest.raises(ShardError, match="codec"):
        write_shards(tmp_path / "s", spec, [block], make_index(30), codec="gzip")
    assert list(tmp_path.iterdir()) == []
    for sizes in (0, FILL + 1, [3, 4]):
        with pytest.raises(ShardError):
            ShardSpec(30, [{}], (4, 4), sizes)


def test_tokens_of_bad_rows_are_never_stored(tmp_path):
    """An encoder may leave anything there, even ids that are out of range."""
    spec, block = make_set(rows=20, bad=0.5)
    left = Block(block.gen.copy(), block.disc.copy(), block.label, block.status)
    left.gen[block.status != 0] = 777
    path = write(tmp_path / "s", spec, left)
    assert np.array_equal(open_shards(path).gen[:], block.gen) and verify_shards(path).ok


def test_shards_of_one_id_are_stored(tmp_path):
    """Rank 0 everywhere must not be taken for an empty chunk, nor must 65535 everywhere."""
    spec, block = make_set(rows=48, bad=0)
    block.gen[:] = 5
    block.status[16:32] = 1
    path = write(tmp_path / "s", spec, block)
    assert len(list((path / "tokens.zarr/gen/c").rglob("0"))) >= 3 and verify_shards(path).ok
    assert (open_shards(path).gen[:16] == 5).all() and (open_shards(path).gen[16:32] == FILL).all()


def test_incomplete_bitmap_is_refused(tmp_path):
    import zarr

    path = write(tmp_path / "s", *make_set())
    zarr.open_group(path / "tokens.zarr", mode="r+")["complete"][3] = 0
    with pytest.raises(ShardError, match="chunk 3 of 7 is not marked as written"):
        open_shards(path)


def test_what_is_not_a_shard_directory(tmp_path, capsys):
    """Exit 2 for another thing or a newer format, 1 for damage, 0 for sound."""
    path = write(tmp_path / "s", *make_set())
    assert main(["shards", "verify", str(path)]) == 0
    for other in (tmp_path / "none", tmp_path, path / "index.parquet"):
        assert main(["shards", "verify", str(other)]) == 2
        assert "is not a token shard directory" in capsys.readouterr().err
        assert main(["shards", "info", str(other)]) == 2
    group = path / "tokens.zarr/zarr.json"
    sound = group.read_text()
    group.write_text(sound.replace('"semdict-token-shards"', '"something else"'))
    assert main(["shards", "verify", str(path)]) == 1
    assert "tokens.zarr/zarr.json" in capsys.readouterr().out
    group.write_text(sound.replace('"version": 1', '"version": 2'))
    with pytest.raises(NotShardsError, match="version 2"):
        open_shards(path)
    from pipeline.shards_write import write_sums

    write_sums(path)
    assert main(["shards", "verify", str(path)]) == 2
    assert "install a newer one" in capsys.readouterr().err


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
    from pipeline.shards_cli import summary

    found = summary(path)["codebooks"]["gen"]
    assert found["order0_entropy_bits"] == pytest.approx(8 * entropy / gen.size, abs=1e-4)
    assert found["bytes"] == size and np.array_equal(book.counts["gen"], np.bincount(gen.ravel(), minlength=1024))


def test_neighbours_are_those_of_brute_force(tmp_path):
    rng = np.random.default_rng(0)
    centroids = rng.standard_normal((300, 8)) * rng.uniform(0.1, 9, (300, 1))
    shards = open_shards(write(tmp_path / "s", *make_set(), centroids=centroids.astype(np.float32)))
    unit = centroids / np.linalg.norm(centroids, axis=1, keepdims=True)
    cosine = unit @ unit.T
    want = np.argsort(-cosine, axis=1)[:, :6]
    ids, weights = shards.neighbours
    assert np.array_equal(ids, want) and np.array_equal(ids[:, 0], np.arange(300))
    near = np.exp(np.take_along_axis(cosine, want, 1) / 0.1)
    assert np.allclose(weights, near / near.sum(axis=1, keepdims=True), atol=1e-5)
    assert np.array_equal(shards.centroids, centroids.astype(np.float32))


def test_duplicate_centroids_keep_self_first():
    from pipeline.neighbours import neighbour_table

    centroids = np.repeat(np.eye(4, dtype=np.float32), 3, axis=0)
    ids, weights = neighbour_table(centroids, rows=5)
    assert np.array_equal(ids[:, 0], np.arange(12)) and np.allclose(weights.sum(axis=1), 1)
    assert ids[4].tolist()[:3] == [4, 3, 5]


@pytest.mark.golden
def test_neighbours_equal_the_published_code(golden):
    from pipeline.neighbours import neighbour_table

    want = np.load(golden / "lease_neighbours.npz")
    ids, weights = neighbour_table(np.load(golden / "lease_dictionary_raw.npy"))
    assert np.array_equal(ids, want["neighbour_idx"])
    assert np.abs(weights - want["neighbour_weights"]).max() < 5e-6


def test_kill_leaves_no_directory(tmp_path):
    """SIGKILL in the middle of the rows: nothing at the target; the next write succeeds."""
    script = tmp_path / "slow.py"
    script.write_text(
        textwrap.dedent(f"""
        import sys, time
        sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
        from pathlib import Path
        from test_shards import *
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
