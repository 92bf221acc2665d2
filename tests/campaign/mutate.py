"""Mutations with a random generator: of bytes, of trees of plain data, of the text of numbers and names."""

import json
from typing import Any

import numpy as np

ODD_NUMBERS = (0, -1, 1, 2**31 - 1, 2**31, 2**63 - 1, -(2**63), 10**23, 255, 65536, 3)
ODD_VALUES: tuple[Any, ...] = (
    None, True, False, *ODD_NUMBERS, 0.5, -0.5, 1e308, 1e-320, float("nan"), float("inf"), "", "x", "no", "1e5", "010",
    "../../../etc/passwd", "/dev/zero", "a" * 5000, "\x00", "\u202e", "\ud800", "照片",
    [], [[]], {}, [1, 2], ["a", None],
    {"a": 1}, {"": {}}, [[[[[[1]]]]]],
)  # fmt: skip
ODD_TEXT = (
    "!!int abc", "2001-99-99", "!!python/object/apply:os.system [ls]", "&a [*a]", "*b", "[" * 2000, "{" * 500, ": :",
    "- - -", "\t", "\ufeff", "%YAML 9.9", "...", "---", "? !!binary xx", ".inf", ".nan", "0x1g", "1_000", "<<: *x",
    "'", '"', "\x07", "|", ">", "@", "`", "true false", "null", "~", "-", "=", "10:30", "1e999", "-0", "+",
)  # fmt: skip


def mutated_bytes(rng: np.random.Generator, data: bytes) -> bytes:
    """One to four of: flipped bits, a cut, a removed or repeated part, random bytes, extreme integers."""
    out = bytearray(data)
    for _ in range(int(rng.integers(1, 5))):
        size = max(1, len(out))
        start = int(rng.integers(size))
        stop = min(size, start + int(rng.integers(1, 1 + min(size, 256))))
        match int(rng.integers(7)):
            case 0:
                for at in rng.integers(0, size, int(rng.integers(1, 9))):
                    if out:
                        out[at] ^= 1 << int(rng.integers(8))
            case 1:
                del out[start:]
            case 2:
                del out[start:stop]
            case 3:
                out[start:start] = out[start:stop] * int(rng.integers(1, 4))
            case 4:
                out[start:stop] = rng.bytes(stop - start)
            case 5:
                out[start : start + 4] = (0xFFFFFFFF, 0x7FFFFFFF, 0, 0x80000000)[rng.integers(4)].to_bytes(
                    4, ("little", "big")[rng.integers(2)]
                )
            case 6:
                out[start:stop] = bytes(stop - start)
    return bytes(out)


def mutated_text(rng: np.random.Generator, text: str) -> bytes:
    """One to three lines of a text get an odd value, are doubled, lost, indented otherwise or cut; or odd bytes."""
    if rng.random() < 0.15:
        return mutated_bytes(rng, text.encode())
    if rng.random() < 0.05:
        return text.encode(("utf-16", "utf-32", "utf-8-sig", "latin-1", "cp037")[rng.integers(5)], "replace")
    lines = text.splitlines()
    for _ in range(int(rng.integers(1, 4))):
        at = int(rng.integers(len(lines)))
        key, colon, value = lines[at].partition(": ")
        odd = _pick(rng, ODD_TEXT) if rng.random() < 0.5 else str(_pick(rng, ODD_VALUES))
        match int(rng.integers(8)):
            case 0 | 1 | 2:
                lines[at] = f"{key}{colon or ': '}{odd}"
            case 3:
                lines.insert(at, lines[at])
            case 4 if len(lines) > 1:
                del lines[at]
            case 5:
                lines[at] = " " * int(rng.integers(5)) + lines[at].strip()
            case 6:
                lines[at] = f"{odd}{colon}{value}"
            case 7:
                lines[at] = lines[at][: int(rng.integers(1 + len(lines[at])))]
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def mutated_tree(rng: np.random.Generator, tree: Any) -> Any:
    """A copy of JSON-like data in which one to three entries are replaced, renamed, removed or doubled."""
    tree = json.loads(json.dumps(tree))
    for _ in range(int(rng.integers(1, 4))):
        if rng.random() < 0.03:
            return _pick(rng, ODD_VALUES)
        node = tree
        while isinstance(node, dict | list) and node:
            key = _pick(rng, list(node) if isinstance(node, dict) else range(len(node)))
            if not (isinstance(node[key], dict | list) and node[key]) or rng.random() < 0.15:
                _mutate_entry(rng, node, key)
                break
            node = node[key]
    return tree


def _mutate_entry(rng: np.random.Generator, node: Any, key: Any) -> None:
    match int(rng.integers(6)):
        case 0 | 1 | 2:
            node[key] = _pick(rng, ODD_VALUES)
        case 3 if isinstance(node[key], int | float) and not isinstance(node[key], bool):
            node[key] = _pick(rng, (node[key] + 1, -node[key], node[key] * 1000, str(node[key]), [node[key]]))
        case 4 if isinstance(node, dict):
            node[f"{key}x"] = node.pop(key)
        case _:
            del node[key]


def odd_json(rng: np.random.Generator, tree: Any) -> bytes:
    """JSON of a mutated tree, or mutated text of the JSON."""
    if rng.random() < 0.3:
        return mutated_text(rng, json.dumps(tree, indent=1))
    if rng.random() < 0.03:
        return b"[" * 100_000
    return json.dumps(mutated_tree(rng, tree)).encode()


def odd_array(rng: np.random.Generator, array: np.ndarray) -> np.ndarray:  # noqa: PLR0911
    """The array with another type, shape, size or with odd values."""
    match int(rng.integers(9)):
        case 0:
            return array.astype(_pick(rng, ("i1", "u1", "i8", "u8", "f2", "f4", "f8", "c8", "?", "S3", "U2")))
        case 1:
            return array[..., None]
        case 2:
            return array.reshape(-1)
        case 3:
            return array[: int(rng.integers(0, 3))]
        case 4:
            return array.swapaxes(0, -1)
        case 5:
            return np.zeros((0, *array.shape[1:]), array.dtype)
        case 6:
            out = array.copy()
            if array.dtype.kind in "iu" and out.size:
                info = np.iinfo(out.dtype)
                out.flat[int(rng.integers(out.size))] = _pick(rng, (info.min, info.max))
            elif array.dtype.kind == "f" and out.size:
                out.flat[int(rng.integers(out.size))] = _pick(rng, (np.nan, np.inf, -np.inf, 3e38))
            return out
        case 7:
            return np.array(_pick(rng, (0, 1.5, "x")))
        case _:
            return np.concatenate([array, array[:1]])


def _pick(rng: np.random.Generator, items: Any) -> Any:
    return items[int(rng.integers(len(items)))]
