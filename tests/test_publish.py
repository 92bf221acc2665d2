"""Publishing: nothing that is not an earlier output of the same kind is ever replaced, links are followed."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from semdict.pipeline.common import publish
from semdict.pipeline.common.errors import BusyError, SemdictError, UsageError
from semdict.pipeline.common.files import atomic_write, hold_lock, is_foreign
from semdict.pipeline.common.publish import check_output, occupied, publish_folder, publish_staged
from semdict.pipeline.shards import verify_shards
from tests import tiny

# Every command that publishes a folder, and what it needs besides --out. The output is checked before models are read.
FOLDER_COMMANDS = {
    "sample-features": ["sample-features", "--out"],
    "sample-features, not needed": ["sample-features", "--set", "kmeans.centroids=x.npy", "--set",
                                    "inputs.centroids=x.npy", "--out"],
    "encode": ["encode", "--out"],
    "vcq encode": ["vcq", "encode", "--tokenizer", "runs/tiny/vcq", "--out"],
    "ar sample": ["ar", "sample", "--out"],
    "generate": ["generate", "--model", "model.pt", "--out"],
    "reference": ["evaluate", "reference", "--split", "train", "--out"],
    "pretrain": ["pretrain", "--objective", "mage", "--set", "pretrain.size=tiny", "--out"],
    "import": ["shards", "import", "tokens.pt", "--overwrite"],
    "export webdataset": ["shards", "export", "shards/tiny", "--to", "webdataset", "--overwrite"],
    "export hf": ["shards", "export", "shards/tiny", "--to", "hf", "--overwrite"],
}  # fmt: skip
FILE_COMMANDS = {
    "manifest": ["manifest", "--out"],
    "kmeans": ["kmeans", "--out"],
    "export pt": ["shards", "export", "shards/tiny", "--to", "pt", "--overwrite"],
    "report": ["report", "--out"],
    "fid": ["evaluate", "fid", "--samples", "samples", "--out"],
}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A tiny world up to its shards, and the shards as the authors' .pt."""
    root = tmp_path_factory.mktemp("world")
    tiny.make_world(root)
    tiny.run_until_centroids(root)
    assert tiny.semdict(root, "encode") == 0
    assert tiny.semdict(root, "shards", "export", "shards/tiny", "tokens.pt", "--to", "pt") == 0
    return root


def thesis(folder: Path) -> Path:
    """A user's folder with one file."""
    (folder / "chapters").mkdir(parents=True)
    (folder / "thesis.txt").write_text("x")
    return folder


@pytest.mark.parametrize("command", FOLDER_COMMANDS)
def test_a_users_folder_is_refused_and_left_alone(world, tmp_path, command, capsys):
    mine = thesis(tmp_path / "mine")
    assert tiny.semdict(world, *FOLDER_COMMANDS[command], str(mine)) == 2
    error = capsys.readouterr().err
    assert str(mine) in error
    assert "name another" in error or "Give another" in error or "give another" in error
    assert sorted(p.name for p in mine.iterdir()) == ["chapters", "thesis.txt"]
    assert [p.name for p in tmp_path.iterdir()] == ["mine"], "no lock and no temporary folder is left"


@pytest.mark.parametrize("command", FOLDER_COMMANDS)
def test_the_current_folder_is_refused(world, command, capsys):
    before = sorted(p.name for p in world.iterdir())
    assert tiny.semdict(world, *FOLDER_COMMANDS[command], ".") == 2
    assert "current folder" in capsys.readouterr().err
    assert tiny.semdict(world, *FOLDER_COMMANDS[command], "..") == 2
    assert sorted(p.name for p in world.iterdir()) == before


@pytest.mark.parametrize("command", FOLDER_COMMANDS)
def test_an_output_of_another_kind_is_refused(world, command, capsys):
    """Shards, or features where the command writes shards."""
    other = "data/tiny/features.zarr" if command in ("encode", "vcq encode", "import") else "shards/tiny"
    before = tiny.digest(world / other)
    assert tiny.semdict(world, *FOLDER_COMMANDS[command], other) == 2
    assert other in capsys.readouterr().err
    assert tiny.digest(world / other) == before


@pytest.mark.parametrize("command", FILE_COMMANDS)
def test_a_users_file_is_refused_and_left_alone(world, tmp_path, command, capsys):
    mine = thesis(tmp_path / "mine") / "thesis.txt"
    assert tiny.semdict(world, *FILE_COMMANDS[command], str(mine)) == 2
    assert f"{mine} exists and is not" in capsys.readouterr().err
    assert mine.read_text() == "x"
    assert tiny.semdict(world, *FILE_COMMANDS[command], str(mine.parent)) == 2
    assert "is a folder" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["encode", "sample-features", "manifest", "kmeans", "report"])
def test_an_output_of_the_same_kind_is_replaced(world, tmp_path, command):
    arguments = {**FOLDER_COMMANDS, **FILE_COMMANDS}[command]
    out = tmp_path / "out"
    for _ in range(2):
        assert tiny.semdict(world, *arguments, str(out)) == 0
    written = {p.name for p in tmp_path.iterdir()}
    assert written == ({"out", "out.sha256"} if command == "kmeans" else {"out"})


@pytest.mark.parametrize("command", ["encode", "import", "export webdataset", "export hf"])
def test_a_linked_output_stays_a_link(world, tmp_path, command):
    arguments = FOLDER_COMMANDS[command]
    disk, link = tmp_path / "disk", tmp_path / "link"
    link.symlink_to(disk / "tokens", target_is_directory=True)  # leads to nothing yet
    for _ in range(2):
        assert tiny.semdict(world, *arguments, str(link)) == 0
        assert link.is_symlink()
        assert [p.name for p in disk.iterdir()] == ["tokens"]
    assert not (disk / "tokens").is_symlink()
    if command in ("encode", "import"):
        assert verify_shards(link).ok


def test_a_linked_file_stays_a_link(world, tmp_path):
    (tmp_path / "disk").mkdir()
    link = tmp_path / "centroids.npy"
    link.symlink_to(tmp_path / "disk" / "centroids.npy")
    for _ in range(2):
        assert tiny.semdict(world, "kmeans", "--out", str(link)) == 0
    assert link.is_symlink()
    assert np.load(link).shape == (tiny.WORDS, 24)


def make(folder: Path, text: str = "new") -> None:
    """What stands in for generated images in the tests below."""
    (folder / "generate.json").write_text(json.dumps({"fingerprint": text}))


def test_an_empty_folder_counts_as_nothing(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / ".DS_Store").touch()
    assert not occupied(out)
    with publish_folder(out, "generated") as folder:
        make(folder)
    assert [p.name for p in out.iterdir()] == ["generate.json"]


def test_an_error_leaves_the_old_output_and_no_rest(tmp_path):
    out = tmp_path / "out"
    with publish_folder(out, "generated") as folder:
        make(folder, "old")
    with pytest.raises(RuntimeError), publish_folder(out, "generated") as folder:
        make(folder)
        raise RuntimeError
    assert json.loads((out / "generate.json").read_text()) == {"fingerprint": "old"}
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_what_a_user_puts_there_meanwhile_is_kept(tmp_path):
    with pytest.raises(UsageError, match="thesis"), publish_folder(tmp_path / "out", "generated") as folder:
        make(folder)
        thesis(tmp_path / "out")
    assert (tmp_path / "out" / "thesis.txt").exists()


def test_leftovers_of_killed_runs_are_removed_and_never_published(tmp_path):
    """A run is killed while it writes; files that only look alike stay."""
    script = (
        "import sys, time; from pathlib import Path\nfrom semdict.pipeline.common.publish import publish_folder\n"
        f"with publish_folder(Path({str(tmp_path / 'out')!r}), 'generated') as folder:\n"
        "    (folder / 'half').write_text('x'); print('up', flush=True); time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout.readline() == "up\n"
        with pytest.raises(BusyError, match=f'"pid": {child.pid}'), publish_folder(tmp_path / "out", "generated"):
            pass
        child.send_signal(signal.SIGKILL)
        child.wait()
    (tmp_path / "out.77.old.part").mkdir()
    keep = {"out.part", "out.x.part", "other.77.part", "out.77.part.txt"}
    for name in keep:
        (tmp_path / name).touch()
    assert len(list(tmp_path.iterdir())) == 7, "a leftover folder, a lock, and the files above"
    with publish_folder(tmp_path / "out", "generated") as folder:
        make(folder)
    assert {p.name for p in tmp_path.iterdir()} == {"out", *keep}
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["generate.json"]


def test_the_temporary_file_of_a_killed_writer_is_removed_by_the_next(tmp_path):
    """That of a writer that still runs stays, and so do files of other names."""
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        ended.wait()
    stale, running, other = (
        tmp_path / f"{name}.{pid}.part"
        for name, pid in (("a.json", ended.pid), ("a.json", os.getppid()), ("b.json", ended.pid))
    )
    for path in (stale, running, other):
        path.touch()
    for _ in range(2):
        with atomic_write(tmp_path / "a.json") as path:
            path.write_text("{}")
    assert {p.name for p in tmp_path.iterdir()} == {"a.json", running.name, other.name}


def test_a_staged_folder_is_published_without_leftovers(tmp_path):
    staged = tmp_path / "work" / "run-0123"
    (staged / "deep" / "y.99.old.part").mkdir(parents=True)
    (staged / "deep" / "x.json.99.part").touch()
    (staged / "run.json").write_text('{"fingerprint": "0123"}')
    publish_staged(staged, tmp_path / "runs" / "lease", "run")
    assert {p.name for p in (tmp_path / "runs").rglob("*")} == {"lease", "deep", "run.json"}
    assert not staged.exists()


def test_a_staged_folder_on_another_disk_is_copied(tmp_path, monkeypatch):
    """/dev/shm is another file system than the temporary folder nearly everywhere; else rename fails as it would."""
    staged = tmp_path / "work"
    staged.mkdir()
    (staged / "run.json").write_text('{"fingerprint": "0123"}')
    (staged / "model.pt").write_bytes(b"x" * 1000)
    before = tiny.digest(staged)
    real = Path.replace

    def replace(self, target):
        if self.parent != Path(target).parent:
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        return real(self, target)

    monkeypatch.setattr(Path, "replace", replace)
    out = tmp_path / "disk" / "out"
    publish_staged(staged, out, "run")
    assert tiny.digest(out) == before
    assert [p.name for p in out.parent.iterdir()] == ["out"]
    assert not staged.exists()


@pytest.mark.parametrize("command", ["encode", "sample-features"])
def test_work_and_output_may_be_on_different_disks(world, tmp_path, command):
    shm = Path("/dev/shm")
    if not shm.is_dir() or shm.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("no second file system here")
    work = shm / f"semdict-test-{os.getpid()}"
    try:
        assert tiny.semdict(world, command, "--work", str(work), "--out", str(tmp_path / "out")) == 0
    finally:
        publish.remove(work)
    assert (tmp_path / "out").is_dir()


def test_places_that_cannot_be_replaced_are_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for path, words in {
        tmp_path / "file" / "out": "is a file, not a folder",
        tmp_path / "file": "is a file, the output is a folder",
        tmp_path / "loop": "leads back to itself",
        Path("/"): "current folder or one around it",
        Path("/proc"): "mount point",
    }.items():
        with pytest.raises(UsageError, match=words):
            check_output(path, "run")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_parent_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(UsageError, match="cannot be written"):
        check_output(tmp_path / "locked" / "out", "run")


def test_a_lock_is_released_and_its_file_removed(tmp_path):
    path = tmp_path / "a.lock"
    with hold_lock(path, "encode"):
        assert json.loads(path.read_text())["pid"] == os.getpid()
        with pytest.raises(BusyError, match=rf"encode is already running.*{os.getpid()}"), hold_lock(path, "encode"):
            pass
    assert not path.exists()


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch, capsys):
    import fcntl

    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with hold_lock(tmp_path / "a.lock", "encode"):
        pass
    assert "No locks available" in capsys.readouterr().err


def test_files_of_other_programs_are_known():
    assert all(map(is_foreign, (".DS_Store", "._image.png", "Thumbs.db", ".nfs0001", "@eaDir")))
    assert not any(map(is_foreign, ("image.png", "DS_Store", ".hidden", "thumbs", "a._b")))


def test_a_link_is_followed_by_atomic_write(tmp_path):
    link, target = tmp_path / "link", tmp_path / "disk" / "a.txt"
    link.symlink_to(target)
    with atomic_write(link) as path:
        path.write_text("x")
    assert link.is_symlink() and target.read_text() == "x"


@pytest.mark.parametrize("kind", ["numpy", "torch", "torch by path"])
def test_a_full_disk_is_named(tmp_path, kind):
    """/dev/full answers every write as a full disk does."""
    out = tmp_path / "model.pt"
    (tmp_path / f"model.pt.{os.getpid()}.part").symlink_to("/dev/full")
    with (
        pytest.raises(SemdictError, match=r"model\.pt cannot be written: no space left on its disk.*make room"),
        pytest.MonkeyPatch.context() as patch,
        atomic_write(out) as path,
    ):
        if kind == "torch by path":  # torch hides the reason then: the free space decides
            patch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
            torch.save({"a": torch.zeros(10**6)}, path)
        with path.open("wb") as file:
            np.save(file, np.zeros(10**6)) if kind == "numpy" else torch.save({"a": torch.zeros(10**6)}, file)
    assert not list(tmp_path.iterdir())
    with pytest.raises(SemdictError, match=r"out cannot be written"), publish_folder(tmp_path / "out", "run") as folder:
        (folder / "a.npy").symlink_to("/dev/full")
        with (folder / "a.npy").open("wb") as file:
            np.save(file, np.zeros(10**6))
    assert not list(tmp_path.iterdir())


def test_other_errors_are_not_taken_for_a_full_disk(tmp_path):
    with pytest.raises(RuntimeError, match="mine"), atomic_write(tmp_path / "a"):
        raise RuntimeError("mine")
    with pytest.raises(PermissionError), atomic_write(tmp_path / "a"):
        raise PermissionError(13, "Permission denied")


def test_tensors_are_recognised(tmp_path):
    torch.save({"a": torch.zeros(1)}, tmp_path / "a.pt")
    assert check_output(tmp_path / "a.pt", "tensors") == (tmp_path / "a.pt").resolve()
