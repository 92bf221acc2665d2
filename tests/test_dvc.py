"""The pipeline as DVC runs it: whole graph, nothing done twice, tokens that travel to a second clone.

What each stage depends on is tested in test_dvc_deps.py.
"""

import csv
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from semdict.pipeline.config.command import awaited_folders
from semdict.pipeline.config.presets import preset_names
from semdict.pipeline.shards import open_shards, verify_shards
from semdict.train.vcq.schedule import codebook_sizes
from tests import tiny

ROOT = Path(__file__).resolve().parent.parent
STAGES = ("manifest", "sample_features", "kmeans", "encode")
# A user's git and DVC settings must not decide what the test sees.
ENV = {
    **os.environ,
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    "GIT_CONFIG_GLOBAL": os.devnull,
    "GIT_AUTHOR_NAME": "t",
    "GIT_AUTHOR_EMAIL": "t@example.org",
    "GIT_COMMITTER_NAME": "t",
    "GIT_COMMITTER_EMAIL": "t@example.org",
    "DVC_NO_ANALYTICS": "1",
}


def call(folder: Path, *command: str) -> str:
    """Run a command in `folder`; its output, or a failed test that shows it."""
    done = subprocess.run(command, cwd=folder, env=ENV, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def project(folder: Path) -> Path:
    """A git repository with the project's tracked files, as a clone would have."""
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    call(folder, "git", "init", "-q")
    call(folder, "git", "add", "-A")
    call(folder, "git", "commit", "-qm", "start")
    return folder


@pytest.fixture(scope="module")
def repro(tmp_path_factory) -> Path:
    """A project on the tiny world, reproduced up to its shards."""
    folder = project(tmp_path_factory.mktemp("dvc") / "project")
    world = folder.parent / "world"
    tiny.make_images(world / "images")
    tiny.make_vqgan(world / "vqgan.ckpt")
    tiny.make_teacher(world / "teacher.pth")
    short = {"epochs": 1, "warmup_epochs": 0, "batch": 4, "precision": "float32"}
    tree = tiny.merged(tiny.params(world), {"pretrain": {**short, "size": "tiny", "width": 16, "decoder_width": 16}})
    (folder / "params.yaml").write_text(yaml.safe_dump(tree))
    call(folder, "dvc", "repro", "-q", *STAGES)
    return folder


def definitions() -> dict:
    """The stages of dvc.yaml."""
    return yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]


def ran(output: str) -> list[str]:
    """Names of the stages that a repro ran."""
    lines = [line for line in output.splitlines() if line.startswith("Running stage")]
    return [line.split("'")[1].partition("@")[0] for line in lines]  # score@lease is the stage score


@pytest.mark.slow
def test_a_second_repro_does_nothing(repro):
    assert verify_shards(repro / "shards" / "tiny").ok
    assert ran(call(repro, "dvc", "repro", *STAGES)) == []


@pytest.mark.slow
def test_changing_k_reruns_kmeans_and_what_follows_only(repro):
    tree = yaml.safe_load((repro / "params.yaml").read_text())
    tree["kmeans"]["k"] = tiny.WORDS + 1
    (repro / "params.yaml").write_text(yaml.safe_dump(tree))
    assert ran(call(repro, "dvc", "repro", *STAGES)) == ["kmeans", "encode"]
    assert open_shards(repro / "shards" / "tiny").disc_size == tiny.WORDS + 1
    tree["kmeans"]["k"] = tiny.WORDS
    (repro / "params.yaml").write_text(yaml.safe_dump(tree))
    assert ran(call(repro, "dvc", "repro", *STAGES)) == [], "the run cache knows the old dictionary"
    assert open_shards(repro / "shards" / "tiny").disc_size == tiny.WORDS


@pytest.mark.slow
def test_tokens_travel_through_a_remote_to_a_second_clone(repro, tmp_path):
    remote = tmp_path / "remote"
    call(repro, "dvc", "remote", "add", "-q", "-f", "-d", "store", str(remote))
    call(repro, "dvc", "push", "-q", *STAGES)
    call(repro, "git", "add", "-A")
    call(repro, "git", "commit", "-qm", "Reproduce the tokens")
    clone = tmp_path / "clone"
    call(tmp_path, "git", "clone", "-q", str(repro), str(clone))
    call(clone, "dvc", "pull", "-q", "shards/tiny")
    assert verify_shards(clone / "shards" / "tiny").ok
    call(tmp_path, "dvc", "get", "-q", str(repro), "shards/tiny", "-o", "fetched")
    assert tiny.digest(tmp_path / "fetched") == tiny.digest(repro / "shards" / "tiny")
    world = repro.parent / "world"
    world.rename(repro.parent / "away")  # images, tokenizer and teacher
    try:
        call(clone, "dvc", "repro", "-q", "--single-item", "pretrain@lease")
    finally:
        (repro.parent / "away").rename(world)
    assert (clone / "runs" / "tiny" / "lease" / "model.pt").is_file(), "trained from the tokens alone"
    assert not (clone / "data" / "tiny" / "manifest").exists()


@pytest.mark.slow
def test_an_experiment_overrides_one_number_and_trains_only(repro):
    """`dvc exp run -S` as docs/sweeps.md shows it; its row in the table holds the number and the losses."""
    call(repro, "git", "add", "-A")
    call(repro, "git", "commit", "-q", "--allow-empty", "-m", "Start the sweep")
    output = call(repro, "dvc", "exp", "run", "-n", "half", "-S", "pretrain.lambda=0.5", "pretrain@lease")
    assert ran(output) == ["pretrain"]
    rows = csv.DictReader(io.StringIO(call(repro, "dvc", "exp", "show", "--csv").lstrip()))
    row = next(row for row in rows if row["Experiment"] == "half")
    assert float(row["pretrain.lambda"]) == 0.5
    parts = [float(row[f"final.{name}"]) for name in ("loss", "reconstruction", "contrast_encoder")]
    assert parts[0] == pytest.approx(parts[1] + 0.5 * parts[2], rel=1e-5)
    assert float(row["chance.contrast_encoder"]) == pytest.approx(np.log(tiny.WORDS))


@pytest.mark.slow
@pytest.mark.parametrize("preset", [name for name in preset_names(ROOT / "presets") if name != "demo"])
def test_another_preset_shows_the_whole_graph_and_never_the_demo(tmp_path, preset):
    folder = project(tmp_path / "project")
    call(folder, "semdict", "preset", preset)
    params = folder / "params.yaml"
    params.write_text(params.read_text().replace("\nconditioned: []", "\nconditioned: [lease]"))
    call(folder, "semdict", "preset", "--complete")  # makes the folders of the added stages
    output = call(folder, "dvc", "repro", "--dry")
    assert {stage for stage in definitions() if stage not in ran(output)} == set()
    assert "demo" not in output
    assert call(folder, "git", "status", "--porcelain", "--", ".", ":!params.yaml") == ""
    # a preset copied by hand has no folders: `make graph` shows it all the same
    shutil.rmtree(folder / "shards" / preset)
    assert ran(call(folder, "dvc", "repro", "--dry", "--force")) == ran(output)


@pytest.mark.slow
def test_the_imagenet_preset_runs_to_the_end_on_photographs(tmp_path, photographs):
    """Its own graph and sections; only paths, widths and counts are scaled down."""
    folder = project(tmp_path / "project")
    call(folder, "semdict", "preset", "in1k")
    tiny.make_vqgan(tmp_path / "vqgan.ckpt")
    tiny.make_teacher(tmp_path / "teacher.pth")
    tree = tiny.preset("in1k")
    tree["manifest"]["images"] = {"train": str(photographs)}
    tree["inputs"] |= {"vqgan": str(tmp_path / "vqgan.ckpt"), "features": str(tmp_path / "teacher.pth")}
    tree["features"]["weights"] = str(tmp_path / "teacher.pth")
    tree["features"] |= {**tiny.TEACHER, "layer": -2}
    tree["vqgan"] |= {"weights": str(tmp_path / "vqgan.ckpt"), "psnr_floor": 0.0, "psnr_images": 4}
    tree["sample_features"] |= {"points": 4096, "batch": 16}
    tree["kmeans"]["k"] = 32
    tree["encode"] |= {"batch": 16, "precision": "float32"}
    (folder / "params.yaml").write_text(yaml.safe_dump(tree))
    call(folder, "dvc", "repro", "-q", *STAGES)
    shards = open_shards(folder / "shards" / "in1k")
    assert verify_shards(folder / "shards" / "in1k").ok
    assert len(shards) == len(list(photographs.rglob("*.JPEG"))) > 100
    assert (shards.status[:] == 0).all()
    assert sorted(set(shards.index.column("label_name").to_pylist())) == sorted(p.name for p in photographs.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("preset", "targets"), [("in1k-vcq-base", ["vcq_evaluate", "entropy"]), ("in1k-vcq-large", [])]
)
def test_a_vcq_preset_runs_to_the_end_scaled_down(tmp_path, preset, targets):
    """Its own graph and sections; only paths, widths and counts are smaller, and the losses' networks local."""
    folder = project(tmp_path / "project")
    call(folder, "semdict", "preset", preset)
    tiny.make_images(tmp_path / "images")
    tiny.make_vqgan(tmp_path / "vqgan.ckpt")
    tiny.make_teacher(tmp_path / "teacher.pth")
    tree = tiny.preset(preset)
    scale_down(tree, tmp_path)
    (folder / "params.yaml").write_text(yaml.safe_dump(tree))
    call(folder, "dvc", "repro", "-q", *(targets or ["vcq_evaluate"]))
    assert all(awaited.is_dir() for awaited in awaited_folders(folder)), "an awaited file cannot be made ahead"
    schedule = codebook_sizes("cosine", 16, tree["vcq"]["k_min"], tree["vcq"]["k_max"]).tolist()
    shards = open_shards(folder / "shards" / f"{preset}-vcq")
    assert shards.gen_sizes.tolist() == schedule
    assert shards.gen[:].shape == (24, 10, 16), "two splits of twelve images, ten crops"
    found = json.loads((folder / "reports" / preset / "vcq" / "evaluate.json").read_text())
    assert {"psnr", "guided_teacher_frechet_distance", "unguided_teacher_frechet_distance"} <= found.keys()
    guided, unguided = (folder / "runs" / preset / f"ar-samples-{draw}" for draw in ("guided", "unguided"))
    assert json.loads((guided / "sampling.json").read_text())["scale"] == tree["ar_sample"]["scale"]
    assert json.loads((unguided / "sampling.json").read_text())["temperature"] < 1
    if targets:
        assert (folder / "reports" / preset / "entropy" / "entropy.png").stat().st_size > 1000
        entropy = json.loads((folder / "reports" / preset / "entropy" / "entropy.json").read_text())
        assert {name.rsplit("-", 1)[1] for name in entropy if name != "about"} == {"gen", "disc"}
        call(folder, "semdict", "report")
        page = (folder / "reports" / preset / "report.html").read_text()
        assert page.count("data:image/jpeg") >= 5, "reconstructions twice, two grids of samples, the entropy figure"
        assert "vcq/evaluate.json</summary>" in page


def scale_down(tree: dict, world: Path) -> None:
    """Small images, networks and counts in a preset of full size."""
    teacher = str(world / "teacher.pth")
    network = {"kind": "features", "weights": teacher, **tiny.TEACHER, "layers": 1}
    short = {"steps": 4, "batch": 4, "warmup": 1, "hold": 2, "precision": "float32"}
    tree["runtime"] |= {"save_every": 0, "compile": False}
    tree["inputs"] |= {"vqgan": str(world / "vqgan.ckpt"), "features": teacher, "perceptual": teacher}
    tree["manifest"]["images"] = {name: str(world / "images" / "train") for name in ("train", "val")}
    tree["features"] |= {**tiny.TEACHER, "weights": teacher, "layer": -1}
    tree["vqgan"] |= {"weights": str(world / "vqgan.ckpt"), "psnr_floor": 0.0, "psnr_images": 2}
    tree["sample_features"] |= {"points": 800, "batch": 4, "chunk": 4, "precision": "float32"}
    tree["kmeans"] |= {"k": tiny.WORDS}
    tree["encode"] |= {"batch": 2, "chunk": 4, "precision": "float32"}
    tree["vcq"] |= {**short, "patch": 64, "tokens": 16, "encoder": [1, 32, 2], "decoder": [1, 48, 2], "k_max": 64}
    tree["vcq"] |= {"perceptual": [network], "discriminator_start": 2, "discriminator_channels": 8}
    if tree["vcq"]["warm_perceptual"]:
        tree["vcq"] |= {"warm_perceptual": network, "warm_steps": 2}
    tree["vcq_encode"] |= {"batch": 4, "chunk": 4, "precision": "float32", "psnr_floor": 0.0, "psnr_images": 2}
    tree["ar"] |= {**short, "size": "tiny"}
    tree["ar_sample"] |= {"per_class": 2, "batch": 4}
    tree["vcq_evaluate"] |= {"batch": 4, "precision": "float32", "shown": 2}
    tree["vcq_evaluate"]["probe"] |= {"first": [2, 16], "epochs": 2, "batch": 4, "warmup_epochs": 1}
    tree["scores"] |= {"protocol": "teacher", "batch": 4, "kid_subsets": 2}
