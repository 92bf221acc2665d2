"""The one YAML dialect of the project: YAML 1.2 as DVC reads it (ruamel), with bounds on what a file may contain.

In YAML 1.2 `1e-05` is a number, `no` is text and `010` is ten. Duplicate keys are an error. Anchors, aliases and tags
have no use in a parameter file and are refused: they are how a small file grows without end.
"""

from io import StringIO
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import AliasEvent, CollectionEndEvent, CollectionStartEvent

from semdict.pipeline.common.errors import ParamsError

MAX_BYTES = 1 << 20
MAX_DEPTH = 32


def read_yaml(path: Path) -> Any:
    """The content of a YAML file as plain Python values; ParamsError names the file and what is wrong with it."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ParamsError(f"{path} is larger than {MAX_BYTES >> 20} MiB; parameters are a few hundred lines")
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise ParamsError(f"{path} does not exist; `semdict preset demo` writes one") from None
    except UnicodeDecodeError as error:
        raise ParamsError(f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    except OSError as error:
        raise ParamsError(f"{path} cannot be read: {error.strerror}") from None
    return parse_yaml(text, str(path))


def parse_yaml(text: str, source: str) -> Any:
    """Text as plain Python values; `source` names it in errors."""
    try:
        _check_events(text, source)
        return YAML(typ="safe", pure=True).load(text)
    except MarkedYAMLError as error:
        place = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        problem = " ".join(str(error.problem or error.context).split())
        raise ParamsError(f"{source}{place} is not valid YAML: {problem[:200]}") from None
    except (YAMLError, ValueError, OverflowError, TypeError, AttributeError, RecursionError) as error:
        problem = " ".join(str(error).split())[:200] or type(error).__name__
        raise ParamsError(f"{source} is not valid YAML: {problem}") from None


def _check_events(text: str, source: str) -> None:
    """ParamsError for nesting beyond MAX_DEPTH, anchors, aliases and tags."""
    depth = 0
    for event in YAML(typ="safe", pure=True).parse(StringIO(text)):
        line = event.start_mark.line + 1
        if isinstance(event, AliasEvent) or getattr(event, "anchor", None):
            raise ParamsError(f"{source}, line {line}: anchors and aliases (&, *) have no use here")
        if getattr(event, "ctag", None) or getattr(event, "tag", None):
            raise ParamsError(f"{source}, line {line}: tags (!) have no use here")
        if isinstance(event, CollectionStartEvent):
            depth += 1
            if depth > MAX_DEPTH:
                raise ParamsError(f"{source}, line {line}: nested deeper than {MAX_DEPTH} levels")
        elif isinstance(event, CollectionEndEvent):
            depth -= 1
