"""`semdict entropy` on shard directories of every kind: numbers, curves, figure, error messages."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from semdict.cli import main
from semdict.pipeline.analysis.curves import EntropyCurves, curves_of, equation_1, spent
from semdict.pipeline.analysis.entropy_figures import plot_curves
from semdict.pipeline.shards import Block, ShardSpec, write_shards
from semdict.train.vcq.schedule import codebook_sizes
from tests.token_sets import make_index, make_set, write

L = 16


def write_growing_set(path: Path, rows: int = 60, views: int = 2) -> np.ndarray:
    """Writes a set with codebook sizes that grow, whose second view repeats the first; returns the sizes."""
    sizes = codebook_sizes("cosine", L, 2, 32).numpy()
    rng = np.random.default_rng(1)
    gen = np.repeat((rng.random((rows, 1, L)) * sizes).astype(np.uint16), views, axis=1)
    spec = ShardSpec(rows, [{"name": f"v{v}"} for v in range(views)], (L,), sizes.tolist(), None, recipe={})
    block = Block(gen, None, np.zeros(rows, np.int32), np.zeros(rows, np.uint8))
    index = make_index(rows, split=lambda row: "val" if row % 3 == 0 else "train")
    write_shards(path, spec, [block], index, chunk_rows=32, shard_rows=64)
    return sizes


def write_model_run(path: Path, sizes: np.ndarray) -> Path:
    """Writes the part of a run of `semdict ar train` that this command reads."""
    bits = {"train": np.log2(sizes).tolist(), "held_out": (np.log2(sizes) + 1).tolist()}
    path.mkdir(parents=True)
    (path / "nll.json").write_text(json.dumps({"sizes": sizes.tolist(), "bits": bits, "train_images": 9}))
    return path


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    spec, block = make_set(views=1, bad=0.1)
    write(tmp_path / "pair", spec, block)
    sizes = write_growing_set(tmp_path / "grown")
    write_model_run(tmp_path / "ar", sizes)
    return tmp_path


def entropy(*arguments: str) -> int:
    return main(["entropy", *arguments, "--params", str(Path(__file__).parent.parent / "params.yaml"), "--out", "out"])


def column(name: str, key: str) -> np.ndarray:
    with (Path("out") / f"{name}.csv").open() as file:
        return np.array([float(row[key]) for row in csv.DictReader(file)])


def test_any_shard_directory(folder, capsys):
    assert entropy("pair", "grown", "--ar", "ar") == 0
    numbers = json.loads(Path("out/entropy.json").read_text())
    assert {"pair-gen", "pair-disc", "grown-gen"} == numbers.keys() - {"about"}
    grown = numbers["grown-gen"]
    assert grown["sequences"] == 120, "every view is a sequence"
    assert grown["joint_bits"] == pytest.approx(np.log2(60)), "both views of an image are one sequence"
    sizes = codebook_sizes("cosine", L, 2, 32)
    assert grown["t_star"] == next(t for t in range(L) if sizes[:t].double().log2().sum() >= np.log2(120))
    assert grown["t_star_one_size"] == 2, "log2(120) / log2(32) = 1.38"
    assert grown["capacity_bits"] == pytest.approx(float(sizes.double().log2().sum()))
    assert grown["nll_bits_held_out"] == pytest.approx(grown["nll_bits_train"] + L)
    assert "nll_bits_train" not in numbers["pair-gen"]
    assert numbers["pair-disc"]["k_max"] == 300
    left = column("grown-gen", "remaining")
    assert left[0] == pytest.approx(np.log2(120))
    assert (np.diff(left) <= 1e-9).all()
    assert np.diff(left)[:3] == pytest.approx(-column("grown-gen", "entropy")[:3])
    assert (column("grown-gen", "capacity") <= column("grown-gen", "uniform_null") + 1e-9).all()
    picture = Image.open("out/entropy.png")
    assert picture.width > 1000
    assert len(np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3), axis=0)) > 50
    shown = capsys.readouterr().out
    assert "t* of these sizes (eq. 2)" in shown
    assert "grown-gen" in shown.splitlines()[0]


def test_one_view_and_one_split(folder):
    assert entropy("grown", "--view", "v1", "--split", "train") == 0
    numbers = json.loads(Path("out/entropy.json").read_text())["grown-gen"]
    assert numbers["sequences"] == 40
    assert numbers["joint_bits"] == pytest.approx(np.log2(40))


def test_mistakes_are_named(folder, capsys):
    other = write_model_run(folder / "other", codebook_sizes("linear", L, 2, 32).numpy())
    cases = [
        (["grown", "--view", "sideways"], "it has v0, v1"),
        (["grown", "--ar", str(other)], "16 positions of up to 32 codes, as 0 sets have"),
        (["grown", "--ar", "nowhere"], "nll.json does not exist"),
        (["grown", "grown"], "two sets would have one name"),
        (["out"], "not a token shard directory"),
    ]
    Path("out").mkdir()
    for arguments, message in cases:
        assert entropy(*arguments) == 2
        assert message in capsys.readouterr().err
    (other / "nll.json").write_text('{"sizes": [2, 2], "bits": {"train": [1.0]}}')
    assert entropy("grown", "--ar", str(other)) == 1
    assert "damaged" in capsys.readouterr().err


def test_numbers_of_table_1():
    """ImageNet's row and thresholds: t* 2, K^2 = 209.5 x N, K^3 = 3.43e6 x N (table 1 of arXiv:2605.06207)."""
    none = np.zeros(256)
    curves = EntropyCurves("imagenet", 1_281_167, np.full(256, 16384), none, none, none)
    numbers = curves.numbers()
    assert numbers["log2_n"] == pytest.approx(20.29, abs=5e-3)
    assert numbers["t_star_one_size"] == numbers["t_star"] == 2
    assert 1 / numbers["n_over_k_to_2"] == pytest.approx(209.5, rel=1e-3)
    assert 1 / numbers["n_over_k_to_3"] == pytest.approx(3.43e6, rel=1e-3)
    assert [equation_1(n, 16384) for n in (50_000, 118_000, 12_000_000, 400_000_000, 5_000_000_000)] == [2, 2, 2, 3, 3]
    assert equation_1(16384**2, 16384) == 2
    assert equation_1(100, 1) is None


def test_spent_is_the_number_of_positions_with_99_per_cent():
    assert spent(np.array([3.0, 0.96, 0.04, 0.0]), 4.0) == 2
    assert spent(np.array([3.0, 0.95, 0.05]), 4.0) == 3
    assert spent(np.zeros(3), 0.0) == 0


def test_the_figure_of_sets_without_information(tmp_path):
    """One code, one sequence repeated, one position."""
    plot_curves(tmp_path / "a.png", [curves_of("same", np.zeros((5, 1), np.uint8), np.array([1]))])
    plot_curves(tmp_path / "b.png", [curves_of("long", np.zeros((5, 9), np.uint8), np.full(9, 4))])
    assert (tmp_path / "a.png").stat().st_size > 1000
