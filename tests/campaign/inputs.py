"""Bad inputs: mutated files of every kind that a user may hand to a command. Refused in a line or two, or taken."""

import io
import json
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from semdict.pipeline.shards.checksums import write_sums
from tests import image_files
from tests.campaign import child
from tests.campaign.case import Case, Verdict, fault_of, rng_of
from tests.campaign.mutate import (
    ODD_TEXT,
    ODD_VALUES,
    mutated_bytes,
    mutated_text,
    odd_array,
    odd_json,
)
from tests.campaign.world import CLASSES, LEASE, clone

Rng = np.random.Generator
IMAGES_A_RUN = 10
Commands = list[list[str]]


@dataclass(frozen=True)
class Kind:
    """One kind of bad input. make: writes the files into a copy of the world, and returns the commands to run on it.

    count: cases. each: files of a case, where a command reads several.
    """

    make: Callable[[Rng, Path], Commands]
    count: int
    each: int = 1


@dataclass(frozen=True)
class BadInput:
    """One case: its commands must end with status 0, 1 or 2, and say what is wrong in one or two lines."""

    name: str
    kind: Kind
    world: Path

    def __call__(self, folder: Path) -> Verdict:
        root = folder / "world"
        clone(self.world, root)
        peak, seconds, status = 0, 0.0, 0
        for words in self.kind.make(rng_of(self.name), root):
            outcome = child.run(words, root)
            fault, text = fault_of(outcome)
            if fault:
                return Verdict("tried", fault, f"semdict {' '.join(words)[:200]}: {text}", self.kind.each)
            peak, seconds = max(peak, outcome.peak), seconds + outcome.seconds
            status = max(status, outcome.status)
            if outcome.status:
                break
        return Verdict("refused" if status else "accepted", "", "", self.kind.each, peak, seconds)


def cases(world: Path) -> Iterator[Case]:
    """Every kind's cases."""
    for name, kind in KINDS.items():
        for number in range(kind.count):
            label = f"inputs/{name}/{number:04d}"
            yield Case(label, BadInput(label, kind, world))


def replace(path: Path, data: bytes) -> None:
    """Write a file that may be a link to the world's own."""
    path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def pick(rng: Rng, items: Any) -> Any:
    return items[int(rng.integers(len(items)))]


# --- images, and the files that hold them


@cache
def image_seeds() -> list[tuple[str, bytes]]:
    """Names and bytes of good and bad images in every format."""
    files = {name: data for name, (data, _) in image_files.good_files().items()}
    files |= {name: data for name, (data, *_) in image_files.bad_files().items()}
    for kind, suffix in (("JPEG", "jpg"), ("WEBP", "webp"), ("GIF", "gif"), ("TIFF", "tif"), ("PNG", "png")):
        files[f"plain.{suffix}"] = image_files.encoded(image_files.picture(), kind)
    return sorted(files.items())


def images(rng: Rng, root: Path) -> Commands:
    for number in range(IMAGES_A_RUN):
        name, data = pick(rng, image_seeds())
        replace(root / "bad" / f"c{number % 2}" / f"{number}-{name}", mutated_bytes(rng, data))
    words = ["--set", "manifest.images.train=bad", "--set", "manifest.max_bad_fraction=1.0"]
    words += ["--set", f"pixels.decoder={pick(rng, ('auto', 'pillow'))}"]
    encode = ["encode", "--manifest", "bad.parquet", "--out", "shards/bad", "--reports", "reports/bad", *words]
    return [["manifest", *words, "--out", "bad.parquet", "--metrics", "bad.json"], encode]


def tar_of(members: list[tuple[tarfile.TarInfo, bytes]], form: int) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        for member, data in members:
            tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def odd_members(rng: Rng) -> bytes:
    """A tar whose members have odd names, types, sizes and headers."""
    members = []
    for number in range(6):
        name, data = pick(rng, image_seeds())
        stem = pick(rng, (f"{number}", "../up", "/abs", "a/../b", "x" * 300, "é", "a.b.c", ".hidden", f"d/{number}"))
        for suffix, content in ((Path(name).suffix, data), (pick(rng, (".cls", ".json", ".txt", "")), None)):
            text = odd_json(rng, {"label": number, "label_name": "x"}) if content is None else content
            member = tarfile.TarInfo(stem + suffix)
            member.size = len(text)
            if rng.random() < 0.15:
                member.type = pick(rng, (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, b"S"))
                member.linkname = "/etc/passwd"
            if rng.random() < 0.15:
                key = pick(rng, ("GNU.sparse.size", "GNU.sparse.map", "size", "path", "mtime", "hdrcharset"))
                member.pax_headers = {key: str(pick(rng, (2**40, "x", "1,2,3", "", "-1")))}
            members.append((member, text))
    return tar_of(members, pick(rng, (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT)))


def manifest_of(path: str) -> Commands:
    out = ["--out", "bad.parquet", "--metrics", "bad.json", "--set", "manifest.max_bad_fraction=1.0"]
    return [["manifest", "--set", f"manifest.images={{train: {path}}}", *out]]


def tars(rng: Rng, root: Path) -> Commands:
    data = (root / "packed" / "images.tar").read_bytes() if rng.random() < 0.5 else odd_members(rng)
    replace(root / "bad.tar", mutated_bytes(rng, data) if rng.random() < 0.7 else data)
    return manifest_of("bad.tar")


def odd_table(rng: Rng, table: pa.Table) -> pa.Table:
    """The table with a column lost, renamed, doubled, or of another type."""
    at = int(rng.integers(table.num_columns))
    name = table.column_names[at]
    n = table.num_rows
    match int(rng.integers(6)):
        case 0:
            return table.remove_column(at)
        case 1:
            return table.rename_columns([pick(rng, ("", "x", "label", "image", "\ud83d\ude00")) if i == at else c
                                         for i, c in enumerate(table.column_names)])  # fmt: skip
        case 2:
            return table.append_column(name, table.column(at))
        case 3:
            return table.slice(0, int(rng.integers(0, 2)))
        case 4:
            values = pick(rng, ([None] * n, ["x"] * n, [2**40] * n, [-(2**33)] * n, [[1]] * n, [1.5] * n, [b"x"] * n,
                                [{"bytes": None, "path": "x"}] * n, [True] * n, [-1] * n))  # fmt: skip
            return table.set_column(at, name, pa.array(values))
        case _:
            return table.replace_schema_metadata({"huggingface": odd_json(rng, {"info": {"features": {
                "label": {"names": ["a", 3], "_type": "ClassLabel"}}}})})  # fmt: skip


def table_bytes(table: pa.Table) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    return buffer.getvalue()


def parquets(rng: Rng, root: Path) -> Commands:
    data = (root / "packed" / "images.parquet").read_bytes()
    if rng.random() < 0.5:
        data = table_bytes(odd_table(rng, pq.read_table(io.BytesIO(data))))
    else:
        data = mutated_bytes(rng, data)
    replace(root / "bad.parquet", data)
    return manifest_of("bad.parquet")


def manifests(rng: Rng, root: Path) -> Commands:
    path = root / "data" / "tiny" / "manifest" / "manifest.parquet"
    data = path.read_bytes()
    replace(path, mutated_bytes(rng, data) if rng.random() < 0.5 else table_bytes(odd_table(rng, pq.read_table(path))))
    return [
        pick(rng, (["sample-features", "--out", "x.zarr"], ["evaluate", "reference", "--split", "val", "--out", "x"]))
    ]


# --- parameters


def params(rng: Rng, root: Path) -> Commands:
    replace(root / "params.yaml", mutated_text(rng, (root / "params.yaml").read_text()))
    return [["check"]]


@cache
def parameter_names(path: Path) -> list[str]:
    """Every key of params.yaml, as `--set` takes it."""
    from semdict.pipeline.config.yaml import read_yaml

    def walk(tree: dict, prefix: str) -> Iterator[str]:
        for key, value in tree.items():
            yield prefix + key
            if isinstance(value, dict):
                yield from walk(value, f"{prefix}{key}.")

    return list(walk(read_yaml(path), ""))


def overrides(rng: Rng, root: Path) -> Commands:
    words = ["check"]
    for _ in range(int(rng.integers(1, 3))):
        key = pick(rng, parameter_names(root / "params.yaml"))
        odd = pick(rng, ODD_TEXT) if rng.random() < 0.5 else pick(rng, ODD_VALUES)
        text = odd if isinstance(odd, str) else json.dumps(odd)
        words += ["--set", pick(rng, (f"{key}={text}", f"{key}={text}", f"{key}.x={text}", f"{key}", f"={text}"))]
    return [[word.encode("utf-8", "replace").decode().replace("\0", "") for word in words]]


# --- checkpoints and arrays


def odd_tensor(rng: Rng, tensor: torch.Tensor) -> Any:
    """A tensor or something else in its place."""
    odd = [
        lambda: tensor.double() * 1e300, lambda: tensor[..., None], lambda: tensor.reshape(-1), lambda: tensor[:0],
        lambda: torch.full_like(tensor, float("nan")) if tensor.is_floating_point() else -tensor,
        lambda: tensor.to_sparse(), lambda: tensor.to(torch.complex64), lambda: torch.zeros(1).expand(2**28),
        lambda: None, lambda: "x", lambda: 3, lambda: [tensor], lambda: {"a": tensor}, lambda: tensor.bfloat16(),
        lambda: torch.zeros(()), lambda: tensor.bool(), lambda: torch.empty(tensor.shape, device="meta"),
    ]  # fmt: skip
    return pick(rng, odd)()


def odd_checkpoint(rng: Rng, data: bytes) -> bytes:
    """A checkpoint with one to three entries replaced, lost or renamed, at any depth; or mutated bytes, or a bomb."""
    if rng.random() < 0.3:
        return mutated_bytes(rng, data)
    if rng.random() < 0.03:
        return bomb()
    content = torch.load(io.BytesIO(data), weights_only=True)
    for _ in range(int(rng.integers(1, 4))):
        node, key = content, pick(rng, list(content))
        while isinstance(node[key], dict) and node[key] and rng.random() < 0.9:
            node, key = node[key], pick(rng, list(node[key]))
        value = node[key]
        match int(rng.integers(4)):
            case 0:
                del node[key]
            case 1:
                node[f"x{key}"] = node.pop(key)
            case _ if isinstance(value, torch.Tensor):
                node[key] = odd_tensor(rng, value)
            case _:
                node[key] = pick(rng, ODD_VALUES)
        if not content:
            break
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


@cache
def bomb() -> bytes:
    """A zip of 300 KB whose one record inflates to 300 MB."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(300 << 20))
    return buffer.getvalue()


def vqgans(rng: Rng, root: Path) -> Commands:
    replace(root / "bad.ckpt", odd_checkpoint(rng, (root / "vqgan.ckpt").read_bytes()))
    return [["encode", "--set", "vqgan.weights=bad.ckpt", "--out", "shards/bad", "--reports", "reports/bad"]]


def teachers(rng: Rng, root: Path) -> Commands:
    replace(root / "bad.pth", odd_checkpoint(rng, (root / "teacher.pth").read_bytes()))
    return [["sample-features", "--set", "features.weights=bad.pth", "--out", "bad.zarr"]]


def models(rng: Rng, root: Path) -> Commands:
    source, words = pick(rng, (
        (f"{LEASE}/model.pt", ["generate", "--out", "bad", "--model"]),
        (f"{CLASSES}/model.pt", ["generate", "--task", "class", "--out", "bad", "--model"]),
        (f"{LEASE}/model.pt", ["evaluate", "knn", "--out", "bad", "--model"]),
        ("runs/tiny/vcq/tokenizer.pt", ["vcq", "encode", "--out", "shards/bad", "--reports", "bad", "--tokenizer"]),
        ("runs/tiny/ar/model.pt", ["ar", "sample", "--out", "bad", "--model"]),
        (f"{LEASE}/model.pt", ["condition", "--out", "runs/bad", "--reports", "bad", "--model"]),
    ))  # fmt: skip
    replace(root / "bad.pt", odd_checkpoint(rng, (root / source).read_bytes()))
    return [[*words, "bad.pt"]]


def tokens_pt(rng: Rng, root: Path) -> Commands:
    replace(root / "bad.pt", odd_checkpoint(rng, (root / "tokens.pt").read_bytes()))
    return [["shards", "import", "bad.pt", "shards/bad"], ["shards", "verify", "shards/bad"]]


def arrays(rng: Rng, root: Path) -> Commands:
    """A .npy or .npz of tokens, labels or centroids."""
    gen = rng.integers(0, 64, (12, 16)).astype(np.int16)
    columns = {"gen": gen, "disc": gen % 8, "label": np.arange(12)}
    name = pick(rng, list(columns))
    columns[name] = odd_array(rng, columns[name])
    buffer = io.BytesIO()
    if rng.random() < 0.5:
        np.savez(buffer, **columns)
        replace(root / "bad.npz", maybe_mutated(rng, buffer.getvalue()))
        return [["shards", "import", "bad.npz", "shards/bad"]]
    centroids = odd_array(rng, np.ones((8, 3), np.float32))
    files = {"bad.npy": columns["gen"], "disc.npy": columns["disc"], "label.npy": columns["label"], "c.npy": centroids}
    for file, values in files.items():
        buffer = io.BytesIO()
        np.save(buffer, values)
        replace(root / file, maybe_mutated(rng, buffer.getvalue(), 0.15))
    options = ["--disc", "disc.npy", "--labels", "label.npy", "--centroids", "c.npy"]
    return [["shards", "import", "bad.npy", "shards/bad", *options]]


def maybe_mutated(rng: Rng, data: bytes, share: float = 0.5) -> bytes:
    return mutated_bytes(rng, data) if rng.random() < share else data


def samples(rng: Rng, root: Path) -> Commands:
    pixels = rng.integers(0, 255, (6, 32, 32, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    np.savez(buffer, **{pick(rng, ("arr_0", "arr_0", "arr_0", "x")): odd_array(rng, pixels)})
    replace(root / "bad.npz", maybe_mutated(rng, buffer.getvalue()))
    return [["evaluate", "fid", "--samples", "bad.npz", "--out", "bad.json"]]


def embeddings(rng: Rng, root: Path) -> Commands:
    from safetensors.numpy import save

    values = np.ones((3, 4), np.float32)
    if rng.random() < 0.5:
        buffer = io.BytesIO()
        np.save(buffer, odd_array(rng, values))
        name, data = "bad.npy", buffer.getvalue()
    else:
        plain = odd_array(rng, values)
        name, data = (
            "bad.safetensors",
            save({"a": np.ascontiguousarray(plain if plain.dtype.kind in "iuf" else values)}),
        )
    replace(root / name, maybe_mutated(rng, data))
    return [["condition", "--model", LEASE, "--embeddings", name, "--out", "runs/bad", "--reports", "bad"]]


# --- files that the commands write themselves, damaged by hand


def reports(rng: Rng, root: Path) -> Commands:
    path = pick(rng, sorted((root / "reports").rglob("*.*")))
    data = path.read_bytes()
    is_json = path.suffix == ".json"
    replace(path, odd_json(rng, json.loads(data)) if is_json else mutated_bytes(rng, data))
    return [["report", "--out", "bad.html"]]


def cards(rng: Rng, root: Path) -> Commands:
    path, words = pick(rng, (
        (f"{LEASE}/run.json", ["generate", "--model", LEASE, "--out", "bad"]),
        (f"{LEASE}/run.json", ["pretrain", "--objective", "lease", "--resume"]),
        ("samples/generate.json", ["evaluate", "fid", "--samples", "samples", "--out", "bad.json"]),
        ("samples/generate.json", ["generate", "--model", LEASE, "--out", "samples", "--resume"]),
        ("runs/tiny/ar/nll.json", ["entropy", "shards/tiny-vcq", "--ar", "runs/tiny/ar", "--out", "bad"]),
        ("tars/dataset.json", ["pretrain", "--objective", "mage", "--shards", "tars", "--out", "runs/bad", "--reports",
                               "bad", "--set", "pretrain.loader=streaming"]),
    ))  # fmt: skip
    replace(root / path, odd_json(rng, json.loads((root / path).read_bytes())))
    return [words]


def exported_tars(rng: Rng, root: Path) -> Commands:
    path = pick(rng, sorted((root / "tars").glob("*.tar")))
    replace(path, mutated_bytes(rng, path.read_bytes()))
    words = ["pretrain", "--objective", "mage", "--shards", "tars", "--out", "runs/bad", "--reports", "bad"]
    return [[*words, "--set", "pretrain.loader=streaming"]]


def crafted_shards(rng: Rng, root: Path) -> Commands:
    """A shard directory whose files are odd and whose SHA256SUMS fits them: made so, not damaged."""
    shards = root / "shards" / "tiny"
    path = pick(rng, sorted(p for p in shards.rglob("*") if p.is_file() and p.name != "SHA256SUMS"))
    data = path.read_bytes()
    if path.suffix == ".json":
        data = odd_json(rng, json.loads(data))
    elif path.suffix == ".npy" and rng.random() < 0.7:
        buffer = io.BytesIO()
        np.save(buffer, odd_array(rng, np.load(path)))
        data = buffer.getvalue()
    elif path.suffix == ".parquet" and rng.random() < 0.7:
        data = table_bytes(odd_table(rng, pq.read_table(path)))
    else:
        data = mutated_bytes(rng, data)
    replace(path, data)
    replace(shards / "SHA256SUMS", b"")
    write_sums(shards)
    return [pick(rng, (
        ["shards", "info", "shards/tiny"], ["shards", "verify", "shards/tiny"],
        ["shards", "export", "shards/tiny", "bad.pt", "--to", "pt", "--view", "0"],
        ["shards", "export", "shards/tiny", "bad-hub", "--to", "hf"], ["entropy", "shards/tiny", "--out", "bad"],
        ["pretrain", "--objective", "lease", "--out", "runs/bad", "--reports", "bad"],
        ["evaluate", "knn", "--model", LEASE, "--out", "bad"],
    ))]  # fmt: skip


KINDS = {
    "images": Kind(images, 200, IMAGES_A_RUN),
    "tars": Kind(tars, 400),
    "parquet": Kind(parquets, 400),
    "manifest": Kind(manifests, 150),
    "params.yaml": Kind(params, 800),
    "--set": Kind(overrides, 300),
    "VQGAN": Kind(vqgans, 200),
    "teacher": Kind(teachers, 200),
    "models": Kind(models, 400),
    "tokens .pt": Kind(tokens_pt, 300),
    "token arrays": Kind(arrays, 400),
    "sample arrays": Kind(samples, 150),
    "class embeddings": Kind(embeddings, 120),
    "report files": Kind(reports, 250),
    "cards": Kind(cards, 250),
    "exported tars": Kind(exported_tars, 100),
    "crafted shards": Kind(crafted_shards, 350),
}
