"""What a user is told when something they gave cannot be used: one line that names it and the way out."""

import difflib
from collections.abc import Iterable


class SemdictError(Exception):
    """A mistake in the input, or data found unsound; the command line prints it without a traceback, exit 1."""

    exit_code = 1


class UsageError(SemdictError):
    """A wrong command, argument or parameter: nothing was started, exit 2."""

    exit_code = 2


class ParamsError(UsageError):
    """params.yaml holds an unknown key, a wrong type or a value out of range."""


class WeightsError(SemdictError):
    """A checkpoint or array file is unsafe, of another family, or of another size than promised."""


class ManifestError(SemdictError):
    """The images cannot be listed, or no longer are what the manifest says."""


class ShardError(SemdictError):
    """A token shard directory is damaged, incomplete or of another recipe."""


class BusyError(SemdictError):
    """Another run holds the lock."""


class InterruptedRun(SemdictError):  # noqa: N818
    """SIGINT or SIGTERM arrived; finished chunks are kept, the same command continues."""

    exit_code = 130


def suggestion(word: str, known: Iterable[str]) -> str:
    """For the message about an unknown name: the nearest known one as a question, or all of them."""
    known = list(known)
    near = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
