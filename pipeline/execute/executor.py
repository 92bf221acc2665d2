"""Executors: compute the missing chunks of a job in this process, or on Dask workers, behind one function."""

from collections.abc import Sequence
from typing import Protocol

from semdict.pipeline.execute.store import Advance, Arrays, Chunk, ChunkStore, Finished, Job


class Executor(Protocol):
    """Computes `missing` chunks, writes each to `store`, and reports progress and finished chunks."""

    def __call__(
        self, job: Job, store: ChunkStore, missing: list[Chunk], advance: Advance, finished: Finished
    ) -> None: ...


def ignore_chunk(_chunk: Chunk, _arrays: Arrays) -> None:
    """Default callback: does nothing."""


def run_chunks(
    job: Job,
    store: ChunkStore,
    chunks: Sequence[Chunk],
    scheduler: str,
    advance: Advance,
    finished: Finished = ignore_chunk,
) -> None:
    """Compute the missing ones of `chunks` and write each to `store`; `finished` is called once for every chunk.

    scheduler: "in-process" | "local" | "local-N" (N processes; default one per GPU) | an address "tcp://host:port".
    """
    missing = []
    for chunk in chunks:
        arrays = store.read_if_done(chunk)
        if arrays is None:
            missing.append(chunk)
        else:
            advance(len(chunk), 0)
            finished(chunk, arrays)
    if missing:
        executor_of(scheduler)(job, store, missing, advance, finished)


def executor_of(scheduler: str) -> Executor:
    """The executor that a scheduler's name asks for; only this loads Dask."""
    if scheduler == "in-process":
        return run_in_process
    from semdict.pipeline.execute.dask import DaskExecutor

    return DaskExecutor(scheduler)


def run_in_process(job: Job, store: ChunkStore, missing: list[Chunk], advance: Advance, finished: Finished) -> None:
    """Compute in this process, chunk after chunk."""
    for chunk, arrays in job.open().process(missing, advance):
        store.write(chunk, arrays)
        finished(chunk, arrays)
