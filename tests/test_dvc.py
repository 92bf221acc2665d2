"""The pipeline as DVC sees it: whole graph, nothing done twice, tokens that travel to a second clone."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pipeline.shards import verify_shards
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
    tree = yaml.safe_load((ROOT / "presets" / "demo.yaml").read_text())
    (folder / "params.yaml").write_text(yaml.safe_dump({**tree, **tiny.params(world)}))
    call(folder, "dvc", "repro", "-q", *STAGES)
    return folder


def ran(output: str) -> list[str]:
    """Names of the stages that a repro ran."""
    return [line.split("'")[1] for line in output.splitlines() if line.startswith("Running stage")]


@pytest.mark.slow
def test_a_second_repro_does_nothing(repro):
    assert verify_shards(repro / "shards" / "tiny").ok
    assert ran(call(repro, "dvc", "repro", *STAGES)) == []


@pytest.mark.slow
def test_changing_k_reruns_kmeans_and_what_follows_only(repro):
    tree = yaml.safe_load((repro / "params.yaml").read_text())
    tree["kmeans"]["k"] = tiny.WORDS + 1
    (repro / "params.yaml").write_text(yaml.safe_dump(tree))
    assert ran(call(repro, "dvc", "repro", "--dry", *STAGES)) == ["kmeans", "encode"]
    tree["kmeans"]["k"] = tiny.WORDS
    (repro / "params.yaml").write_text(yaml.safe_dump(tree))
    assert ran(call(repro, "dvc", "repro", "--dry", *STAGES)) == []


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


@pytest.mark.slow
@pytest.mark.parametrize("preset", sorted(p.stem for p in (ROOT / "presets").glob("*.yaml") if p.stem != "demo"))
def test_another_preset_shows_the_whole_graph_and_never_the_demo(tmp_path, preset):
    folder = project(tmp_path / "project")
    shutil.copy2(folder / "presets" / f"{preset}.yaml", folder / "params.yaml")
    output = call(folder, "dvc", "repro", "--dry", "--allow-missing")
    assert set(STAGES) <= set(ran(output)) or "vcq" in preset
    assert "demo" not in output
