"""The one YAML dialect of the project: YAML 1.2 as DVC reads it (ruamel), with bounds on what a file may contain.

In YAML 1.2 `1e-05` is a number, `no` is text and `010` is ten. Duplicate keys are errors, and so are tags, depth beyond
MAX_DEPTH, and aliases that make a small file grow beyond MAX_VALUES.
"""

from io import StringIO
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import CollectionEndEvent, CollectionStartEvent

from semdict.pipeline.common.errors import ParamsError

MAX_BYTES = 1 << 20
MAX_DEPTH = 32
MAX_VALUES = 100_000


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
        value = YAML(typ="safe", pure=True).load(text)
    except MarkedYAMLError as error:
        place = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        problem = " ".join(str(error.problem or error.context).split())
        raise ParamsError(f"{source}{place} is not valid YAML: {problem[:200]}") from None
    except (YAMLError, ValueError, OverflowError, TypeError, AttributeError, RecursionError) as error:
        problem = " ".join(str(error).split())[:200] or type(error).__name__
        raise ParamsError(f"{source} is not valid YAML: {problem}") from None
    if _values(value) > MAX_VALUES:
        raise ParamsError(f"{source}: aliases expand it to more than {MAX_VALUES} values")
    return value


def _check_events(text: str, source: str) -> None:
    """ParamsError for tags and for nesting beyond MAX_DEPTH."""
    depth = 0
    for event in YAML(typ="safe", pure=True).parse(StringIO(text)):
        line = event.start_mark.line + 1
        if getattr(event, "ctag", None) or getattr(event, "tag", None):
            raise ParamsError(f"{source}, line {line}: tags (!) have no use here")
        if isinstance(event, CollectionStartEvent):
            depth += 1
            if depth > MAX_DEPTH:
                raise ParamsError(f"{source}, line {line}: nested deeper than {MAX_DEPTH} levels")
        elif isinstance(event, CollectionEndEvent):
            depth -= 1


def _values(value: Any) -> int:
    """Number of values in nested lists and mappings, aliases counted each time; counting stops beyond MAX_VALUES."""
    count, waiting = 0, [value]
    while waiting and count <= MAX_VALUES:
        item = waiting.pop()
        count += 1
        if isinstance(item, dict):
            waiting += item.values()
        elif isinstance(item, list):
            waiting += item
    return count
