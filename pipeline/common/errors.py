"""Errors whose message is for the user: one line that names what is wrong and what mends it."""

import difflib
from collections.abc import Iterable


class SemdictError(Exception):
    """Wrong input or damaged data; the command line prints the message without a traceback, exit status 1."""

    exit_code = 1


class UsageError(SemdictError):
    """A wrong command, argument or parameter: no work was started, exit status 2."""

    exit_code = 2


class ParamsError(UsageError):
    """params.yaml has an unknown key, a wrong type or a value out of range."""


class WeightsError(SemdictError):
    """A checkpoint or array file is damaged, unsafe, of another family or of another size."""


class ManifestError(SemdictError):
    """The images cannot be listed, or are no longer those of the manifest."""


class ShardError(SemdictError):
    """A token shard directory is damaged, incomplete or of another recipe."""


class BusyError(SemdictError):
    """Another process holds the lock."""


class InterruptedRun(SemdictError):  # noqa: N818
    """A signal ended the run (SIGINT, SIGTERM, SIGHUP); the same command continues it; exit status 130."""

    exit_code = 130


def suggestion(word: str, known: Iterable[str]) -> str:
    """For the message about an unknown name: the nearest known one as a question, or all of them."""
    known = list(known)
    near = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
