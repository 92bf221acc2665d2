"""Runs one `semdict ...` in a forked process, and kills it at the file event that is asked for.

The parent has imported everything, so a case costs only its own work. A file event is one of: a file opened for
writing, a folder made, a rename, a removal, an fsync. Python reports them by audit events, before they happen.
"""

import contextlib
import importlib
import os
import pkgutil
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

EVENTS = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate"}
ADDRESS_SPACE = 24 << 30  # a child that asks for more gets a MemoryError instead of the machine's memory
RENAME = "r"
CPU_SECONDS = 20  # a run that takes more is killed, and counted as one without end
WALL_SECONDS = 200.0  # the same for one that waits
TAIL = 20_000  # characters kept of each stream


@dataclass(frozen=True)
class Outcome:
    """How a run ended. status: exit status, negative for a signal; peak: bytes of resident memory at most.

    events: one letter per file event, RENAME where a file was to be renamed.
    """

    status: int
    out: str
    err: str
    seconds: float
    peak: int
    events: str

    @property
    def lines(self) -> list[str]:
        """The error message: the lines of stderr from the last that begins with the command's name."""
        lines = [line for line in self.err.replace("\r", "\n").split("\n") if line.strip()]
        starts = [at for at, line in enumerate(lines) if line.startswith("semdict")]
        return lines[starts[-1] :] if starts else lines


def import_everything() -> None:
    """Import every module of the package and the libraries that commands import late."""
    import semdict

    for module in pkgutil.walk_packages(semdict.__path__, "semdict."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    for base in ("pipeline", "train"):
        package = importlib.import_module(f"semdict.{base}")
        for module in pkgutil.walk_packages(package.__path__, f"semdict.{base}."):
            importlib.import_module(module.name)
    for name in ("zarr", "zarr.codecs.numcodecs", "pcodec", "pyarrow.parquet", "matplotlib.pyplot", "jinja2",
                 "huggingface_hub", "torch_fidelity", "simplejpeg", "faiss", "ruamel.yaml", "torchvision"):  # fmt: skip
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    import torch

    torch.set_num_threads(1)


def run(words: list[str], folder: Path, limit: float = WALL_SECONDS, kill_at: int = 0, torn: bool = False) -> Outcome:
    """Run `semdict WORDS` in `folder`; SIGKILL before file event number `kill_at` (1 = the first; 0 = never).

    torn: a file that the event would rename is first cut to half, as if the kill had come while it was written.
    """
    from semdict.cli import main

    return call(lambda: main(words), folder, limit, kill_at, torn)


def call(
    function: Callable[[], int], folder: Path, limit: float = WALL_SECONDS, kill_at: int = 0, torn: bool = False
) -> Outcome:
    """`run` for any function that returns an exit status."""
    logs = {name: folder.parent / f"{folder.name}.{name}" for name in ("out", "err", "events")}
    start = time.monotonic()
    pid = os.fork()
    if not pid:
        _be_the_child(function, folder, logs, kill_at, torn)
    status, peak = _wait(pid, limit)
    texts = {name: _tail(path) for name, path in logs.items()}
    events = logs["events"].read_text() if logs["events"].exists() else ""
    return Outcome(status, texts["out"], texts["err"], time.monotonic() - start, peak, events)


def _wait(pid: int, limit: float) -> tuple[int, int]:
    """Exit status and peak memory in bytes; the child is killed after `limit` seconds."""
    end = time.monotonic() + limit
    while True:
        done, status, usage = os.wait4(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status), usage.ru_maxrss * 1024
        if time.monotonic() > end:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return -signal.SIGALRM, 0
        time.sleep(0.002)


def _tail(path: Path) -> str:
    data = path.read_bytes() if path.exists() else b""
    return data[-TAIL:].decode(errors="replace")


def _be_the_child(function: Callable, folder: Path, logs: dict[str, Path], kill_at: int, torn: bool) -> None:
    """Run the function as Python would run a program, and leave."""
    status = 1
    try:
        resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
        for number, name in ((1, "out"), (2, "err")):
            file = os.open(logs[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            os.dup2(file, number)
        sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))  # noqa: SIM115
        sys.stdin.close()
        os.chdir(folder)
        _count_events(folder, os.open(logs["events"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), kill_at, torn)
        status = function() or 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _count_events(folder: Path, log: int, kill_at: int, torn: bool) -> None:
    """Write one byte to `log` for every file event below `folder`, and die before number `kill_at`."""
    root, seen = f"{folder}/", [0]

    def happens(paths: tuple) -> None:
        seen[0] += 1
        is_rename = len(paths) == 2 and Path(paths[0]).is_file()
        os.write(log, RENAME.encode() if is_rename else b".")
        if seen[0] != kill_at:
            return
        if torn and is_rename:
            os.truncate(paths[0], Path(paths[0]).stat().st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)

    def inside(path: object) -> bool:
        return isinstance(path, str | os.PathLike) and (
            not Path(path).is_absolute() or os.fspath(path).startswith(root)
        )

    def hook(event: str, args: tuple) -> None:
        if event == "open":
            if args[2] & (os.O_WRONLY | os.O_RDWR) and inside(args[0]):
                happens(())
        elif event in EVENTS and inside(args[0]) and seen[0] != kill_at:
            happens(args[:2] if event == "os.rename" else ())

    fsync = os.fsync

    def counted_fsync(file: int) -> None:
        happens(())
        fsync(file)

    os.fsync = counted_fsync
    sys.addaudithook(hook)
