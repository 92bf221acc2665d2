"""A sampling command's run: finished batches are kept in a work folder, so a killed run continues with the next batch.

Images have numbers, and the borders of batches are fixed, so each batch is the same computation whichever run and
whichever process of torchrun does it: a resumed run publishes the same bytes as an uninterrupted one.
"""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from semdict.pipeline.common.errors import UsageError
from semdict.pipeline.common.files import remove, sha256_json
from semdict.pipeline.common.progress import progress
from semdict.pipeline.common.publish import check_output, occupied, publish_staged, remove_leftovers
from semdict.pipeline.execute.code_identity import code_identity
from semdict.pipeline.execute.locks import interrupt_on_signals, lock
from semdict.pipeline.execute.store import Arrays, Chunk, ChunkStore, split_rows
from semdict.train.engine import dist

WRITERS = 4  # threads that write image files while the next batch is computed

# image numbers -> arrays that are kept for the end, and jobs that write the batch's files to `SamplingRun.result`
ComputeBatch = Callable[[list[int]], tuple[Arrays, Sequence[Callable[[], Any]]]]


@dataclass
class SamplingRun:
    """One run of a sampling command.

    command: its name. kind: of the output, a key of `publish.FOLDERS`. card: the output's JSON file that holds
    `fingerprint`. module: the command's, for its code identity. settings: everything that shapes the result.
    count, batch: of images. files: image number -> its file inside the output, for commands that write one per image.
    """

    command: str
    kind: str
    card: str
    module: str
    settings: dict[str, Any]
    count: int
    batch: int
    out: Path
    work: Path
    world: dist.World
    files: Callable[[int], str] | None = None

    @property
    def fingerprint(self) -> str:
        """16 hex digits over the settings; they are in the card."""
        return sha256_json(self.settings)[:16]

    @cached_property
    def store(self) -> ChunkStore:
        """Finished batches, in work/<command>-<hash of settings, borders of the batches and code>."""
        recipe = {"settings": self.settings, "batch": self.batch, "code": code_identity(self.module)}
        return ChunkStore(self.work, self.command.replace(" ", "-"), sha256_json(recipe)[:16])

    @property
    def result(self) -> Path:
        """The folder that becomes the output."""
        return self.store.folder / "result"

    def is_published(self, resume: bool) -> bool:
        """Whether `out` holds the result of these settings, which `resume` keeps.

        UsageError when `out` holds anything else, or `resume` is off: nothing is overwritten.
        """
        check_output(self.out, self.kind)
        if not occupied(self.out):
            return False
        card = json.loads((self.out / self.card).read_text(encoding="utf-8"))
        if resume and card.get("fingerprint") == self.fingerprint:
            self.log(f"{self.out} is complete with these settings; nothing to do")
            return True
        raise UsageError(
            f"{self.out} exists; give another --out, or remove it (--resume keeps one of the same settings)"
        )

    @contextmanager
    def opened(self, resume: bool) -> Iterator[None]:
        """Hold the run's lock on rank 0 and end in order on signals; without `resume` earlier batches are removed."""
        with ExitStack() as stack:
            stack.enter_context(interrupt_on_signals())
            if self.world.first:
                stack.enter_context(lock(self.store.folder.name, self.work))
                if not resume:
                    remove(self.store.folder)
                self.result.mkdir(parents=True, exist_ok=True)
                remove_leftovers(self.store.folder)
            dist.barrier()
            yield

    def sample(self, compute: ComputeBatch) -> None:
        """Compute the batches that are missing, shared out over the ranks."""
        batches = split_rows(self.count, self.batch)[self.world.rank :: self.world.size]
        pending: tuple[Chunk, Arrays, list[Future]] | None = None
        bar = progress(sum(map(len, batches)), self.command, quiet=not self.world.first)
        with bar, ThreadPoolExecutor(WRITERS) as pool:
            for batch in batches:
                if self._is_done(batch):
                    bar.update(len(batch))
                    continue
                arrays, jobs = compute(list(range(batch.start, batch.stop)))
                futures = [pool.submit(job) for job in jobs]
                self._finish(pending)  # at most one batch of images waits to be written
                pending = (batch, arrays, futures)
                bar.update(len(batch))
            self._finish(pending)
        dist.barrier()

    def batches(self) -> Iterator[Arrays]:
        """The kept arrays of every batch, in order."""
        for batch in split_rows(self.count, self.batch):
            yield self.store.read(batch)

    def publish(self) -> None:
        """Put the result in the place of `out`, and remove the work folder.

        UsageError when another run was published there meanwhile: this one stays in its work folder.
        """
        if not self.is_published(resume=True):
            publish_staged(self.result, self.out, self.kind)
        remove(self.store.folder)
        self.log(f"{self.count} images in {self.out}")

    def log(self, text: str) -> None:
        """One line on stderr, from rank 0."""
        if self.world.first:
            print(f"{self.command}: {text}", file=sys.stderr)

    def _is_done(self, batch: Chunk) -> bool:
        """Whether a batch's arrays and files are there; a damaged file of arrays counts as none."""
        if self.store.read_if_done(batch) is None:
            return False
        numbers = range(batch.start, batch.stop)
        return self.files is None or all((self.result / self.files(number)).is_file() for number in numbers)

    def _finish(self, pending: tuple[Chunk, Arrays, list[Future]] | None) -> None:
        """Wait for a batch's files, then keep its arrays: from here on it is done."""
        if pending is not None:
            batch, arrays, futures = pending
            for future in futures:
                future.result()
            self.store.write(batch, arrays)
