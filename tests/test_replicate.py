"""The papers' comparisons: means and tables against hand-computed ones, and both end to end on twelve images."""

import json
import math
from pathlib import Path

import pytest
import yaml

from replicate import document, lease, photographs, vcq
from replicate.common import plus_minus, sets, spread
from replicate.variants import COMPONENTS, NEIGHBOUR_COUNTS, SCHEDULES
from tests import tiny
from tools.doc_tables import replace_tables

ROOT = Path(__file__).resolve().parent.parent


def test_spread_against_hand_computed_values():
    assert spread([1.0, 2.0, 4.0]) == {"mean": 7 / 3, "std": pytest.approx(math.sqrt(7 / 3)), "runs": 3}
    assert spread([5.0])["std"] == 0
    assert plus_minus({"mean": 7 / 3, "std": 1.5, "runs": 3}) == "2.33 ± 1.50"
    assert plus_minus(spread([5.0]), 1) == "5.0", "no spread for one run"


def test_each_row_changes_at_most_one_key():
    """The baseline is LEASE without its contrast; the papers' numbers are the printed ones."""
    for variants in (COMPONENTS, NEIGHBOUR_COUNTS, SCHEDULES):
        assert len({(*variant.changes, variant.objective) for variant in variants}) == len(variants)
        assert all(len(variant.changes) <= 1 for variant in variants)
    printed = {variant.name: variant.paper["probe"] for variant in COMPONENTS}
    assert printed == {"rec": 73.62, "lease": 76.11, "decoder": 74.20, "both": 76.07, "sorcen": 75.1}
    assert [variant.paper["gfid"] for variant in SCHEDULES] == [6.43, 5.32, 4.79, 5.14]


def test_the_tables_of_the_document_are_those_of_the_results():
    """docs/replicate.md is not edited by hand: its tables come from docs/results/*.json."""
    text = (ROOT / document.DOCUMENT).read_text()
    assert replace_tables(text, document.tables(ROOT / document.RESULTS)) == text, "run python -m replicate.document"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Images, tokens and a params.yaml whose trainers take a step or two."""
    root = tmp_path_factory.mktemp("replicate")
    tiny.make_world(root)
    probe = {"epochs": 2, "warmup_epochs": 1, "batch": 4}
    teacher = {"kind": "features", "weights": str(root / "teacher.pth"), **tiny.TEACHER, "layers": 1}
    short = {"steps": 2, "batch": 4, "warmup": 1, "hold": 1, "precision": "float32", "held_out": ["train"]}
    stack = {"patch": 64, "tokens": 16, "encoder": [1, 32, 2], "decoder": [1, 32, 2], "k_max": 16}
    tree = tiny.params(root)
    tree["inputs"]["perceptual"] = teacher["weights"]
    tree["kmeans"]["k"] = 32  # 30 neighbours need a larger codebook
    sections = {
        "pretrain": {"size": "tiny", "width": 16, "decoder_width": 16, "batch": 4, "precision": "float32"},
        "generate": {"batch": 4, "steps": 2},
        "evaluate": {"batch": 4, "test_splits": ["train"], "probe": probe},
        "scores": {"protocol": "teacher", "split": "train", "batch": 4, "kid_subsets": 2},
        "vcq": {**short, **stack, "perceptual": [teacher], "adversarial_weight": 0.0},
        "vcq_encode": {"batch": 4, "chunk": 4, "psnr_floor": 0.0, "psnr_images": 2},
        "ar": {**short, "size": "tiny"},
        "ar_sample": {"per_class": 2, "batch": 6},
        "vcq_evaluate": {"test_splits": ["train"], "batch": 4, "probe": {**probe, "first": [2, 16]}},
    }  # fmt: skip
    tree = tiny.replaced(tree, **sections)
    (root / "params.yaml").write_text(yaml.safe_dump(tree))
    tiny.run_until_centroids(root)
    assert tiny.semdict(root, "encode") == 0
    return root


@pytest.mark.slow
def test_lease_end_to_end_and_a_second_run_does_nothing(world, monkeypatch, capsys):
    monkeypatch.chdir(world)
    arguments = ["--seeds", "2", "--epochs", "1", "--samples", "6"]
    assert lease.main(arguments) == 0
    results = json.loads((world / "reports/tiny/replicate/lease.json").read_text())
    assert set(results["components"]) == {variant.name for variant in COMPONENTS}
    rows = results["components"]
    assert results["probe_gain"] == rows["lease"]["probe"]["mean"] - rows["rec"]["probe"]["mean"]
    assert rows["lease"]["runs"][0]["reconstruction"] != rows["lease"]["runs"][1]["reconstruction"], "seeds differ"
    assert rows["lease"]["runs"] == results["neighbours"]["lease"]["runs"], "one run is in both tables"
    table = (world / "reports/tiny/replicate/lease.md").read_text()
    assert table == lease.text(results), "the tables can be made from the file alone"
    assert "76.11" in table
    capsys.readouterr()
    before = tiny.digest(world / "work" / "replicate")
    assert lease.main(arguments) == 0
    assert tiny.digest(world / "work" / "replicate") == before
    assert "step" not in capsys.readouterr().err


@pytest.mark.slow
def test_photographs_keep_every_complete_run_in_one_file(world, monkeypatch, capsys):
    monkeypatch.chdir(world)
    (world / "docs/results").mkdir(parents=True)
    changes = ("pretrain.epochs=1", "pretrain.warmup_epochs=0", "evaluate.knn.k=3", "evaluate.few_shot.shots=[1,2]",
               "evaluate.few_shot.batch=2")  # fmt: skip
    arguments = ["--rows", "rec", "lease", "--samples", "6", *sets(changes)]
    assert photographs.main([*arguments, "--seeds", "0"]) == 0
    file = world / "docs/results/tiny.json"
    first = json.loads(file.read_text())
    assert [(run["row"], run["seed"]) for run in first["runs"]] == [("reconstruction", 0), ("lease", 0)]
    assert first["settings"]["teacher"] == tiny.TEACHER["model"]
    assert first["settings"]["epochs"] == 1
    run = first["runs"][1]
    card = json.loads((world / "work/photographs/tiny/lease-0/probe.json").read_text())
    assert run["probe_top1"] == card["top1"]
    assert {"knn_top1", "few_shot_2", "distance", "precision", "recall", "reconstruction"} <= run.keys()
    capsys.readouterr()
    assert photographs.main([*arguments, "--seeds", "0", "1"]) == 0
    assert "lease-0/run is complete" in capsys.readouterr().err
    second = json.loads(file.read_text())
    assert [run for run in second["runs"] if run["seed"] == 0] == first["runs"]
    assert len(second["runs"]) == 4
    assert len({run["reconstruction"] for run in second["runs"] if run["row"] == "lease"}) == 2, "seeds differ"
    rows = photographs.table(second).splitlines()
    values = [run["probe_top1"] for run in second["runs"] if run["row"] == "lease"]
    assert len(rows) == 4
    assert f"| {plus_minus(spread(values))} |" in rows[3]
    assert rows[3].endswith("| 76.11 | 10.35 |")


@pytest.mark.slow
def test_vcq_end_to_end(world, monkeypatch):
    monkeypatch.chdir(world)
    assert vcq.main([]) == 0
    results = json.loads((world / "reports/tiny/replicate/vcq.json").read_text())
    rows = results["schedules"]
    assert set(rows) == {variant.name for variant in SCHEDULES}
    means = [rows[variant.name]["k_mean"]["mean"] for variant in SCHEDULES]
    assert means[0] == 16
    assert means == sorted(means, reverse=True)
    assert len(set(means)) == 4
    table = (world / "reports/tiny/replicate/vcq.md").read_text()
    assert table == vcq.text(results)
    assert "27.98" in table
    assert "43.77 (k = 10)" in table
