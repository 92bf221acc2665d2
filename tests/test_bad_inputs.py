"""A zoo of bad inputs over all commands: each ends with status 1 or 2 and one or two lines, never with a traceback."""

import io
import json
import pickle
import shutil
import tarfile
import time
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tests import tiny
from tests.campaign.world import LEASE, STEPS, make_inputs

BUILT = (
    "manifest",
    "sample-features",
    "kmeans",
    "encode",
    "export pt",
    "export webdataset",
    "pretrain lease",
    "vcq train",
    "vcq encode",
    "ar train",
)
SECONDS = 20.0


class Evil:
    """A pickle that would write a file."""

    def __reduce__(self):
        return Path.touch, (Path("executed"),)


def tar_bytes(*members: tuple[str, bytes, bytes]) -> bytes:
    """A tar of (name, type, data)."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, kind, data in members:
            member = tarfile.TarInfo(name)
            member.type, member.size, member.linkname = kind, len(data), "/etc/passwd"
            tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def write_zoo(root: Path) -> None:
    """root/bad: files that are not what their names promise."""
    bad = root / "bad"
    bad.mkdir()
    for name in ("empty", "empty.pt", "empty.npz", "empty.npy", "empty.tar", "empty.parquet", "empty.json"):
        (bad / name).touch()
    for name in ("text", "text.pt", "text.npz", "text.npy", "text.tar", "text.parquet", "text.safetensors"):
        (bad / name).write_text("not what the name promises\n" * 50)
    (bad / "folder").mkdir()
    (bad / "loop").symlink_to(bad / "loop")
    tensor = torch.zeros(4, 4)
    checkpoints = {
        "list": [tensor],
        "number": 3,
        "none": None,
        "nothing": {},
        "texts": {"a": "b"},
        "alone": tensor,
        "flat": {"a": torch.zeros(1).expand(2**28)},
        "tokens": {"tokens_vqgan": torch.zeros(3, 4)},
        "labels": {"tokens_vqgan": torch.zeros(3, 4, dtype=torch.long), "labels": torch.zeros(2).long()},
        "no-tokens": {"tokens_vqgan": torch.zeros(3, 0, dtype=torch.long), "labels": torch.zeros(3).long()},
        "sparse": {"tokens_vqgan": tensor.long().to_sparse(), "labels": torch.zeros(4).long()},
        "kind": {"kind": "x", "config": {}, "model": {}, "about": {}},
    }
    for name, content in checkpoints.items():
        torch.save(content, bad / f"{name}.pt")
    (bad / "evil.pt").write_bytes(pickle.dumps({"a": Evil()}))
    with zipfile.ZipFile(bad / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(100 << 20))
    with zipfile.ZipFile(bad / "bomb.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("gen.npy", bytes(100 << 20))
    arrays = {
        "nan": np.full((8, 24), np.nan),
        "big": np.full((8, 24), 1e306),
        "flat": np.zeros(8),
        "ids": np.eye(8, dtype=int),
        "none": np.zeros((0, 24)),
        "words": np.array([["a", "b"]]),
        "one": np.array(3.0),
        "negative": np.full((3, 4), -1),
        "deep": np.zeros((1, 1, 1, 1, 1, 1), int),
    }
    for name, array in arrays.items():
        np.save(bad / f"{name}.npy", array)
    np.save(bad / "object.npy", np.array([{}, Evil()], dtype=object), allow_pickle=True)
    np.savez(bad / "other.npz", x=np.zeros(3))
    np.savez(bad / "shape.npz", arr_0=np.zeros((3, 4, 4, 1), np.uint8))
    np.savez(bad / "floats.npz", arr_0=np.zeros((6, 4, 4, 3)), gen=np.zeros((6, 4)))
    (bad / "links.tar").write_bytes(tar_bytes(("a.png", tarfile.SYMTYPE, b""), ("b.png", tarfile.FIFOTYPE, b"")))
    (bad / "labels.tar").write_bytes(
        tar_bytes(("a.png", tarfile.REGTYPE, b"x"), ("a.cls", tarfile.REGTYPE, b"one two"))
    )
    (bad / "nested.tar").write_bytes(
        tar_bytes(("a.png", tarfile.REGTYPE, b"x"), ("a.json", tarfile.REGTYPE, b"[" * 10**5))
    )
    tables = {
        "columns": {"x": [1]},
        "huge-label": {"image": [b"x"], "label": [2**40]},
        "nested-label": {"image": [b"x"], "label": [[1]]},
        "numbers": {"image": [3], "label": [0]},
        "rows": {"image": pa.array([], pa.binary()), "label": pa.array([], pa.int64())},
    }
    for name, table in tables.items():
        pq.write_table(pa.table(table), bad / f"{name}.parquet")
    texts = {
        "latin.yaml": "preset: é".encode("latin-1"),
        "utf16.yaml": "preset: x".encode("utf-16"),
        "list.yaml": b"- a",
        "nested.yaml": b"a: " + b"[" * 5000,
        "laughs.yaml": b"a: &a [x,x]\nb: [*a,*a]",
        "tab.yaml": b"a:\tb\n\tc: d",
        "date.yaml": b"preset: 2001-99-99",
        "tag.yaml": b"preset: !!int abc",
        "null.yaml": b"\x00\x00",
        "python.yaml": b"preset: !!python/object/apply:os.system [ls]",
        "twice.yaml": b"preset: a\npreset: b",
        "long.yaml": b"preset: " + b"x" * 10**6,
        "some.yaml": b"preset: tiny\n",
    }
    for name, data in texts.items():
        (bad / name).write_bytes(data)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("zoo")
    make_inputs(root)
    for name in BUILT:
        assert tiny.semdict(root, *STEPS[name].again) == 0, name
    write_zoo(root)
    return root


PATHS = ("bad/missing", "bad/empty", "bad/text", "bad/folder", "bad/loop", "/dev/null/x", "images", "")
CHECKPOINTS = tuple(
    f"bad/{name}.pt"
    for name in ("empty", "text", "list", "number", "none", "nothing", "texts", "alone", "flat", "evil", "bomb", "kind")
)
NPY = tuple(
    f"bad/{name}.npy"
    for name in ("empty", "text", "nan", "big", "flat", "ids", "none", "words", "one", "object", "deep")
)
TOKENS = (
    "bad/tokens.pt",
    "bad/labels.pt",
    "bad/no-tokens.pt",
    "bad/sparse.pt",
    "bad/empty.npz",
    "bad/text.npz",
    "bad/bomb.npz",
    "bad/other.npz",
    "bad/negative.npy",
    "bad/floats.npz",
)
TARS = (
    "bad/empty.tar",
    "bad/text.tar",
    "bad/links.tar",
    "bad/labels.tar",
    "bad/nested.tar",
    "bad/empty.parquet",
    "bad/text.parquet",
    "bad/columns.parquet",
    "bad/huge-label.parquet",
    "bad/nested-label.parquet",
    "bad/numbers.parquet",
    "bad/rows.parquet",
    "bad/*.none",
    "bad/folder",
)
YAMLS = ("latin", "utf16", "list", "nested", "laughs", "tab", "date", "tag", "null", "python", "twice", "long", "some")
SETTINGS = (
    "kmeans.k=[",
    "kmeans.k=x",
    "kmeans.k=0",
    "kmeans.k=-1",
    "kmeans.k=1e99",
    "kmeans.k=.inf",
    "kmeans.kk=3",
    "kmeans",
    "=",
    "",
    "kmeans.k=null",
    "kmeans.k={a: 1}",
    "kmeans.k=!!int abc",
    "kmeans.k=2001-99-99",
    "pretrain.epochs=10000000000000000000000",
    "pretrain.seed=100000000000000000000000",
    "pretrain.base_lr=.nan",
    "pixels.size=31",
    "pixels.crop=none",
    "kmeans.k=&a [*a]",
    "pretrain.mask.min=2",
    "vcq.tokens=0",
    "vcq.k_max=1",
    "ar.heads=5",
    "features.kwargs=3",
    "encode.views=[upside-down]",
    "shards.codec=zip",
    "runtime.device=tpu",
    "manifest.layout=zip",
    "encode.chunk=0.5",
)
# Words of a command that ends in the option whose value is bad, and the values.
OPTIONS = {
    "manifest --set manifest.images={{train:\u00a0{}}}": TARS,
    "sample-features --out o.zarr --manifest {}": PATHS,
    "kmeans --out o.npy --features {}": PATHS,
    "kmeans --out o.npy --set inputs.centroids=x --set kmeans.centroids={}": NPY,
    "encode --out o --reports r --manifest {}": PATHS,
    "encode --out o --reports r --centroids {}": NPY,
    "encode --out o --reports r --set vqgan.weights={}": CHECKPOINTS,
    "sample-features --out o.zarr --set features.weights={}": CHECKPOINTS,
    "shards info {}": PATHS,
    "shards verify {}": PATHS,
    "shards import {} o": (*PATHS, *TOKENS, *CHECKPOINTS),
    "shards import tokens.pt o --centroids {}": NPY,
    "shards export {} o.pt --to pt": PATHS,
    "pretrain --objective mage --out o --reports r --shards {}": PATHS,
    "pretrain --objective mage --out o --reports r --set pretrain.loader=streaming --shards {}": PATHS,
    "condition --out o --reports r --model {}": (*PATHS, *CHECKPOINTS),
    f"condition --out o --reports r --model {LEASE} --embeddings {{}}": NPY,
    "generate --out o --model {}": (*PATHS, *CHECKPOINTS),
    f"generate --out o --model {LEASE} --vqgan {{}}": CHECKPOINTS,
    "evaluate knn --out o --model {}": PATHS,
    f"evaluate probe --model {LEASE} --out o --shards {{}}": PATHS,
    "evaluate fid --out o.json --samples {}": (*PATHS, *TOKENS, "bad/shape.npz"),
    "evaluate nearest --out o --samples {}": PATHS,
    "evaluate reference --out o --manifest {}": PATHS,
    "vcq train --out o --reports r --manifest {}": PATHS,
    "vcq encode --out o --reports r --tokenizer {}": (*PATHS, *CHECKPOINTS),
    "vcq evaluate --out o --tokenizer {}": PATHS,
    "ar train --out o --reports r --shards {}": PATHS,
    "ar sample --out o --model {}": (*PATHS, *CHECKPOINTS),
    "entropy --out o {}": PATHS,
    "entropy --out o shards/tiny-vcq --ar {}": PATHS,
    "report --out o.html --preset {}": PATHS,
    "check --params {}": (*PATHS, *(f"bad/{name}.yaml" for name in YAMLS)),
    "check --set {}": SETTINGS,
    "preset {}": ("nothing", "../demo", "/etc/passwd", "base/", "demo\n"),
}
# Values that are right in these places.
FINE = {
    ("kmeans --out o.npy --set inputs.centroids=x --set kmeans.centroids={}", "bad/none.npy"),
    ("report --out o.html --preset {}", ""),
    ("check --set {}", "pixels.size=31"),
    ("check --set {}", "ar.heads=5"),
    ("sample-features --out o.zarr --manifest {}", ""),
    ("encode --out o --reports r --manifest {}", ""),
}
CASES = [(words, value) for words, values in OPTIONS.items() for value in values if (words, value) not in FINE]


def test_the_zoo_is_large():
    assert len(CASES) >= 250


@pytest.mark.parametrize("words", OPTIONS)
def test_bad_inputs_end_in_a_sentence(world, tmp_path, monkeypatch, capsys, words):
    """Every value of one option; outputs of a refused command are neither made nor left half made."""
    before = {path.name for path in world.iterdir()}
    wrong = []
    for value in (value for other, value in CASES if other == words):
        start = time.monotonic()
        try:
            status = tiny.semdict(world, *(word.format(value).replace("\u00a0", " ") for word in words.split(" ")))
        except SystemExit as error:  # argparse
            status = error.code
        text = capsys.readouterr().err.replace("\r", "\n")
        lines = [line for line in text.split("\n") if line.strip()]
        message = lines[max((i for i, line in enumerate(lines) if line.startswith("semdict")), default=0) :]
        if (
            status not in (1, 2)
            or not 1 <= len(message) <= 2
            or time.monotonic() - start > SECONDS
            or len(text) > 20_000
        ):
            wrong.append((value, status, message[:5]))
        made = {path.name for path in world.iterdir()} - before - {"work", "data", "reports"}
        if made:
            wrong.append((value, "left", sorted(made)))
            for name in made:
                path = world / name
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert not wrong, json.dumps(wrong, indent=1)
    assert not (world / "executed").exists()
