"""`semdict analyse`: counts, entropies, class averages and PMI against brute force; figures; sizes on disk."""

import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from sklearn.metrics import mutual_info_score

from semdict.cli import main
from semdict.pipeline.analysis import disk
from semdict.pipeline.analysis.cooccurrence import conditional_entropies, independent_entropies, strongest_pairs
from semdict.pipeline.analysis.token_counts import class_average_top, count_tokens
from semdict.pipeline.manifest.table import COLUMNS
from semdict.pipeline.shards import open_shards
from tests.token_sets import make_set, write, write_awkward_set

PARAMS = str(Path(__file__).parent.parent / "params.yaml")


def analyse(*arguments: str) -> int:
    return main(["analyse", *arguments, "--params", PARAMS, "--out", "out"])


def result() -> dict:
    return json.loads(Path("out/analyse.json").read_text())


@pytest.fixture(scope="module")
def related(tmp_path_factory):
    """A set of 80 images in which half of the generative ids follow the discriminative one."""
    spec, block = make_set(rows=80, views=2, gen_sizes=12, disc_size=30, bad=0.1, seed=3)
    follow = np.random.default_rng(0).random(block.gen.shape) < 0.5
    good = (block.status == 0)[:, None, None]
    block.gen[:] = np.where(follow & good, block.disc % 12, block.gen)
    return write(tmp_path_factory.mktemp("sets") / "related", spec, block), block


def test_counts_are_those_of_a_loop(related):
    path, block = related
    counts = count_tokens(open_shards(path))
    pairs, classes = Counter(), Counter()
    for row in np.flatnonzero(block.status == 0):
        for g, d in zip(block.gen[row].ravel().tolist(), block.disc[row].ravel().tolist(), strict=True):
            pairs[g, d] += 1
            classes[int(block.label[row]), d] += block.label[row] >= 0
    assert all(counts.joint[g, d] == pairs[g, d] for g in range(12) for d in range(30))
    assert counts.cells == counts.joint.sum() == 2 * 16 * counts.rows
    assert all(counts.by_class["disc"][c, d] == classes[c, d] for c in range(5) for d in range(30))
    one = count_tokens(open_shards(path), view="v1")
    good = block.status == 0
    assert np.array_equal(one.joint.sum(axis=0), np.bincount(block.disc[good, 1].ravel(), minlength=30))


def test_conditional_entropies_are_those_of_scikit_learn(related):
    """H(GEN | DISC) = H(GEN) - I(GEN; DISC), and each token's by its definition."""
    path, block = related
    joint = count_tokens(open_shards(path)).joint
    per_disc, per_gen = conditional_entropies(joint)
    good = block.status == 0
    gen, disc = block.gen[good].ravel(), block.disc[good].ravel()
    information = mutual_info_score(gen, disc)
    for ids, other, values in ((disc, gen, per_disc), (gen, disc, per_gen)):
        weight = np.bincount(ids, minlength=len(values)) / len(ids)
        assert (weight * values).sum() == pytest.approx(mutual_info_score(other, other) - information, abs=1e-10)
        for number in range(len(values)):
            share = np.bincount(other[ids == number]) / (ids == number).sum()
            assert values[number] == pytest.approx(-sum(p * math.log(p) for p in share if p), abs=1e-12)


def test_entropies_by_blocks_are_those_of_the_whole_table(monkeypatch, related):
    joint = count_tokens(open_shards(related[0])).joint
    whole, null = conditional_entropies(joint), independent_entropies(joint, 1)
    monkeypatch.setattr("semdict.pipeline.analysis.cooccurrence.BLOCK", 40)
    for blocks, want in zip(
        (conditional_entropies(joint), independent_entropies(joint, 1)), (whole, null), strict=True
    ):
        assert all(np.allclose(a, b, atol=1e-12) for a, b in zip(blocks, want, strict=True))


def test_the_null_has_the_entropy_of_shuffled_tokens():
    """Independent draws against tokens shuffled over the cells: equal means within the sampling error."""
    rng = np.random.default_rng(0)
    gen, disc = (rng.integers(0, 40, 20000) ** 2 // 40 for _ in range(2))
    joint = np.zeros((40, 40), np.int64)
    np.add.at(joint, (gen, rng.permutation(disc)), 1)
    for shuffled, drawn in zip(conditional_entropies(joint), independent_entropies(joint), strict=True):
        assert np.nanmean(shuffled) == pytest.approx(np.nanmean(drawn), abs=0.02)
    deterministic = np.diag(np.full(8, 50))
    assert np.allclose(conditional_entropies(deterministic), 0)
    assert all((null > 1.5).all() for null in independent_entropies(deterministic))
    unused = np.zeros((3, 4), np.int64)
    unused[0, 0] = 5
    assert np.isnan(independent_entropies(unused)[0][1:]).all() and np.isnan(conditional_entropies(unused)[1][1:]).all()


def test_class_average_by_hand():
    table = np.array([[6, 3, 1, 0], [0, 0, 0, 0], [0, 2, 0, 2]])
    assert class_average_top(table, 3) == pytest.approx([(0.6 + 0.5) / 2, (0.3 + 0.5) / 2, 0.1 / 2])
    assert class_average_top(table, 9).sum() == pytest.approx(1)
    assert np.isnan(class_average_top(np.zeros((0, 4)), 2)).all()


def test_the_pmi_map_holds_the_strongest_pairs():
    """Ids and values by a loop over all pairs; rare pairs are left out."""
    rng = np.random.default_rng(1)
    joint = rng.poisson(rng.gamma(0.4, 20, (30, 50)))
    joint[29, 49] = 3  # the only cells of two ids: the highest PMI there is
    joint[29, :49] = joint[:29, 49] = 0
    gen, disc, pmi = strongest_pairs(joint, 8, min_count=10)
    total = joint.sum()
    want = {}
    for g in range(30):
        for d in range(50):
            if joint[g, d] >= 10:
                want[g, d] = math.log(joint[g, d] * total / (joint[g].sum() * joint[:, d].sum()))
    ranked = sorted(want, key=lambda pair: -want[pair])
    assert (gen[0], disc[0]) == ranked[0] and len(gen) == len(disc) == 8
    assert 29 not in gen and 49 not in disc
    for i, g in enumerate(gen.tolist()):
        for j, d in enumerate(disc.tolist()):
            expected = joint[g, d] * total / (joint[g].sum() * joint[:, d].sum())
            assert pmi[i, j] == pytest.approx(math.log(expected)) if joint[g, d] else pmi[i, j] == -np.inf
    assert strongest_pairs(joint, 8, min_count=1)[0][0] == 29
    none = strongest_pairs(joint, 8, min_count=10**6)
    assert none[2].shape == (0, 0)


def test_the_command_writes_numbers_and_figures(related, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path, block = related
    arguments = [str(path), "--set", "analyse.bound=1.5", "--set", "analyse.min_count=2", "--original-bytes", "1000000"]
    assert analyse(*arguments, "--set", "analyse.split=null") == 0
    numbers = result()
    joint = count_tokens(open_shards(path)).joint
    per_disc, per_gen = conditional_entropies(joint)
    assert numbers["gen_given_disc"]["under_bound"] == (per_disc < 1.5).sum()
    assert numbers["disc_given_gen"]["mean_nats"] == pytest.approx(per_gen.mean())
    assert numbers["gen_given_disc"]["mean_nats"] < numbers["gen_given_disc"]["unrelated_mean_nats"], "ids are related"
    (about,) = numbers["about"]
    assert about["images"] == (block.status == 0).sum() and about["codebooks"] == {"gen": 12, "disc": 30}
    assert np.shape(about["pmi"]["nats"]) == (12, 30)
    assert sum(about["class_average_top"]["gen"]) == pytest.approx(1), "12 codes, all of them among the first 20"
    rows = {row["method"]: row for row in about["disk"]}
    assert rows["Sorcen"]["per_cent"] == 0.29 and rows["gen tokens"]["per_cent"] == rows["gen tokens"]["bytes"] / 1e4
    for name in ("conditional_entropy", "class_tokens", "pmi"):
        assert len(Image.open(f"out/{name}.png").convert("RGB").getcolors(1 << 24)) > 50
    shown = capsys.readouterr().out
    assert "H(GEN | DISC)" in shown and "whole directory" in shown and "JPEG 5" in shown


def test_sizes_come_from_the_manifest_of_the_same_images(tmp_path, monkeypatch):
    """Bytes of the images with tokens; another manifest is refused."""
    monkeypatch.chdir(tmp_path)
    path, block, keys = write_awkward_set(tmp_path / "set")
    columns = {"key": keys, "label_name": [""] * 60, "split": [""] * 60, "source": [""] * 60, "sha256": [""] * 60}
    columns |= {"reason": [""] * 60, "bytes": list(range(1000, 1060)), "label": [0] * 60}
    columns |= {name: [0] * 60 for name in ("offset", "width", "height", "status")}
    table = pa.table({field.name: columns[field.name] for field in COLUMNS}, schema=COLUMNS)
    pq.write_table(table, "manifest.parquet")
    total = sum(1000 + row for row in range(60) if block.status[row] == 0)
    assert disk.bytes_of_images(open_shards(path), Path("manifest.parquet")) == total
    assert analyse(str(path), "--manifest", "manifest.parquet") == 0
    rows = {row["method"]: row for row in result()["about"][0]["disk"]}
    stored = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    assert rows["whole directory"]["bytes"] == stored
    assert rows["whole directory"]["per_cent"] == pytest.approx(100 * stored / total)
    pq.write_table(table.slice(1), "other.parquet")
    assert analyse(str(path), "--manifest", "other.parquet") == 1


def test_mistakes_are_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    spec, block = make_set(disc_size=None)
    write(tmp_path / "one", spec, block)
    write(tmp_path / "pair", *make_set())
    cases = [
        (["one"], 2, "generative tokens only"),
        (["pair", "--set", "analyse.split=test"], 1, "no split 'test'"),
        (["pair", "--set", "analyse.view=side"], 2, "it has v0"),
        (["nowhere"], 2, "nowhere"),
    ]
    for arguments, status, message in cases:
        assert analyse(*arguments) == status
        assert message in capsys.readouterr().err
    monkeypatch.setattr("semdict.pipeline.analysis.token_counts.LARGEST_TABLE", 40 * 300 - 1)
    assert analyse("pair") == 2
    assert "codebooks of 40 and 300 entries" in capsys.readouterr().err
