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
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from semdict.cli import main
from semdict.pipeline.common.errors import SemdictError, ShardError, UsageError
from semdict.pipeline.shards import FILL, Block, ShardSpec, open_shards, verify_shards, write_shards
from semdict.pipeline.shards.formats import EXPORTERS, IMPORTERS, export_tokens, import_tokens
from semdict.pipeline.shards.layouts.hub import LICENCES, size_category
from semdict.pipeline.shards.layouts.webdataset import percent
from semdict.pipeline.shards.rows import row_batches

KEYS = ("a.b/c.d.JPEG", "../up", "/abs", "ünïcode key", "100%", "plain", "照片/" * 60)


def write_set(
    path: Path, rows: int = 60, views: int = 1, title: str = "synthetic", licence: str = "mit"
) -> tuple[Path, Block, list[str]]:
    """Writes a set with two interleaved splits, rows without tokens and keys that no file system would take."""
    rng = np.random.default_rng(1)
    spec = ShardSpec(rows, [{"name": f"v{v}"} for v in range(views)], (4, 4), 40, 300, title=title, licence=licence)
    status = (np.arange(rows) % 7 == 3).astype(np.uint8)
    gen, disc = (rng.integers(0, size, (rows, views, 16)).astype(np.uint16) for size in (40, 300))
    gen[status != 0] = disc[status != 0] = FILL
    block = Block(gen, disc, rng.integers(-1, 5, rows).astype(np.int32), status)
    keys = [f"{KEYS[row % len(KEYS)]}{row}" for row in range(rows)]
    splits = ["val" if row % 3 == 0 else "train" for row in range(rows)]
    index = pa.table({"key": keys, "split": splits, "label_name": ["x"] * rows, "reason": [""] * rows})
    centroids = rng.standard_normal((300, 4)).astype(np.float32)
    write_shards(path, spec, [block], index, centroids, chunk_rows=8, shard_rows=16)
    return path, block, keys


def good_rows(block: Block, split: str | None) -> np.ndarray:
    rows = np.arange(len(block.label))
    in_split = {"val": rows % 3 == 0, "train": rows % 3 != 0, None: rows >= 0}[split]
    return rows[in_split & (block.status == 0)]


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
    words = np.random.default_rng(0).standard_normal((700, 3)).astype(np.float32)
    np.save(tmp_path / "km.npy", words)
    done = import_tokens(tmp_path / "a.pt", tmp_path / "s", centroids=tmp_path / "km.npy")
    shards = open_shards(tmp_path / "s")
    assert done.disc_size == shards.disc_size == 700 and done.ignored == ("note",)
    assert np.array_equal(shards.centroids, words) and shards.neighbours[0].shape == (700, 6)
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


def test_pt_of_a_set_with_bad_rows_and_views(tmp_path):
    path, block, _ = write_set(tmp_path / "s", views=3)
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

    path, block, keys = write_set(tmp_path / "s", views=2)
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
    path, _, _ = write_set(tmp_path / "s")
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
    """Reversible, so two keys never share a name; no dot and no leading slash, whatever the key."""
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


@pytest.mark.parametrize("views", [1, 2])
def test_hub_folder(tmp_path, views):
    """Parquet per split with the ids, the card's header names the files, nothing of bad rows."""
    path, block, keys = write_set(tmp_path / "s", views=views)
    assert export_tokens(path, tmp_path / "h", "hf") == int((block.status != 0).sum())
    text = (tmp_path / "h" / "README.md").read_text()
    header = yaml.safe_load(text.split("---")[1])
    assert header["license"] == "mit" and header["size_categories"] == ["n<1K"] and "extra_gated_prompt" not in header
    entries = {entry["split"]: entry["path"] for entry in header["configs"][0]["data_files"]}
    for split, pattern in entries.items():
        table = pa.concat_tables(pq.read_table(file) for file in sorted((tmp_path / "h").glob(pattern)))
        rows = good_rows(block, split)
        assert table["row"].to_pylist() == rows.tolist() and table["key"].to_pylist() == [keys[r] for r in rows]
        assert table["label"].to_pylist() == block.label[rows].tolist()
        for name in ("gen", "disc"):
            want = getattr(block, name)[rows]
            assert np.array_equal(np.array(table[name].to_pylist()), want[:, 0] if views == 1 else want)
    assert np.array_equal(np.load(tmp_path / "h/codebooks/centroids.npy"), open_shards(path).centroids)


def card_of(folder: Path):
    """The card as the Hub's own library reads it."""
    from huggingface_hub import DatasetCard

    return DatasetCard.load(folder / "README.md")


def test_card_of_imagenet_is_gated(tmp_path):
    path, _, _ = write_set(tmp_path / "s", title="ImageNet-1k tokens")
    export_tokens(path, tmp_path / "h", "hf", licence="mit")
    data = card_of(tmp_path / "h").data
    assert data.license == "other" and data.license_name == "imagenet"
    assert "non-commercial" in data.extra_gated_prompt


def test_card_has_a_licence_of_the_hub(tmp_path, capsys):
    """An id in another spelling is mended; free text is refused with the nearest id, and --licence answers it."""
    path, _, _ = write_set(tmp_path / "s", licence="CC0-1.0")
    export_tokens(path, tmp_path / "h", "hf")
    assert card_of(tmp_path / "h").data.license == "cc0-1.0"
    path, _, _ = write_set(tmp_path / "t", licence="CC BY 4")
    command = ["shards", "export", str(path), str(tmp_path / "i"), "--to", "hf"]
    assert main(command) == 2
    message = capsys.readouterr().err
    assert "'CC BY 4'" in message and "did you mean 'cc-by-4.0'?" in message and "--licence" in message
    assert not (tmp_path / "i").exists()
    assert main([*command, "--licence", "cc-by-4.0"]) == 0
    assert card_of(tmp_path / "i").data.license == "cc-by-4.0"
    assert main([*command, "--licence", "other", "--overwrite"]) == 0
    data = card_of(tmp_path / "i").data
    assert data.license == "other" and data.license_name == "cc-by-4"


def test_size_categories_are_those_of_the_hub():
    """Ids as the library's docstring lists them; each limit belongs to the category above it."""
    from huggingface_hub import DatasetCardData

    sizes = [999, 1000, 99_999, 10**6, 10**7, 10**8, 10**9, 10**10, 10**11, 10**12]
    names = [size_category(rows) for rows in sizes]
    assert names == ["n<1K", "1K<n<10K", "10K<n<100K", "1M<n<10M", "10M<n<100M", "100M<n<1B", "1B<n<10B", "10B<n<100B",
                     "100B<n<1T", "n>1T"]  # fmt: skip
    assert all(f"'{name}'" in DatasetCardData.__doc__ for name in names)
    assert {"mit", "cc-by-nc-4.0", "other"} < LICENCES


def test_unknown_layouts_and_foreign_options(tmp_path, capsys):
    """The nearest layout is suggested; an option of another layout is refused by name."""
    path, _, _ = write_set(tmp_path / "s")
    (tmp_path / "a.parquet").write_bytes(b"")
    for words, text in (
        (["export", str(path), str(tmp_path / "o"), "--to", "webdatset"], "did you mean 'webdataset'?"),
        (["export", str(path), str(tmp_path / "o"), "--to", "csv"], "known: pt, webdataset, hf"),
        (["export", str(path), str(tmp_path / "o"), "--to", "hf", "--view", "1"], "--view belongs to --to pt"),
        (["export", str(path), str(tmp_path / "o"), "--to", "pt", "--per-sample"], "--per-sample belongs to --to web"),
        (["import", str(tmp_path / "a.parquet"), str(tmp_path / "o"), "--from", "ptt"], "did you mean 'pt'?"),
        (["import", str(tmp_path / "a.parquet"), str(tmp_path / "o")], ".pt (pt)"),
    ):
        assert main(["shards", *words]) == 2
        assert text in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def test_every_layout_of_the_tables_has_its_functions():
    for name in IMPORTERS.modules:
        assert callable(IMPORTERS.load(name).read) and IMPORTERS.load(name).SUFFIXES
    for name in EXPORTERS.modules:
        assert callable(EXPORTERS.load(name).export)


def test_hub_folder_loads_offline(tmp_path, monkeypatch):
    """With the `datasets` library, no network."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets = pytest.importorskip("datasets", reason="the datasets library is no dependency of the project")
    path, block, _ = write_set(tmp_path / "s")
    export_tokens(path, tmp_path / "h", "hf")
    dataset = datasets.load_dataset(str(tmp_path / "h"), cache_dir=str(tmp_path / "cache"))
    assert {name: part.num_rows for name, part in dataset.items()} == {
        split: len(good_rows(block, split)) for split in ("train", "val")
    }
    ids = np.array(dataset["train"]["disc"][:])
    assert np.array_equal(ids, block.disc[good_rows(block, "train"), 0])


def test_existing_output_is_kept_without_overwrite(tmp_path):
    """A user's folder at the output path is refused, with --overwrite too, which replaces an earlier export."""
    path, _, _ = write_set(tmp_path / "s")
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
    path, block, _ = write_set(tmp_path / "s")
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
