"""One run at a time, and an orderly end on the signals that end a run."""

import signal
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from semdict.pipeline.common.files import hold_lock
from semdict.pipeline.execute.store import WORK

ENDING = (signal.SIGTERM, signal.SIGHUP)  # a batch system's end, a closed terminal


def lock(name: str, root: Path = WORK) -> AbstractContextManager[None]:
    """Hold `work/locks/<name>.lock`; BusyError names the run that holds it. A killed run holds nothing."""
    return hold_lock(Path(root) / "locks" / f"{name}.lock", name)


@contextmanager
def interrupt_on_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP end the block as Ctrl-C does: pools close, temporary files go, the exit status is not zero.

    A signal that the caller ignores stays ignored (nohup); outside the main thread nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    caught = [number for number in ENDING if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, interrupt) for number in caught}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
