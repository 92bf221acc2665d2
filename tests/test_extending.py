"""docs/extending.md: every change that it shows is applied to a copy of the project and used there."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "extending.md"
BASE = "presets/base.yaml"
TABLES = {  # section -> files of the project that its change edits
    "An objective": {"train/masked/objectives/__init__.py", BASE},
    "A tokenizer": {"pipeline/tokenizers/registry.py"},
    "A teacher": {"pipeline/tokenizers/teachers.py"},
    "A measure": {"train/eval/measures.py", BASE},
    "An import layout": {"pipeline/shards/convert.py"},
    "An export layout": {"pipeline/shards/convert.py"},
}


def changes() -> dict[str, str]:
    """Section of the page -> its unified diff."""
    diffs = {}
    for section in PAGE.read_text().split("\n## ")[1:]:
        blocks = re.findall(r"```diff\n(.*?)```\n", section, re.DOTALL)
        if blocks:
            diffs[section.partition("\n")[0]] = "".join(blocks)
    return diffs


CHANGES = changes()


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """A copy of the tracked files with every change applied, importable with PYTHONPATH."""
    folder = tmp_path_factory.mktemp("extended") / "project"
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    for name in ("pipeline", "train"):  # as the installation maps them
        (folder / "semdict" / name).symlink_to(folder / name)
    for section, diff in CHANGES.items():
        done = subprocess.run(["git", "apply"], cwd=folder, input=diff, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{section}: {done.stderr}"
    return folder


@pytest.fixture(scope="module")
def world(project, tmp_path_factory) -> Path:
    """Twelve images with their tokens, and a model trained for an epoch."""
    root = tmp_path_factory.mktemp("world")
    code = (
        "import sys; from pathlib import Path; from tests import tiny\n"
        "root = Path(sys.argv[1])\n"
        "training = {'size': 'tiny', 'width': 16, 'decoder_width': 16, 'epochs': 1, 'warmup_epochs': 0, 'batch': 4}\n"
        "tiny.make_world(root, pretrain={**training, 'precision': 'float32'}, runtime={'tensorboard': False},\n"
        "                evaluate={'test_splits': ['train'], 'batch': 4},\n"
        "                generate={'images': 2, 'batch': 2, 'steps': 2})\n"
        "tiny.run_until_centroids(root)\n"
        "assert tiny.semdict(root, 'encode') == 0\n"
        "assert tiny.semdict(root, 'pretrain', '--objective', 'mage') == 0\n"
    )
    python(project, root, "-c", code, str(root))
    return root


def python(project: Path, folder: Path, *arguments: str) -> str:
    """Output of Python in `folder` with the extended project; a failed test if it fails."""
    env = {**os.environ, "PYTHONPATH": str(project), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{arguments}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def semdict(project: Path, folder: Path, *arguments: str) -> str:
    """Output of a command of the extended project."""
    return python(project, folder, "-m", "semdict", *arguments)


def test_every_extension_point_has_a_change():
    assert set(CHANGES) == set(TABLES)


@pytest.mark.parametrize("section", TABLES)
def test_a_change_adds_a_file_a_line_in_a_table_and_a_section_of_the_base(section):
    """No other file is touched: nothing else in the project knows the names."""
    files = re.findall(r"^\+\+\+ b/(.+)$", CHANGES[section], re.MULTILINE)
    new = [name for name in files if not (ROOT / name).exists()]
    assert len(new) == 1
    assert set(files) - set(new) == TABLES[section]
    edits = CHANGES[section].split("diff --git ")[1:]
    added = {edit.split(" ")[0][2:]: re.findall(r"^\+(?!\+\+)(.+)$", edit, re.MULTILINE) for edit in edits}
    for name in TABLES[section] - {BASE}:
        assert len([line for line in added[name] if not line.startswith("from ")]) == 1, "one line in the table"


@pytest.mark.slow
def test_the_objective_trains_and_its_model_samples(project, world):
    def final(objective: str, *options: str) -> dict:
        semdict(project, world, "pretrain", "--objective", objective, "--resume", *options)
        name = options[1] if "--name" in options else objective
        return json.loads((world / "reports/tiny" / name / "metrics.json").read_text())

    focal, mage = final("focal", "--set", "pretrain.focal.gamma=0.0"), final("mage")
    assert focal["final"]["reconstruction"] == pytest.approx(mage["final"]["reconstruction"], rel=1e-5), "gamma 0"
    weighted = final("focal", "--name", "weighted")
    assert 0 < weighted["final"]["reconstruction"] < mage["final"]["reconstruction"]
    assert weighted["chance"]["reconstruction"] == pytest.approx((63 / 64) ** 2 * np.log(64))
    semdict(project, world, "generate", "--model", "runs/tiny/weighted", "--out", "samples")
    assert len(list((world / "samples").rglob("*.png"))) > 2, "two samples and their grid"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("pretrain.focal.gama=1.0", "pretrain.focal.gama is unknown; did you mean 'gamma'?"),
        ("pretrain.focal.gamma=much", "pretrain.focal.gamma: Input should be a valid number (the value is 'much')"),
        ("pretrain.focal=1.0", "pretrain: focal must be a section"),
        ("pretrain.focal={}", "pretrain.focal.gamma is missing; `semdict preset --complete` adds what is missing"),
        ("pretrain.fokal={gamma: 1.0}", "pretrain.fokal is unknown; "),
        ("pretrain.lamda=1.0", "pretrain.lamda is unknown; did you mean pretrain.lambda?"),
    ],
)
def test_wrong_settings_of_the_objective_are_named(project, world, option, message):
    command = [sys.executable, "-m", "semdict", "pretrain", "--objective", "focal", "--out", "new", "--set", option]
    env = {**os.environ, "PYTHONPATH": str(project)}
    done = subprocess.run(command, cwd=world, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr


@pytest.mark.slow
def test_the_preset_command_adds_the_new_sections(project, tmp_path):
    for name in ("dvc.yaml", "presets", "params.yaml", "demo"):
        source = project / name
        (shutil.copytree if source.is_dir() else shutil.copy2)(source, tmp_path / name)
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    subprocess.run([sys.executable, "-m", "dvc", "init", "-q"], cwd=tmp_path, check=True)
    semdict(project, tmp_path, "preset", "--complete")
    assert "gamma: 2.0" in (tmp_path / "params.yaml").read_text()


@pytest.mark.slow
def test_the_tokenizer_encodes_and_decodes(project, tmp_path):
    code = (
        "import torch; from semdict import load_tokenizer\n"
        "images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))\n"
        "cells = torch.nn.functional.unfold(images, 16, stride=16).mT.flatten(0, 1)\n"
        "torch.save({'state_dict': {'patches': cells}}, 'patches.pt')\n"
        "tokenizer = load_tokenizer('patches.pt')\n"
        "tokens = tokenizer.encode(images)\n"
        "assert tokens.tolist() == torch.arange(32).view(2, 16).tolist()\n"
        "assert torch.equal(tokenizer.decode(tokens), images)\n"
        "print(tokenizer.identity['layout'], tokenizer.identity['sha256'])\n"
    )
    layout, digest = python(project, tmp_path, "-c", code).split()
    assert (layout, len(digest)) == ("patches", 64)


@pytest.mark.slow
def test_the_teacher_gives_the_networks_own_features(project, tmp_path):
    code = (
        "import torch, torchvision; from semdict import load_features\n"
        "torch.manual_seed(0)\n"
        "network = torchvision.models.resnet18().eval()\n"
        "torch.save(network.state_dict(), 'resnet18.pth')\n"
        "teacher = load_features('torchvision:resnet18', 'resnet18.pth', layer=-2, grid=4)\n"
        "images = torch.rand(2, 3, 64, 64)\n"
        "network.layer4, network.avgpool, network.fc = torch.nn.Identity(), torch.nn.Identity(), torch.nn.Identity()\n"
        "mean, std = (torch.tensor(x).view(3, 1, 1) for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))\n"
        "with torch.no_grad():\n"
        "    want = network((images - mean) / std).view(2, 256, 16).mT\n"
        "torch.testing.assert_close(teacher(images), want)\n"
        "print(teacher.grid, teacher.dim, len(teacher.identity['sha256']))\n"
    )
    assert python(project, tmp_path, "-c", code) == "(4, 4) 256 64\n"


@pytest.mark.slow
def test_the_measure_scores_a_model(project, world):
    semdict(project, world, "evaluate", "class-means", "--model", "runs/tiny/mage")
    score = json.loads((world / "reports/tiny/mage/class_means.json").read_text())
    assert 0 <= score["top1"] <= 100
    code = (
        "import numpy as np; from semdict.train.eval.class_means import class_means\n"
        "labels = np.arange(30) % 3\n"
        "features = np.eye(3)[labels] * 5 + np.random.default_rng(0).random((30, 3))\n"
        "print(*class_means(features, labels, features[:7], 3))\n"
    )
    assert python(project, world, "-c", code).split() == ["0", "1", "2", "0", "1", "2", "0"]
    assert score["protocol"][0]["measure"] == "nearest class mean"
    assert "nearest class mean" in semdict(project, world, "evaluate", "--help")


@pytest.mark.slow
def test_the_layouts_give_back_the_same_tokens(project, world, tmp_path):
    rng = np.random.default_rng(0)
    arrays = {"gen": rng.integers(0, 1024, (5, 16)), "label": rng.integers(0, 3, 5)}
    save_file(arrays, tmp_path / "tokens.safetensors")
    semdict(project, tmp_path, "shards", "import", "tokens.safetensors", "shards/mine")
    semdict(project, tmp_path, "shards", "export", "shards/mine", "tokens.jsonl", "--to", "jsonl")
    rows = [json.loads(line) for line in (tmp_path / "tokens.jsonl").read_text().splitlines()]
    assert [row["gen"] for row in rows] == arrays["gen"].tolist()
    assert [row["label"] for row in rows] == arrays["label"].tolist()
    semdict(project, tmp_path, "shards", "export", str(world / "shards/tiny"), "pair.jsonl", "--to", "jsonl")
    assert len(json.loads((tmp_path / "pair.jsonl").read_text().splitlines()[0])["disc"]) == 256
