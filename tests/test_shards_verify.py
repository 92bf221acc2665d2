"""Damage at any byte of a shard directory is found and named; checked against coreutils' sha256sum."""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from semdict.cli import main
from semdict.pipeline.common.errors import ShardError
from semdict.pipeline.shards import FILL, Block, NotShardsError, ShardSpec, open_shards, verify_shards, write_shards
from tests.token_sets import cut, make_index, make_set, tree, write

ROOT = Path(__file__).resolve().parent.parent


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

    from semdict.pipeline.shards.writer import write_sums

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
    from semdict.pipeline.shards.writer import write_sums

    write_sums(path)
    assert main(["shards", "verify", str(path)]) == 2
    assert "install a newer one" in capsys.readouterr().err
