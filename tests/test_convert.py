"""Import and export against torch, webdataset, tarfile and parquet read by their own libraries."""

import hashlib
import io
import json
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from semdict.cli import main
from semdict.pipeline.analysis.curves import curves_of
from semdict.pipeline.common.errors import SemdictError, ShardError, UsageError
from semdict.pipeline.shards import Block, ShardSpec, open_shards, verify_shards, write_shards
from semdict.pipeline.shards.convert import EXPORTERS, IMPORTERS, export_tokens, import_tokens
from semdict.pipeline.shards.layouts.webdataset import percent
from semdict.pipeline.shards.rows import row_batches
from semdict.train.data.resident import ResidentLoader, table_from_shards
from semdict.train.data.streaming import StreamingLoader
from tests.token_sets import good_rows, write_awkward_set


def save_pt(path: Path, rows: int = 50, length: int = 256, dtype=torch.int64, **extra) -> dict:
    rng = torch.Generator().manual_seed(0)
    made = {
        "tokens_vqgan": torch.randint(0, 1024, (rows, length), generator=rng).to(dtype),
        "labels": torch.randint(-1, 1000, (rows,), generator=rng),
        "tokens_dino": torch.randint(0, 16384, (rows, length), generator=rng).to(torch.int32),
    } | extra
    made = {key: value for key, value in made.items() if value is not None}
    torch.save(made, path)
    return made


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.int64, torch.uint16])
@pytest.mark.parametrize("paired", [True, False])
def test_pt_round_trip_is_exact(tmp_path, dtype, paired):
    """Tensor by tensor, types included, both from a paired and from a generative-only file; twice the same bytes."""
    made = save_pt(tmp_path / "a.pt", dtype=dtype, **({} if paired else {"tokens_dino": None}))
    done = import_tokens(tmp_path / "a.pt", tmp_path / "s")
    assert (done.rows, done.gen_size, done.disc_size) == (50, 1024, 16384 if paired else None)
    assert verify_shards(tmp_path / "s").ok and open_shards(tmp_path / "s").grid == (16, 16)
    for name in ("b.pt", "c.pt"):
        assert export_tokens(tmp_path / "s", tmp_path / name, "pt") == 0
    back = torch.load(tmp_path / "b.pt", weights_only=True)
    assert back.keys() == made.keys()
    for key, value in made.items():
        assert back[key].dtype == value.dtype and torch.equal(back[key].long(), value.long())
    assert (tmp_path / "b.pt").read_bytes() == (tmp_path / "c.pt").read_bytes()


def test_import_takes_size_and_words_from_the_centroids(tmp_path):
    made = save_pt(tmp_path / "a.pt", note="made by hand", tokens_dino=torch.arange(50 * 256).reshape(50, 256) % 690)
    centroids = np.random.default_rng(0).standard_normal((700, 3)).astype(np.float32)
    np.save(tmp_path / "km.npy", centroids)
    done = import_tokens(tmp_path / "a.pt", tmp_path / "s", centroids=tmp_path / "km.npy")
    shards = open_shards(tmp_path / "s")
    assert done.disc_size == shards.disc_size == 700 and done.ignored == ("note",)
    assert np.array_equal(shards.centroids, centroids) and shards.neighbours[0].shape == (700, 6)
    assert np.array_equal(shards.disc[:, 0], made["tokens_dino"].numpy())
    origin = shards.recipe["imported"]
    assert origin["sha256"] == hashlib.sha256((tmp_path / "a.pt").read_bytes()).hexdigest()


def test_import_refuses_by_name(tmp_path):
    """Key, row, position and both sides of a mismatch; nothing is left at the target."""
    for extra, text in (
        ({"tokens_vqgan": None}, "tokens_vqgan"),
        ({"labels": torch.zeros(49, dtype=torch.int64)}, r"labels is \(49,\), tokens_vqgan has 50 rows"),
        ({"tokens_dino": torch.zeros(50, 255, dtype=torch.int64)}, r"tokens_dino is \(50, 255\)"),
        ({"labels": torch.zeros(50)}, "labels is float32"),
        ({"labels": torch.full((50,), -2)}, "-2"),
        ({"tokens_vqgan": torch.full((50, 256), 1024)}, "--gen-size"),
        ({"tokens_dino": torch.full((50, 256), 16384)}, "--disc-size or --centroids"),
        ({"tokens_vqgan": torch.arange(50 * 256).reshape(50, 256) - 12799 + 1023}, "row 0, position 0 holds -11776"),
    ):
        save_pt(tmp_path / "a.pt", **extra)
        with pytest.raises(SemdictError, match=text):
            import_tokens(tmp_path / "a.pt", tmp_path / "s")
    save_pt(tmp_path / "a.pt")
    for option in ("gen_size", "disc_size"):
        with pytest.raises(ShardError, match="codebook size 0 is outside"):
            import_tokens(tmp_path / "a.pt", tmp_path / "s", **{option: 0})
    for wrong in (np.ones(4), np.ones((4, 3), int), np.ones((0, 3))):
        np.save(tmp_path / "km.npy", wrong)
        with pytest.raises(ShardError, match=r"km.npy is .*, expected centroids: floats \(K, D\)"):
            import_tokens(tmp_path / "a.pt", tmp_path / "s", centroids=tmp_path / "km.npy")
    save_pt(tmp_path / "a.pt", tokens_dino=None)
    np.save(tmp_path / "km.npy", np.ones((4, 3), np.float32))
    with pytest.raises(ShardError, match="belong to nothing"):
        import_tokens(tmp_path / "a.pt", tmp_path / "s", centroids=tmp_path / "km.npy")
    save_pt(tmp_path / "a.pt")
    with pytest.raises(ShardError, match=r"tokens_dino row \d+, position \d+ holds \d+, the codebook has 4"):
        import_tokens(tmp_path / "a.pt", tmp_path / "s", centroids=tmp_path / "km.npy")
    assert not (tmp_path / "s").exists()


class Evil:
    """A pickle that would write a file."""

    def __init__(self, target: Path) -> None:
        self.target = str(target)

    def __reduce__(self):
        return os.mkdir, (self.target,)


def test_import_runs_no_code(tmp_path):
    (tmp_path / "a.pt").write_bytes(pickle.dumps({"tokens_vqgan": Evil(tmp_path / "executed")}))
    torch.save({"tokens_vqgan": Evil(tmp_path / "executed")}, tmp_path / "b.pt")
    for name in ("a.pt", "b.pt"):
        assert main(["shards", "import", str(tmp_path / name), str(tmp_path / "s")]) == 1
    assert not (tmp_path / "executed").exists() and not (tmp_path / "s").exists()


@pytest.mark.parametrize("as_numpy", [False, True])
def test_pt_variants(tmp_path, as_numpy):
    """The older key `tokens`, labels (N, 1), tokens on their grid, numpy arrays, and class embeddings, which stay."""
    made = save_pt(tmp_path / "plain.pt")
    embeddings = torch.randn(1000, 12, generator=torch.Generator().manual_seed(1))
    content = {
        "tokens": made["tokens_vqgan"].reshape(50, 16, 16),
        "tokens_dino": made["tokens_dino"].reshape(50, 16, 16),
        "labels": made["labels"][:, None],
        "class_embeddings": embeddings,
    }
    torch.save({key: value.numpy() if as_numpy else value for key, value in content.items()}, tmp_path / "a.pt")
    assert import_tokens(tmp_path / "a.pt", tmp_path / "s").ignored == ()
    assert verify_shards(tmp_path / "s").problems == []
    shards = open_shards(tmp_path / "s")
    assert shards.grid == (16, 16) and np.array_equal(shards.class_embeddings, embeddings)
    export_tokens(tmp_path / "s", tmp_path / "b.pt", "pt")
    back = torch.load(tmp_path / "b.pt", weights_only=True)
    assert back.keys() == {*made, "class_embeddings"} and torch.equal(back["class_embeddings"], embeddings)
    assert all(back[key].dtype == value.dtype and torch.equal(back[key], value) for key, value in made.items())


def test_pt_of_other_shapes_and_kinds_is_refused(tmp_path):
    sparse = torch.zeros(50, 256, dtype=torch.int64).to_sparse()
    for extra, text in (
        ({"tokens_vqgan": sparse}, "tokens_vqgan is no plain tensor"),
        ({"tokens_vqgan": [[1, 2]]}, "tokens_vqgan is no plain tensor"),
        ({"tokens_vqgan": torch.zeros(50, 0, dtype=torch.int64), "tokens_dino": None}, r"is \(50, 0\), expected"),
        ({"tokens_vqgan": torch.zeros(0, 256, dtype=torch.int64)}, r"is \(0, 256\), expected"),
        ({"labels": torch.zeros(50, 2, dtype=torch.int64)}, r"labels is \(50, 2\)"),
        ({"tokens_vqgan": np.zeros((50, 256))}, "tokens_vqgan is float64"),
        ({"class_embeddings": torch.zeros(3, dtype=torch.int64)}, r"class_embeddings is int64 \(3,\)"),
    ):
        save_pt(tmp_path / "a.pt", **extra)
        with pytest.raises(ShardError, match=text):
            import_tokens(tmp_path / "a.pt", tmp_path / "s")
    assert not (tmp_path / "s").exists()


def test_pt_of_a_set_with_bad_rows_and_views(tmp_path):
    path, block, _ = write_awkward_set(tmp_path / "s", views=3)
    with pytest.raises(UsageError, match=r"3 views, .*--view 0..2"):
        export_tokens(path, tmp_path / "a.pt", "pt")
    with pytest.raises(UsageError, match="--view 3"):
        export_tokens(path, tmp_path / "a.pt", "pt", view=3)
    assert main(["shards", "export", str(path), str(tmp_path / "a"), "--to", "webdataset", "--view", "1"]) == 2
    left = export_tokens(path, tmp_path / "a.pt", "pt", view=1, split="val")
    rows = good_rows(block, "val")
    back = torch.load(tmp_path / "a.pt", weights_only=True)
    assert left == 20 - len(rows) and back["tokens_dino"].dtype == torch.int64
    assert np.array_equal(back["tokens_vqgan"].numpy(), block.gen[rows, 1])
    assert np.array_equal(back["tokens_dino"].numpy(), block.disc[rows, 1])
    assert np.array_equal(back["labels"].numpy(), block.label[rows])


@pytest.mark.parametrize("per_sample", [False, True])
def test_webdataset_reads_it(tmp_path, per_sample):
    """With the library itself: the good rows of each split, in order, under their keys."""
    import webdataset as wds

    path, block, keys = write_awkward_set(tmp_path / "s", views=2)
    assert export_tokens(path, tmp_path / "w", "webdataset", per_sample=per_sample) == int((block.status != 0).sum())
    about = json.loads((tmp_path / "w" / "dataset.json").read_text())
    assert sorted(about["tars"]) == ["train", "val"] and about["grid"] == [4, 4]
    for split, tars in about["tars"].items():
        rows = good_rows(block, split)
        files = [str(tmp_path / "w" / tar) for tar in tars]
        samples = list(wds.WebDataset(files, shardshuffle=False).decode())
        if per_sample:
            assert [s["json"]["key"] for s in samples] == [keys[row] for row in rows]
            assert [int(s["cls"]) for s in samples] == block.label[rows].tolist()
            ids = {name: np.stack([s[f"{name}.npy"] for s in samples]) for name in ("gen", "disc")}
        else:
            assert [key for s in samples for key in s["keys.json"]] == [keys[row] for row in rows]
            assert np.array_equal(np.concatenate([s["cls.npy"] for s in samples]), block.label[rows])
            ids = {name: np.concatenate([s[f"{name}.npy"] for s in samples]) for name in ("gen", "disc")}
        assert np.array_equal(ids["gen"], block.gen[rows]) and np.array_equal(ids["disc"], block.disc[rows])
        assert ids["gen"].dtype == np.uint16


@pytest.mark.parametrize("per_sample", [False, True])
def test_tars_are_reproducible_and_safe(tmp_path, per_sample):
    path, _, _ = write_awkward_set(tmp_path / "s")
    for name in ("a", "b"):
        export_tokens(path, tmp_path / name, "webdataset", per_sample=per_sample)
    for file in sorted((tmp_path / "a").iterdir()):
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()
        if file.suffix == ".tar":
            with tarfile.open(file) as tar:
                members = tar.getmembers()
                first = np.load(io.BytesIO(tar.extractfile(members[0]).read()))
            assert {member.mtime for member in members} == {0}
            assert not any(m.name.startswith("/") or ".." in m.name or not m.isfile() for m in members)
            assert len({m.name for m in members}) == len(members)
            assert first.dtype == np.uint16


@settings(max_examples=200, deadline=None)
@given(st.text(min_size=1, max_size=20), st.text(min_size=1, max_size=20))
def test_sample_names_are_distinct_and_plain(one, other):
    """Reversible, so two keys never share a name; no dot and no leading slash for any key."""
    from urllib.parse import unquote

    try:
        one.encode(), other.encode()
    except UnicodeEncodeError:
        return
    assert unquote(percent(one)) == one and (percent(one) == percent(other)) == (one == other)
    assert "." not in percent(one) and not percent(one).startswith("/")


def test_block_samples_hold_a_thousand_rows(tmp_path):
    """2,500 rows: blocks of 1,024, 1,024 and 452 in one tar."""
    rows = 2500
    gen = np.random.default_rng(0).integers(0, 9, (rows, 1, 4)).astype(np.uint16)
    index = pa.table(
        {"key": [str(r) for r in range(rows)], **{c: ["x"] * rows for c in ("split", "label_name", "reason")}}
    )
    block = Block(gen, None, np.zeros(rows, np.int32), np.zeros(rows, np.uint8))
    write_shards(tmp_path / "s", ShardSpec(rows, [{}], (4,), 9), [block], index, chunk_rows=100, shard_rows=700)
    assert [len(batch.rows) for batch in row_batches(open_shards(tmp_path / "s"), "x", 1024)] == [1024, 1024, 452]
    export_tokens(tmp_path / "s", tmp_path / "w", "webdataset")
    with tarfile.open(tmp_path / "w" / "x-000000.tar") as tar:
        members = tar.getnames()
    assert [m for m in members if m.endswith("gen.npy")] == [f"x-{n:06d}.gen.npy" for n in range(3)]
    assert not any("disc" in m for m in members)


def test_sets_of_262144_codes_go_through_every_export_and_loader(tmp_path):
    """Ids beyond 16 bits: .pt and back, tars with webdataset, parquet, both training loaders, and the entropy."""
    import webdataset as wds

    rng = np.random.default_rng(4)
    spec = ShardSpec(40, [{"name": "v0"}], (4, 4), 1 << 18, 300)
    gen, disc = rng.integers(0, 1 << 18, (40, 1, 16)).astype(np.uint32), rng.integers(0, 300, (40, 1, 16)).astype("u2")
    block = Block(gen, disc, np.arange(40, dtype=np.int32), (np.arange(40) == 7).astype(np.uint8))
    index = pa.table(
        {"key": [f"k{r}" for r in range(40)]} | {c: ["train"] * 40 for c in ("split", "label_name", "reason")}
    )
    write_shards(tmp_path / "s", spec, [block], index, chunk_rows=8, shard_rows=16)
    good = np.flatnonzero(block.status == 0)
    for layout, out in (("pt", "a.pt"), ("webdataset", "w"), ("hf", "h")):
        assert export_tokens(tmp_path / "s", tmp_path / out, layout) == 1
    import_tokens(tmp_path / "a.pt", tmp_path / "t", gen_size=1 << 18, disc_size=300)
    assert np.array_equal(open_shards(tmp_path / "t").gen[:], gen[good])
    (sample,) = wds.WebDataset([str(tmp_path / "w/train-000000.tar")], shardshuffle=False).decode()
    assert sample["gen.npy"].dtype == np.uint32 and np.array_equal(sample["gen.npy"], gen[good])
    (file,) = (tmp_path / "h/data").iterdir()
    assert np.array_equal(np.array(pq.read_table(file)["gen"].to_pylist()), gen[good, 0])
    with pytest.raises(UsageError, match="larger --dtype"):
        export_tokens(tmp_path / "s", tmp_path / "b.pt", "pt", dtype="int16")
    for loader in (
        ResidentLoader(table_from_shards(tmp_path / "s"), batch=13, seed=0),
        StreamingLoader(tmp_path / "w", ["train"], batch=13, seed=0),
    ):
        batches = [next(loader) for _ in range(3)]
        labels = torch.cat([batch["label"] for batch in batches])
        ids = torch.cat([batch["gen"] for batch in batches])
        assert sorted(labels.tolist()) == good.tolist()
        assert ids.dtype == torch.int64 and np.array_equal(ids.numpy(), gen[labels, 0])
    left = curves_of("s", gen[good, 0], np.full(16, 1 << 18)).entropy
    assert left[0] == pytest.approx(np.log2(39), abs=1e-9) and left.sum() == pytest.approx(np.log2(39))


def test_unknown_layouts_and_foreign_options(tmp_path, capsys):
    """The nearest layout is suggested; an option of another layout is refused by name."""
    path, _, _ = write_awkward_set(tmp_path / "s")
    (tmp_path / "a.parquet").write_bytes(b"")
    for arguments, text in (
        (["export", str(path), str(tmp_path / "o"), "--to", "webdatset"], "did you mean 'webdataset'?"),
        (["export", str(path), str(tmp_path / "o"), "--to", "csv"], "known: pt, webdataset, hf"),
        (["export", str(path), str(tmp_path / "o"), "--to", "hf", "--view", "1"], "--view belongs to --to pt"),
        (["export", str(path), str(tmp_path / "o"), "--to", "pt", "--per-sample"], "--per-sample belongs to --to web"),
        (["import", str(tmp_path / "a.parquet"), str(tmp_path / "o"), "--from", "ptt"], "did you mean 'pt'?"),
        (["import", str(tmp_path / "a.parquet"), str(tmp_path / "o")], ".pt (pt)"),
    ):
        assert main(["shards", *arguments]) == 2
        assert text in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


FOLDERS = ("hf", "webdataset")  # layouts that are folders, chosen by --from


def test_every_layout_of_the_tables_has_its_functions():
    for name in IMPORTERS.modules:
        assert callable(IMPORTERS.load(name).read)
        assert IMPORTERS.load(name).SUFFIXES or name in FOLDERS
    for name in EXPORTERS.modules:
        assert callable(EXPORTERS.load(name).export)


def test_existing_output_is_kept_without_overwrite(tmp_path):
    """A user's folder at the output path is refused, with --overwrite too, which replaces an earlier export."""
    path, _, _ = write_awkward_set(tmp_path / "s")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    save_pt(tmp_path / "a.pt")
    for command in (
        ["export", str(path), str(tmp_path / "mine"), "--to", "hf"],
        ["export", str(path), str(tmp_path / "mine"), "--to", "webdataset"],
        ["export", str(path), str(tmp_path / "a.pt"), "--to", "pt"],
        ["import", str(tmp_path / "a.pt"), str(tmp_path / "mine")],
    ):
        assert main(["shards", *command]) == 2
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "precious"
    assert main(["shards", "export", str(path), str(tmp_path / "mine"), "--to", "hf", "--overwrite"]) == 2
    assert (tmp_path / "mine" / "thesis.txt").exists()
    for options in ([], ["--overwrite"]):
        assert main(["shards", "export", str(path), str(tmp_path / "hub"), "--to", "hf", *options]) == 0


def test_info_as_json(tmp_path, capsys):
    path, block, _ = write_awkward_set(tmp_path / "s")
    assert main(["shards", "info", str(path), "--json"]) == 0
    info = json.loads(capsys.readouterr().out)
    good = block.status == 0
    assert info["rows"] == 60 and info["bad_rows"] == (~good).sum() and info["splits"] == {"val": 20, "train": 40}
    assert info["labelled_rows"] == (block.label >= 0).sum() and info["centroids"] == [300, 4]
    book = info["codebooks"]["disc"]
    counts = np.bincount(block.disc[good].ravel(), minlength=300)
    share = counts[counts > 0] / counts.sum()
    assert book["order0_entropy_bits"] == pytest.approx(-(share * np.log2(share)).sum(), abs=1e-4)
    assert book["used"] == (counts > 0).sum() and book["tokens"] == counts.sum()
    assert info["bytes"] == sum(f.stat().st_size for f in path.rglob("*") if f.is_file())
    assert main(["shards", "info", str(path)]) == 0
    assert "order-0 entropy" in capsys.readouterr().out
