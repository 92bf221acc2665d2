"""Damage at any byte of a shard directory is noticed and named; checked against coreutils' sha256sum."""

import hashlib
import json
import pickle
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from semdict.cli import main
from semdict.pipeline.common.errors import ShardError
from semdict.pipeline.common.files import is_foreign
from semdict.pipeline.shards import FILL, Block, NotShardsError, ShardSpec, open_shards, verify_shards, write_shards
from semdict.pipeline.shards.checksums import write_sums
from semdict.pipeline.shards.command import summary
from semdict.pipeline.shards.convert import export_tokens
from semdict.pipeline.shards.ids import MAX_CODES
from tests.token_sets import cut, make_index, make_set, tree, write

ROOT = Path(__file__).resolve().parent.parent


def test_every_byte_is_guarded(tmp_path_factory):
    """One flipped bit anywhere: verify fails and names the file. 120 flips."""
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


def test_missing_and_extra_files(tmp_path):
    """Each is reported once; opening refuses a set that lacks a file."""
    spec, block = make_set(rows=64)
    centroids = np.random.default_rng(0).standard_normal((300, 4)).astype(np.float32)
    path = write(tmp_path / "s", spec, block, centroids=centroids)
    for name in ("tokens.zarr/gen/c/1/0/0", "codebooks/centroids.npy", "SHA256SUMS"):
        file, sound = path / name, (path / name).read_bytes()
        file.unlink()
        assert any(name in problem and "missing" in problem for problem in verify_shards(path).problems)
        with pytest.raises(ShardError, match="missing"):
            open_shards(path)
        file.write_bytes(sound)
    (path / "notes.txt").write_text("hello")
    assert verify_shards(path).problems == ["notes.txt: an extra file, not in SHA256SUMS"]


def test_files_of_other_programs_are_ignored(tmp_path):
    """What file browsers leave behind is no damage, is not counted, and is not exported."""
    path = write(tmp_path / "s", *make_set())
    before = verify_shards(path)
    for name in (
        ".DS_Store",
        "codebooks/._gen_counts.npy",
        "tokens.zarr/Thumbs.db",
        "codebooks/desktop.ini",
        "__MACOSX/._s",
    ):
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_bytes(b"x")
    after = verify_shards(path)
    assert after == before and after.ok
    assert len(open_shards(path)) == 50 and summary(path)["bytes"] == before.bytes
    export_tokens(path, tmp_path / "hub", "hf")
    assert not any(is_foreign(Path(name).name) for name in tree(tmp_path / "hub"))


def exchange(first: Path, second: Path) -> None:
    sound = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(sound)


@pytest.mark.parametrize("name", ["gen", "disc"])
@pytest.mark.parametrize("gen_sizes", [40, 1 << 18])
def test_exchanged_shard_files_are_refused_on_opening(tmp_path, name, gen_sizes):
    """Each has sound checksums of its own, so that only SHA256SUMS shows it; verify names both."""
    path = write(tmp_path / "s", *make_set(rows=64, gen_sizes=gen_sizes))
    exchange(path / f"tokens.zarr/{name}/c/0/0/0", path / f"tokens.zarr/{name}/c/1/0/0")
    assert sum("SHA-256 differs" in problem for problem in verify_shards(path).problems) == 2
    with pytest.raises(ShardError, match=f"{name}/c/0/0/0 is not the file that was written: its size or its ends"):
        open_shards(path)


def test_exchanged_shard_files_of_format_1_are_refused_on_loading(tmp_path):
    """Format 1 has no sizes in SHA256SUMS: its shard files are compared whole when they are loaded."""
    path = Path(shutil.copytree(ROOT / "tests/data/shards-v1", tmp_path / "s"))
    exchange(path / "tokens.zarr/disc/c/0/0/0", path / "tokens.zarr/disc/c/1/0/0")
    with pytest.raises(ShardError, match=r"disc/c/[01]/0/0 is not the file that was written: its SHA-256 differs"):
        open_shards(path).load()


@pytest.mark.parametrize(
    "name", ["codebooks/centroids.npy", "codebooks/neighbour_weights.npy", "index.parquet", "tokens.zarr/label/c/0"]
)
def test_one_bit_is_noticed_on_opening(tmp_path, name):
    """Codebooks, index and labels are compared whole, for they shape training."""
    centroids = np.random.default_rng(0).standard_normal((300, 4)).astype(np.float32)
    path = write(tmp_path / "s", *make_set(), centroids=centroids)
    data = bytearray((path / name).read_bytes())
    data[len(data) // 2] ^= 1
    (path / name).write_bytes(data)
    with pytest.raises(ShardError, match=f"{name} is not the file that was written"):
        open_shards(path)


def test_other_centroids_of_the_same_shape_are_refused(tmp_path):
    rng = np.random.default_rng(0)
    centroids, others = (rng.standard_normal((300, 4)).astype(np.float32) for _ in range(2))
    path = write(tmp_path / "s", *make_set(), centroids=centroids)
    np.save(path / "codebooks/centroids.npy", others)
    with pytest.raises(ShardError, match=r"centroids\.npy is not the file that was written"):
        open_shards(path)


def test_content_digest_names_the_content(tmp_path):
    """Equal rows give equal digests; one other token under the same recipe gives another."""
    spec, block = make_set(bad=0)
    first = open_shards(write(tmp_path / "a", spec, block)).content_sha256
    assert first == open_shards(write(tmp_path / "b", spec, block)).content_sha256
    assert first == hashlib.sha256((tmp_path / "a/SHA256SUMS").read_bytes()).hexdigest()
    block.gen[3, 0, 2] = (block.gen[3, 0, 2] + 1) % 40
    assert first != open_shards(write(tmp_path / "c", spec, block)).content_sha256


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
    """Files that contradict each other are noticed even if SHA256SUMS was renewed after tampering."""
    import zarr

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
    for sizes in (0, MAX_CODES + 1, [3, 4]):
        with pytest.raises(ShardError):
            ShardSpec(30, [{}], (4, 4), sizes)


def test_tokens_of_bad_rows_are_never_stored(tmp_path):
    """Rows with a status may hold any number, even beyond the codebook: the filler is stored."""
    spec, block = make_set(rows=20, bad=0.5)
    left = Block(block.gen.copy(), block.disc.copy(), block.label, block.status)
    left.gen[block.status != 0] = 777
    path = write(tmp_path / "s", spec, left)
    assert np.array_equal(open_shards(path).gen[:], block.gen) and verify_shards(path).ok


def test_shards_of_one_id_are_stored(tmp_path):
    """A chunk of rank 0 only, or of fillers only, is written and not left out as an empty chunk."""
    spec, block = make_set(rows=48, bad=0)
    block.gen[:] = 5
    block.status[16:32] = 1
    path = write(tmp_path / "s", spec, block)
    assert len(list((path / "tokens.zarr/gen/c").rglob("0"))) >= 3 and verify_shards(path).ok
    assert (open_shards(path).gen[:16] == 5).all() and (open_shards(path).gen[16:32] == FILL).all()


@pytest.mark.parametrize(
    "change",
    [
        {"codebooks": {"gen": {"size": 0, "sizes": None}}},
        {"codebooks": {"gen": {"size": 40, "sizes": None}, "disc": {"size": 0, "sizes": None}}},
        {"codebooks": {"gen": {"size": 1 << 40, "sizes": None}}},
        {"codebooks": {}},
        {"grid": [0, 4]},
        {"grid": "16"},
        {"rows": -1},
        {"grid": [1 << 40, 1 << 40]},
        {"chunk_rows": 0},
        {"rows": 1 << 60},
        {"views": 3},
    ],
)
def test_crafted_attributes_are_a_sentence(tmp_path, change, capsys):
    """Sizes of nothing, and values of another type: exit 1 with the file named, no traceback."""
    path = write(tmp_path / "s", *make_set())
    group = path / "tokens.zarr/zarr.json"
    content = json.loads(group.read_text())
    content["attributes"] |= change
    group.write_text(json.dumps(content))
    with pytest.raises(ShardError):
        open_shards(path)
    assert main(["shards", "info", str(path)]) == 1
    assert "Traceback" not in capsys.readouterr().err
    assert main(["shards", "verify", str(path)]) == 1
    assert "tokens.zarr/zarr.json" in capsys.readouterr().out


def test_incomplete_bitmap_is_refused(tmp_path):
    import zarr

    path = write(tmp_path / "s", *make_set())
    zarr.open_group(path / "tokens.zarr", mode="r+")["complete"][3] = 0
    with pytest.raises(ShardError, match="chunk 3 of 7 is not marked as written"):
        open_shards(path)


def test_what_is_not_a_shard_directory(tmp_path, capsys):
    """Exit 0 if sound, 1 if damaged, 2 for anything else and for a newer format."""
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
    group.write_text(sound.replace('"version": 2', '"version": 3'))
    with pytest.raises(NotShardsError, match="version 3"):
        open_shards(path)
    write_sums(path)
    assert main(["shards", "verify", str(path)]) == 2
    assert "install a newer one" in capsys.readouterr().err


class Trap:
    """An object whose pickle makes a file when it is loaded."""

    def __init__(self, path: str):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


def test_a_set_forged_as_zarr_2_with_pickled_chunks_is_refused_before_a_chunk_is_read(tmp_path):
    """Arrays of zarr 2 may name numcodecs's pickle codec, which runs code; the group's format is checked first."""
    spec, block = make_set(rows=8)
    path = write(tmp_path / "s", spec, block)
    group = path / "tokens.zarr"
    meta = json.loads((group / "zarr.json").read_bytes())
    (group / "zarr.json").write_text(json.dumps(meta | {"zarr_format": 2}))
    (group / ".zgroup").write_text(json.dumps({"zarr_format": 2}))
    (group / ".zattrs").write_text(json.dumps(meta["attributes"]))
    shutil.rmtree(group / "gen")
    (group / "gen").mkdir()
    array = {"zarr_format": 2, "shape": [8], "chunks": [8], "dtype": "|O", "order": "C", "fill_value": None}
    (group / "gen" / ".zarray").write_text(json.dumps({**array, "compressor": None, "filters": [{"id": "pickle"}]}))
    (group / "gen" / "0").write_bytes(pickle.dumps(Trap(str(tmp_path / "ran"))))
    for read in (open_shards, lambda folder: open_shards(folder).gen[:], verify_shards):
        try:
            result = read(path)
        except ShardError as error:
            assert "zarr_format 2" in str(error) and "zarr.json" in str(error)
        else:
            assert read is verify_shards and not result.ok
    assert not (tmp_path / "ran").exists()
