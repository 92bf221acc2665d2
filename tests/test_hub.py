"""Export to a folder for the Hugging Face Hub, read by pyarrow, datasets and huggingface_hub themselves."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from semdict.cli import main
from semdict.pipeline.shards import open_shards
from semdict.pipeline.shards.convert import export_tokens
from semdict.pipeline.shards.layouts.card import LICENCES, size_category
from tests.token_sets import good_rows, write_awkward_set


@pytest.mark.parametrize("views", [1, 2])
def test_hub_folder(tmp_path, views):
    """Parquet per split with the ids, the card's header names the files, nothing of bad rows."""
    path, block, keys = write_awkward_set(tmp_path / "s", views=views)
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
    path, _, _ = write_awkward_set(tmp_path / "s", title="ImageNet-1k tokens")
    export_tokens(path, tmp_path / "h", "hf", licence="mit")
    data = card_of(tmp_path / "h").data
    assert data.license == "other" and data.license_name == "imagenet"
    assert "non-commercial" in data.extra_gated_prompt


def test_card_has_a_licence_of_the_hub(tmp_path, capsys):
    """An id in another spelling is mended; free text is refused with the nearest id, and --licence answers it."""
    path, _, _ = write_awkward_set(tmp_path / "s", licence="CC0-1.0")
    export_tokens(path, tmp_path / "h", "hf")
    assert card_of(tmp_path / "h").data.license == "cc0-1.0"
    path, _, _ = write_awkward_set(tmp_path / "t", licence="CC BY 4")
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


def test_hub_folder_loads_offline(tmp_path, monkeypatch):
    """With the `datasets` library, no network."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets = pytest.importorskip("datasets", reason="the datasets library is no dependency of the project")
    path, block, _ = write_awkward_set(tmp_path / "s")
    export_tokens(path, tmp_path / "h", "hf")
    dataset = datasets.load_dataset(str(tmp_path / "h"), cache_dir=str(tmp_path / "cache"))
    assert {name: part.num_rows for name, part in dataset.items()} == {
        split: len(good_rows(block, split)) for split in ("train", "val")
    }
    ids = np.array(dataset["train"]["disc"][:])
    assert np.array_equal(ids, block.disc[good_rows(block, "train"), 0])
